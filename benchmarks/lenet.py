"""Test error of sparse LeNets on MNIST beside published tables: error against density, five seeds.

    python benchmarks/lenet.py --data MNIST --out results.jsonl
    python benchmarks/lenet.py --data MNIST --out results.jsonl --network lenet5 --seeds 0 1 --densities 2
    python benchmarks/lenet.py --data MNIST --out results.jsonl --methods dense compressed --densities 3

MNIST is a folder with train-0.npz to train-5.npz and test.npz, each with x (n, 28, 28) and y (n), both uint8. The last
5,000 training images are for validation: with --validate only they are scored, which is how the settings below were
chosen; otherwise each finished model meets the test set once. Every result is appended to --out at once, and a run
that is there is not repeated; without --data the tables of what is there are printed.

"compressed" prunes gradually, replaces what stays by codebooks (k-means), trains those, and writes the file: its bytes
count everything, biases and headers included; "counted" are the bits of Deep Compression's own count (weights only:
Huffman-coded codes and 5-bit distances with filler zeros, and the codebooks).

Published figures: Han et al. 2015 and 2016 (Deep Compression, tables 1 to 3); Dettmers and Zettlemoyer 2019, the
authors' MNIST_compression_comparison and MNIST_sparse_summary files; the others as quoted there or by their authors.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import sparsehooks

BATCH = 100
VALIDATION = 5_000
EXACT = 1e-4
"""Of a density: what rounding to whole weights may change."""

# -------------------------------------------------------------------------------------------- published figures
# Errors and densities in percent.

DENSE = {"lenet300": 1.64, "lenet5": 0.80}  # Han et al.'s reference networks
DEEP_COMPRESSION = {  # source, error, weights kept, times fewer weights, times fewer bits
    "lenet300": [("Han 2015, pruned", 1.59, 8, 12, None), ("Deep Compression", 1.58, 8, 12, 40)],
    "lenet5": [("Han 2015, pruned", 0.77, 8, 12, None), ("Deep Compression", 0.74, 8, 12, 39)],
}
SPARSE_MOMENTUM = {  # density: mean, standard error
    "lenet300": {
        1: (2.36, 0.04),
        1.5: (2.05, 0.03),
        1.8: (1.98, 0.05),
        2: (1.99, 0.02),
        4.4: (1.55, 0.03),
        5: (1.53, 0.02),
        8: (1.45, 0.01),
        8.3: (1.43, 0.02),
    },
    "lenet5": {
        0.4: (1.40, 0.09),
        0.5: (1.14, 0.02),
        0.9: (0.89, 0.03),
        1: (0.83, 0.04),
        2: (0.76, 0.02),
        5: (0.69, 0.02),
        8: (0.645, 0.02),
        9.3: (0.642, 0.03),
    },
}
OTHERS = {  # density: what other methods reach
    "lenet300": {
        1: "LC 3.2; SET 4.20; DEEP-R 6.0; Dynamic Sparse 2.46",
        1.5: "L-OBS 2.0; VD 1.9",
        1.8: "DNS 2.0",
        2: "SNIP 2.4; TargDrop 3.77; SET 2.26; DEEP-R 1.79; Dynamic Sparse 1.86",
        4.4: "SWS 1.9",
        5: "SNIP 1.6; TargDrop 3.13; SET 1.86; DEEP-R 1.94; Dynamic Sparse 1.68",
        8: "OBD 2.0",
        8.3: "Han 1.6",
    },
    "lenet5": {
        0.4: "VD 0.8",
        0.5: "SWS 1.0",
        0.9: "DNS 0.9",
        1: "SNIP 1.1; L-OBS 2.1; LC 1.1",
        2: "SNIP 0.8",
        5: "TargDrop 1.96",
        8: "OBD 2.7",
        9.3: "Han 0.8",
    },
}
LEADERS = {  # method, error, times fewer weights
    "lenet300": [
        ("Han 2015", 1.59, 12),
        ("LC", 2.18, 20),
        ("SWS", 1.94, 23),
        ("DNS", 1.99, 56),
        ("GSM", 1.82, 60),
        ("Sparse VD", 1.92, 68),
    ],
    "lenet5": [
        ("Han 2015", 0.77, 12),
        ("ADMM", 0.8, 71.2),
        ("DNS", 0.91, 108),
        ("GSM", 0.78, 125),
        ("SWS", 0.97, 200),
        ("Sparse VD", 0.75, 280),
    ],
}

# ------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Settings:
    """How a method trains: SGD with Nesterov momentum 0.9 and a cosine from ``rate`` to 0."""

    epochs: int
    rate: float = 0.1
    decay: float = 5e-4
    distill: float = 0.0
    bits: int = 0
    """Of the codes; 0 leaves the weights as they are."""


SETTINGS = {
    "lenet300": {
        "dense": Settings(20),
        "gradual": Settings(30),
        "compressed": Settings(40, bits=4),
        "rigl": Settings(100),
        "set": Settings(100),
    },
    "lenet5": {
        "dense": Settings(7, rate=0.05),
        "gradual": Settings(12, rate=0.05),
        "compressed": Settings(10, rate=0.05, bits=4),
        "rigl": Settings(12, rate=0.05),
        "set": Settings(12, rate=0.05),
    },
}


def recipe(method, density, seed, settings, targets):
    """The recipe of a method at a density in percent; None trains dense."""
    sparse = {"prune": "magnitude", "sparsity": 1 - density / 100, "targets": targets}
    if method == "dense":
        return None
    if method in ("gradual", "compressed"):
        ramp = {"use": "cubic", "start": 0.0, "end": 0.6 if method == "gradual" else 0.5, "every": 100}
        stages = [{**sparse, "allocation": "global", "schedule": ramp}]
        if settings.bits:
            codebook = {"use": "kmeans", "bits": settings.bits}
            stages.append({"quantize": codebook, "schedule": {"use": "oneshot", "start": 0.85}, "targets": targets})
        if settings.distill:
            stages.append({"distill": {"use": "kl", "temperature": 2.0}, "teacher": "self", "weight": settings.distill})
        return {"seed": seed, "stage": stages}
    grow = {"use": {"rigl": "gradient", "set": "random"}[method], "fraction": 0.3}
    constant = {"use": "constant", "start": 0.0, "end": 0.75, "every": 100}
    return {"seed": seed, "stage": [{**sparse, "allocation": "erk", "schedule": constant, "grow": grow}]}


# ------------------------------------------------------------------------------------------------ data and networks


@dataclass(frozen=True)
class Split:
    images: torch.Tensor
    labels: torch.Tensor


def load(folder):
    """Training, validation and test images, normalized, each in one tensor."""

    def read(names):
        parts = [np.load(Path(folder) / f"{name}.npz") for name in names]
        images = torch.from_numpy(np.concatenate([part["x"] for part in parts])).float()
        labels = torch.from_numpy(np.concatenate([part["y"] for part in parts])).long()
        return (images / 255 - 0.1307) / 0.3081, labels

    images, labels = read([f"train-{index}" for index in range(6)])
    return (
        Split(images[:-VALIDATION], labels[:-VALIDATION]),
        Split(images[-VALIDATION:], labels[-VALIDATION:]),
        Split(*read(["test"])),
    )


class Classifier(nn.Module):
    """Answers as transformers models do, so that a distiller can add to the loss."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, images, labels=None):
        logits = self.layers(images)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def lenet300():
    """LeNet-300-100, 266,200 weights."""
    return Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    )


def lenet5():
    """LeNet-5 as in Caffe, 430,500 weights."""
    features = (nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2))
    features += (nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    classes = (nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))
    return Classifier(nn.Sequential(*features, *classes)).to(memory_format=torch.channels_last)


NETWORKS = {"lenet300": lenet300, "lenet5": lenet5}
TITLES = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5-Caffe"}


# ------------------------------------------------------------------------------------------------------ training


def train(net, split, settings, compression, seed):
    """A plain loop; the recipe does its work through the hooks of the optimizer."""
    optimizer = torch.optim.SGD(
        net.parameters(), lr=settings.rate, momentum=0.9, nesterov=True, weight_decay=settings.decay
    )
    steps = settings.epochs * (len(split.labels) // BATCH)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    net.train()
    attached = sparsehooks.attach(net, optimizer, compression, total_steps=steps) if compression else nullcontext()
    with attached:
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(split.labels), generator=order).split(BATCH):
                net(split.images[rows], labels=split.labels[rows])["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                cosine.step()
    return net


@torch.no_grad()
def error(net, split):
    """Percent."""
    net.eval()
    found = torch.cat([net(images)["logits"].argmax(dim=1) for images in split.images.split(1000)])
    return 100 * float((found != split.labels).double().mean())


def weights(net):
    return {name: weight for name, weight in net.named_parameters() if weight.dim() > 1}


# --------------------------------------------------------------------------------------------------------- sizes


def sizes(net):
    """The bytes of the file beside those of a dense one, and the bits as Deep Compression counts beside dense ones."""
    with tempfile.TemporaryDirectory() as folder:
        sparsehooks.save_pretrained(net, Path(folder) / "small", level="small")
        size = (Path(folder) / "small" / "model.safetensors").stat().st_size
    dense = 4 * sum(parameter.numel() for parameter in net.parameters())
    counted = sum(count_bits(weight) for weight in weights(net).values())
    elements = 32 * sum(weight.numel() for weight in weights(net).values())
    return {"bytes": size, "smaller": round(dense / size, 2), "counted": round(elements / counted, 2)}


def count_bits(weight, width=5):
    """Han et al. 2016: the distance to the next weight in ``width`` bits, where need be with a filler zero between."""
    flat = weight.detach().flatten().numpy()
    table, codes = np.unique(flat[flat != 0], return_inverse=True)
    span = 1 << width
    gaps = np.diff(np.flatnonzero(flat), prepend=-1) - 1
    fillers = gaps // span
    distances = np.concatenate([gaps % span, np.full(fillers.sum(), span - 1)])
    values = np.concatenate([codes, np.full(fillers.sum(), len(table))])
    return huffman_bits(values) + huffman_bits(distances) + 32 * len(table)


def huffman_bits(symbols):
    """How long a Huffman code of these symbols is."""
    heap = np.unique(symbols, return_counts=True)[1].tolist()
    heapq.heapify(heap)
    total = len(symbols) if len(heap) == 1 else 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


class Bench:
    """The runs of one network.

    Args:
        network: a key of ``NETWORKS``.
        splits: training, validation and test images.
        settings: of each method.
        validate: leave the test set alone.
    """

    def __init__(self, network, splits, settings, *, validate):
        self._network = network
        self._train, self._validation, self._test = splits
        self._settings = settings
        self._validate = validate
        self._dense = functools.lru_cache(maxsize=1)(self._train_dense)

    def run(self, method, density, seed):
        """One trained model: its errors and what it kept."""
        began = time.perf_counter()
        settings = self._settings[method]
        if method == "dense":
            net = self._new(self._dense(seed))
        else:
            pretrained = method in ("gradual", "compressed")
            net = self._new(self._dense(seed)) if pretrained else self._new(None, seed)
            targets = sorted({type(layer).__name__ for layer in net.layers if hasattr(layer, "weight")})
            compression = recipe(method, density, seed, settings, targets)
            train(net, self._train, settings, compression, seed + 1000)
        kept = {name: int(weight.count_nonzero()) for name, weight in weights(net).items()}
        total = sum(weight.numel() for weight in weights(net).values())
        if abs(sum(kept.values()) / total - density / 100) > EXACT:
            raise SystemExit(f"{method} kept {sum(kept.values())} of {total} weights instead of {density} %")
        return {
            "network": self._network,
            "method": method,
            "density": density,
            "seed": seed,
            "validation": round(error(net, self._validation), 4),
            "test": None if self._validate else round(error(net, self._test), 4),
            "kept": kept,
            "weights": total,
            **(sizes(net) if settings.bits else {}),
            "settings": asdict(settings),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _new(self, state, seed=0):
        torch.manual_seed(seed)
        net = NETWORKS[self._network]()
        if state is not None:
            net.load_state_dict(state)
        return net

    def _train_dense(self, seed):
        return train(self._new(None, seed), self._train, self._settings["dense"], None, seed).state_dict()


# -------------------------------------------------------------------------------------------------------- tables


def table(title, *columns):
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    return made


def summary(rows):
    """Mean and standard error of the test errors, and how many."""
    errors = [row["test"] for row in rows]
    spread = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
    return statistics.mean(errors), spread, len(errors)


def spell(mean, spread, count=None):
    text = f"{mean:.2f}" if math.isnan(spread) else f"{mean:.2f} ± {spread:.2f}"
    return text if count is None else f"{text} ({count})"


def times(density):
    return f"{100 / density:.0f}x"


def show(network, rows, console):
    """The published tables with our rows in them; only what is measured."""
    groups = defaultdict(list)
    for row in rows:
        if row["network"] == network and row["test"] is not None:
            groups[row["method"], row["density"]].append(row)
    if not groups:
        return
    found = {key: summary(group) for key, group in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1]))}
    title = TITLES[network]

    first = table(f"{title}, Deep Compression's tables", "test error in %", "error", "kept", "weights", "bits")
    first.add_row("Han 2015, dense", f"{DENSE[network]:.2f}", "100 %", "", "")
    for source, value, kept, fewer, bits in DEEP_COMPRESSION[network]:
        first.add_row(source, f"{value:.2f}", f"{kept} %", f"{fewer}x", f"{bits}x" if bits else "")
    for (method, density), measured in found.items():
        group = groups[method, density]
        bits = f"{statistics.mean(row['counted'] for row in group):.0f}x" if "counted" in group[0] else ""
        first.add_row(f"ours, {method}", spell(*measured), f"{density:g} %", times(density), bits)
        if bits:
            file = statistics.mean(row["smaller"] for row in group)
            first.add_row("  its file, with biases and headers", "", "", "", f"{file:.0f}x")

    second = table(f"{title}, error against density", "density", "Sparse Momentum", "others", "gradual", "rigl", "set")
    for density in sorted({density for method, density in found if method != "dense"}, reverse=True):
        theirs = SPARSE_MOMENTUM[network].get(density)
        ours = [found.get((method, density)) for method in ("gradual", "rigl", "set")]
        second.add_row(
            f"{density:g} %",
            spell(*theirs) if theirs else "",
            OTHERS[network].get(density, ""),
            *(spell(*measured) if measured else "" for measured in ours),
        )

    third = table(f"{title}, fewest weights", "method", "error", "weights")
    board = [(f"{value:.2f}", fewer, source) for source, value, fewer in LEADERS[network]]
    board += [
        (spell(*measured), 100 / density, f"ours, {method}")
        for (method, density), measured in found.items()
        if method != "dense"
    ]
    for value, fewer, source in sorted(board, key=lambda entry: entry[1]):
        third.add_row(source, value, f"{fewer:.0f}x")

    for made in (first, second, third):
        console.print(made)
    console.print("ours: mean ± standard error (number of seeds)\n")


# ---------------------------------------------------------------------------------------------------------- main


def read_results(path):
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def key(row):
    """What makes two runs the same."""
    return tuple(row[name] for name in ("network", "method", "density", "seed"))


def jobs(options):
    """Seed by seed, so that one dense model serves all densities."""
    for seed in options.seeds:
        for method in options.methods:
            for density in (100.0,) if method == "dense" else options.densities:
                yield method, density, seed


def measure(options, rows):
    """Run what is not there yet; append each result as it comes."""
    changes = {name: getattr(options, name) for name in ("epochs", "rate", "decay", "distill")}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = dict(SETTINGS[options.network])
    for method in options.methods:
        settings[method] = replace(settings[method], **changes)
    torch.set_num_threads(1)
    bench = Bench(options.network, load(options.data), settings, validate=options.validate)
    done = {key(row) for row in rows}
    for method, density, seed in jobs(options):
        if (options.network, method, density, seed) in done:
            continue
        row = bench.run(method, density, seed)
        rows.append(row)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        scores = ", ".join(f"{name} {row[name]:.2f} %" for name in ("validation", "test") if row[name] is not None)
        print(f"{method} at {density:g} %, seed {seed}: {scores}, {row['seconds']:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of MNIST; without it nothing is trained")
    parser.add_argument("--out", type=Path, help="a file of JSON lines, one a run")
    parser.add_argument("--network", choices=NETWORKS, default="lenet300")
    parser.add_argument("--methods", nargs="+", choices=SETTINGS["lenet300"], default=["dense", "gradual"])
    parser.add_argument("--densities", nargs="+", type=float, default=[5.0, 2.0, 1.0], help="in percent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--validate", action="store_true", help="score the validation images only")
    changes = parser.add_argument_group("settings of the chosen methods, in place of the script's")
    changes.add_argument("--epochs", type=int)
    changes.add_argument("--rate", type=float)
    changes.add_argument("--decay", type=float)
    changes.add_argument("--distill", type=float, help="the weight of the distillation loss")
    options = parser.parse_args()
    rows = read_results(options.out)
    if options.data:
        measure(options, rows)
    console = Console()
    for network in NETWORKS:
        show(network, rows, console if console.is_terminal else Console(width=140))


if __name__ == "__main__":
    main()
