"""What each rank of test_fsdp.py runs: the same runs on one process, or sharded over two (FSDP2)."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from ddp_worker import end
from helpers import Ordered, arguments, sentences, texts, tiny_bert, tiny_llama
from torch.distributed import checkpoint as checkpoints
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import BertModel

from sparsehooks import CompressionCallback, SessionError, attach, save_pretrained
from sparsehooks.sharding import is_sharded, whole

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
STEPS = 12
EVERY_TWO = {"use": "cubic", "end": 0.75, "every": 2}
RECIPES = {
    "magnitude": [
        {"prune": "magnitude", "sparsity": 0.7, "allocation": "global", "schedule": EVERY_TWO},
        {"distill": "hidden"},
    ],
    "rigl": [
        {
            "prune": "magnitude",
            "sparsity": 0.7,
            "allocation": "erk",
            "grow": {"use": "gradient", "fraction": 0.3, "schedule": "cosine"},
            "schedule": EVERY_TWO,
        },
        {"distill": {"use": "hidden", "layers": "last"}},
    ],
    "movement": [
        {"prune": "movement", "sparsity": 0.7, "allocation": "global", "schedule": EVERY_TWO},
        {"distill": "hidden"},
        {"quantize": {"use": "lsq", "bits": 4}, "schedule": {"use": "oneshot", "start": 0.5}},
        {"quantize": {"use": "lsq", "bits": 8}, "targets": ["Embedding"]},  # of the root's own weights
    ],
    "structured": [
        {"prune": "taylor", "pattern": "head", "sparsity": 0.5, "schedule": EVERY_TWO, "targets": ["*attention*"]},
        {"regularize": {"use": "l1", "strength": 1e-3}, "targets": ["*intermediate*"]},
        {"distill": "hidden"},
    ],
}


REFUSED = [
    [{"prune": "magnitude", "pattern": {"use": "2:4", "permute": True}}],
    [{"prune": "magnitude", "pattern": "head", "sparsity": 0.5, "targets": ["*attention*"]}, {"shrink": True}],
]
LLAMA = [
    {
        "prune": "magnitude",
        "sparsity": 0.6,
        "allocation": "global",
        "grow": {"use": "gradient", "fraction": 0.2},
        "schedule": EVERY_TWO,
        "exclude": ["lm_head"],
    },
    {"distill": "kl"},
    {"quantize": {"use": "lsq", "bits": 8}, "schedule": {"use": "oneshot", "start": 0.5}, "exclude": ["lm_head"]},
]


def batches(rank, world):
    """Each rank's rows of each step's batch of 8."""
    rows = sentences(8 * STEPS)
    for step in range(STEPS):
        mine = rows[8 * step : 8 * step + 8][rank::world]
        yield {key: torch.stack([row[key] for row in mine]) for key in mine[0]}


def made(sharded):
    """A model and its optimizer."""
    model = tiny_bert(functools.partial(BertModel, add_pooling_layer=False)).train()  # every weight has a gradient
    if sharded:
        for layer in model.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(name, steps, folder, checkpoint=None):
    """The session and the model after these steps; a checkpoint is loaded first, or written after the last of them."""
    model, optimizer = made(WORLD > 1)
    with attach(model, optimizer, {"stage": RECIPES[name]}, total_steps=STEPS, folder=folder) as session:
        if steps.start:
            state = get_state_dict(model, optimizer)
            checkpoints.load({"model": state[0], "optimizer": state[1]}, checkpoint_id=checkpoint)
            set_state_dict(model, optimizer, model_state_dict=state[0], optim_state_dict=state[1])
            session.load_state_dict(torch.load(checkpoint / "session.pt"))
        for step, batch in enumerate(batches(RANK, WORLD)):
            if step in steps:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                model.eval()  # after which FSDP2 leaves the root's weights whole
                with torch.no_grad():
                    model(**batch)
                model.train()
        if steps.stop < STEPS:
            state = get_state_dict(model, optimizer)
            checkpoints.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=checkpoint)
            if RANK == 0:
                torch.save(session.state_dict(), checkpoint / "session.pt")
            torch.distributed.barrier()
            raise BrokenOffError
        masks = {name: mask.clone() for name, mask in session.masks.masks.items()}
    return model, {"model": gathered(model), "masks": masks}


class BrokenOffError(Exception):
    """The run breaks off."""


def gathered(model):
    return {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def plain(folder):
    """A plain loop around ``fully_shard``, or on one process."""
    found = {}
    for name in RECIPES:
        own = folder / name
        model, found[name] = train(name, range(STEPS), own)
        if WORLD > 1 and name in ("rigl", "movement"):
            save_pretrained(model, own / "artifact")
            with contextlib.suppress(BrokenOffError):
                train(name, range(5), own, own / "checkpoint")
            _, found[f"{name}, resumed"] = train(name, range(5, STEPS), own, own / "checkpoint")
    if WORLD > 1:
        found["refused"] = [refusal(stages) for stages in REFUSED]
    return found


def refusal(stages):
    model, optimizer = made(sharded=True)
    try:
        with attach(model, optimizer, {"stage": stages}, total_steps=2):
            return None
    except SessionError as error:
        return str(error)


def force_fsdp():
    """Accelerate takes FSDP2 on accelerators only; this makes it take it on CPUs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def trained(folder, resume_from=None, **options):
    trainer = Ordered(
        model=tiny_llama(tied=True),
        args=arguments(
            folder, ddp_backend="gloo", save_strategy="steps", save_steps=5, per_device_train_batch_size=4, **options
        ),
        train_dataset=texts(),
    )
    force_fsdp()
    trainer.is_fsdp_enabled = True
    trainer.add_callback(CompressionCallback({"stage": LLAMA}))
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def in_trainer(folder):
    """The Trainer under FSDP2: to the end, and again from a checkpoint; and what it refuses."""
    trainer = trained(folder / "run")
    trainer.save_model(folder / "saved")
    assert is_sharded(trainer.model)
    found = {"whole": gathered(trainer.model)}
    found["resumed"] = gathered(trained(folder / "run", folder / "run" / "checkpoint-5").model)
    try:
        trained(folder / "elsewhere", folder / "run" / "checkpoint-5")
    except SessionError as error:
        found["elsewhere"] = str(error)
    return found


def accelerated(folder, *, resumes):
    torch.manual_seed(0)
    accelerator = Accelerator()
    force_fsdp()
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    recipe = {"stage": LLAMA}
    with attach(model, optimizer, recipe, total_steps=STEPS, accelerator=accelerator, folder=folder) as session:
        if resumes:
            accelerator.load_state(folder / "state")
        for step, batch in enumerate(batches(RANK, WORLD)):
            if step < session.step:
                continue
            loss = model(**batch, labels=batch["input_ids"]).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if session.step == 5 and not resumes:
                accelerator.save_state(folder / "state")
    accelerator.unwrap_model(model).save_pretrained(
        folder / "saved",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    assert is_sharded(model)
    return gathered(accelerator.unwrap_model(model))


def in_accelerate(folder):
    """An Accelerate loop under FSDP2: to the end, and again from save_state."""
    return {"whole": accelerated(folder, resumes=False), "resumed": accelerated(folder, resumes=True)}


def main(folder, mode):
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
    folder.mkdir(parents=True, exist_ok=True)
    found = {"plain": plain, "trainer": in_trainer, "accelerate": in_accelerate}[mode](folder / mode)
    end(WORLD, found, folder / f"{mode}-rank{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
