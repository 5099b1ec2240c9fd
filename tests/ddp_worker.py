"""What each rank of test_distributed.py runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from helpers import Ordered, arguments, copied, prune, sentences, texts, tiny_bert, tiny_llama
from transformers import Trainer, TrainerCallback

import sparsehooks
from sparsehooks.distributed import once
from sparsehooks.teachers import Teacher

RECIPE = {
    "stage": [
        {**prune()["stage"][0], "allocation": "global"},
        {"distill": {"use": "hidden"}},
        {"quantize": {"use": "lsq", "bits": 4}, "schedule": {"use": "oneshot", "start": 0.3}},
        {"quantize": "kmeans", "targets": ["Embedding"], "schedule": {"use": "oneshot", "start": 0.5}},
        {"activation": {"use": "pact", "batches": 2}, "targets": ["*output.dense"]},
    ]
}


LOSSES = {
    "kl": "kl",
    "hidden": "hidden",
    "attention": "attention",
    "relation": {"use": "relation", "heads": 4},
    "label smoothing": "kl",
}


class ByRank(sparsehooks.Criterion):
    """A criterion that breaks the rule that all ranks score alike."""

    def score(self, view):
        return view.weight.abs() if os.environ["RANK"] == "0" else -view.weight.abs()


class Plugin:
    @sparsehooks.hookimpl
    def register_components(self, registry):
        registry.add(sparsehooks.Component("criterion", "by_rank", ByRank, "differs"))


def main(folder, mode):
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    options = {"ddp_backend": "gloo"} if world > 1 else {}
    folder.mkdir(parents=True, exist_ok=True)
    if mode == "metrics":
        return end(world, followed(int(rank)), folder / f"{mode}-rank{rank}.pt")
    if mode == "cache":
        return end(world, remembered(folder, options), folder / f"{mode}-rank{rank}.pt")
    if mode == "gradient":
        tiny_llama(seed=4).save_pretrained(folder / f"teacher{rank}")
        found = {name: distilled(name, folder, str(folder / f"teacher{rank}"), options) for name in LOSSES}
        return end(world, found, folder / f"{mode}-rank{rank}.pt")
    model, recipe, data = tiny_bert(), RECIPE, sentences()
    options |= {"save_strategy": "steps", "save_steps": 5}
    if mode == "disagree":
        recipe = prune(prune="by_rank")
        model, data = tiny_bert(), sentences()
        recipe["stage"].append({"distill": "hidden"})
    trainer = Ordered(model=model, args=arguments(folder / "run", **options), train_dataset=data)
    trainer.add_callback(sparsehooks.CompressionCallback(recipe, plugins=[Plugin()]))
    try:
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-5") if mode == "resume" else None)
        state = copied(model)
    except sparsehooks.SessionError as error:
        state = {"error": str(error)}
    if mode == "run":
        trainer.save_model(folder / "artifact")
    return end(world, state, folder / f"{mode}-rank{rank}.pt")


def distilled(name, folder, teacher, options):
    """What a step of two accumulated micro-batches with ragged labels changes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = options | {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
    options |= {"per_device_train_batch_size": 8 // (2 * world), "gradient_accumulation_steps": 2, "max_steps": 1}
    rows = texts(8)
    for index, row in enumerate(rows):
        row["labels"][:index] = -100
    model = tiny_llama(seed=3)
    before = copied(model)
    smooths = {"label_smoothing_factor": 0.1} if name == "label smoothing" else {}
    trainer = Ordered(model=model, args=arguments(folder / "run", **options, **smooths), train_dataset=rows)
    recipe = {"stage": [{"distill": LOSSES[name], "teacher": teacher}]}
    if smooths:
        sparsehooks.attach_trainer(trainer, recipe)
    else:
        trainer.add_callback(sparsehooks.CompressionCallback(recipe))
    trainer.train()
    return {key: value - before[key] for key, value in copied(model).items()}


def followed(rank):
    """The weights after a plain loop whose ranks measure different losses."""
    torch.distributed.init_process_group("gloo")
    model, schedule = tiny_bert(), {"use": "feedback", "metric": "loss", "raise_by": 0.3}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sparsehooks.attach(model, optimizer, prune(schedule=schedule), total_steps=4) as session:
        for step in range(4):
            session.metrics({"loss": float(rank * step)})  # by rank 0's it never rises
            optimizer.step()
        assert session.sparsity > 0.7
    return copied(model)


def remembered(folder, options):
    """The teacher's forwards in each epoch of four steps, and what ``once`` raises."""
    forwards, ask = [0], Teacher._ask

    def counted(teacher, given):
        forwards[-1] += 1
        return ask(teacher, given)

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            forwards[int(state.epoch) :] = [0]

    Teacher._ask = counted
    options |= {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4}
    trainer = Trainer(tiny_bert(), arguments(folder / "run", **options), train_dataset=sentences(32))
    trainer.add_callback(Epochs())
    recipe = {"stage": [{"distill": "hidden", "cache": str(folder / "cache")}]}
    trainer.add_callback(sparsehooks.CompressionCallback(recipe))
    trainer.train()
    errors = []
    for error in (OSError("disk"), KeyboardInterrupt(), sparsehooks.ArtifactError("ours")):
        try:
            once(lambda error=error: throw(error))
        except (OSError, KeyboardInterrupt, sparsehooks.SparseHooksError) as caught:
            errors.append(f"{type(caught).__name__}: {caught}")
    return {"forwards": forwards, "errors": errors}


def throw(error):
    raise error


def end(world, state, path):
    torch.save(state, path)
    if world > 1:
        torch.distributed.barrier()
        os._exit(0)  # torch can deadlock where it takes a gloo group down: its thread waits for the interpreter lock


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
