"""The inner loops of files and masks: those of an installed plugin beside the reference in numpy.

    python benchmarks/loops.py [--rounds 15]

A chunk of 2^18 float32 weights, and ten million scores of which a tenth is selected, beside ``torch.topk`` and
``kthvalue`` too. One thread, its own CPU time; both sides take turns in each round, and a ratio is the median of those
within a round. Bytes are those of the dense chunk, or of the scores; a copy reads and writes as many.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import numpy as np
import torch
from cpu import compare, ratio
from rich.console import Console
from rich.table import Table

from sparsehooks import computing, kernels, masks

SIZE, SCORES = 1 << 18, 10_000_000


def loops(density):
    """A call of each for a chunk of such a density."""
    random, reference = np.random.default_rng(0), computing.reference()
    chunk = np.where(random.random(SIZE) < density, random.integers(1, 1 << 32, SIZE), 0).astype(np.uint32)
    positions = reference.nonzero(chunk, 1)
    values, codes = chunk[positions], random.integers(0, 16, positions.size).astype(np.uint8)
    bits, planes = memoryview(reference.pack_bits(positions, SIZE)), memoryview(reference.pack_planes(codes, 4))
    low = 2
    lowest, ones = reference.split_gaps(positions, low)
    gaps = (np.diff(positions, prepend=-1) - 1).astype(np.uint16)
    exponents = np.arange(120, 123, dtype=np.uint8)
    return {
        "nonzero": lambda k: k.nonzero(chunk, 1),
        "pack_bits": lambda k: k.pack_bits(positions, SIZE),
        "unpack_bits (bitmask)": lambda k: k.unpack_bits(bits),
        "split_gaps (Rice)": lambda k: k.split_gaps(positions, low),
        "join_gaps (Rice)": lambda k: k.join_gaps(lowest, ones, low),
        "join_gaps (bytes)": lambda k: k.join_gaps(gaps),
        "pack_planes, 4 bits": lambda k: k.pack_planes(codes, 4),
        "unpack_planes, 4 bits": lambda k: k.unpack_planes(planes, 4, positions.size),
        "split_exponents": lambda k: k.split_exponents(values, 8, exponents, 5),
        "checksum": lambda k: k.checksum(memoryview(chunk)),
    }


def select(scores, found):
    """The tenth of them that is largest, by these kernels."""
    kept, masks.kernels = masks.kernels, lambda: found
    try:
        return masks.select({"": scores}, {"": SCORES // 10})
    finally:
        masks.kernels = kept


def selecting(scores, both):
    """Calls of both kernels and, for float32, of torch's own."""
    calls = {key: functools.partial(select, scores, found) for key, found in both.items()}
    if scores.dtype == torch.float32:
        calls["topk"] = functools.partial(scores.topk, SCORES // 10, sorted=False)
        calls["kthvalue"] = functools.partial(scores.kthvalue, SCORES - SCORES // 10 + 1)
        calls["copy"] = scores.clone
    return calls


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    both = {"reference": computing.reference(), "plugin": kernels()}
    table = Table("loop", "zeros", "reference us", "plugin us", "x reference", "GB/s", title=type(kernels()).__module__)

    def row(name, zeros, calls, size):
        times = compare(calls, 1, options.rounds)
        took = {key: statistics.median(values) for key, values in times.items()}
        speed = f"{size / took['plugin'] / 1e3:.1f}"
        what = f"{ratio(times, 'reference', 'plugin'):.2f}"
        table.add_row(name, zeros, f"{took['reference']:.0f}", f"{took['plugin']:.0f}", what, speed)
        return times

    for density in (0.1, 0.3):
        for name, call in loops(density).items():
            calls = {key: lambda call=call, found=found: call(found) for key, found in both.items()}
            row(name, f"{1 - density:.0%}", calls, 4 * SIZE)
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.randn(SCORES, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
        times = row(f"select, {dtype}", "90%", selecting(scores, both), scores.nbytes)
        if dtype == torch.float32:
            peers = ", ".join(f"{peer} {ratio(times, peer, 'plugin'):.2f}" for peer in ("topk", "kthvalue", "copy"))
    console = Console(width=120)
    console.print(table)
    console.print(f"selecting among float32 scores, times the plugin's: {peers}")


if __name__ == "__main__":
    main()
