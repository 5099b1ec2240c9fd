"""The kernels of plugins/sparsehooks-cpu beside torch's dense ones, layer by layer.

    python benchmarks/cpu.py [--threads 1] [--rounds 7] [--tokens 1 128] [--layers 768x3072 384x1536 3072x768]
    python benchmarks/cpu.py --models
    python benchmarks/cpu.py --auto

``--models`` measures whole models, ``--auto`` what ``accelerate_model`` chooses by itself, which shall never be slower.
All variants of a layer take turns in each round, and a ratio is the median of those within a round. One thread is
measured by its own CPU time, several by the wall clock. Peers: ``stock`` is F.linear in float32; ``packed`` is oneDNN
with weights that were reordered before, in float32 or, for pairs, bfloat16; ``int8`` is FBGEMM or oneDNN with inputs
rounded to 8 bits. Operations are two for each weight that is not zero and token; bytes are those of the packed weight,
inputs and outputs, once. What the machine can do is measured in the same run: products and sums of float32 vectors in
registers (the peak; twice that of bfloat16 and four times of int8), the same where each vector comes from the first
cache, as the inputs of a weight that may be anywhere do, and a copy of 64 MB.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import itertools
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sparsehooks_cpu.backends import STEPS, Pair, Quad, Unstructured
from sparsehooks_cpu.library import library
from torch import nn
from transformers import BertConfig, BertModel

from sparsehooks import accelerate_model, compress, min_max
from sparsehooks.accelerating import judge
from sparsehooks.speed import Speeds

PEAK = """
#if defined(__AVX512F__)
typedef float V __attribute__((vector_size(64)));
#else
typedef float V __attribute__((vector_size(32)));
#endif
extern "C" int lanes() { return sizeof(V) / 4; }
extern "C" float registers(long times, const float* numbers) {
  V sum[10], x = V{} + numbers[0], y = V{} + numbers[1];
#pragma GCC unroll 10
  for (int j = 0; j < 10; j++) sum[j] = V{} + numbers[j];
  for (long i = 0; i < times; i++) {
#pragma GCC unroll 10
    for (int j = 0; j < 10; j++) sum[j] = sum[j] * x + y;
  }
  float found = 0;
#pragma GCC unroll 10
  for (int j = 0; j < 10; j++) found += sum[j][0];
  return found;
}
extern "C" float cache(long times, const float* weights, const unsigned char* columns, const float* inputs) {
  V sum[4] = {};
  const V* rows = (const V*)inputs;
  for (long i = 0; i < times; i++)
    for (int k = 0; k < 1024; k++) {
      V w = V{} + weights[k];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sum[j] += rows[columns[k] * 4 + j] * w;
    }
  return sum[0][0] + sum[1][0] + sum[2][0] + sum[3][0];
}
"""
console = Console(width=150)


def clock(threads):
    return time.thread_time if threads == 1 else time.perf_counter


def compare(variants, threads, rounds, least=0.01):
    """Microseconds of each variant: rounds x variants, as many calls in a row as take 10 ms."""
    now, calls = clock(threads), {}
    for name, call in variants.items():
        call()
        start = now()
        call()
        calls[name] = max(1, int(least / max(now() - start, 1e-6)))
    times = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = now()
            for _ in range(calls[name]):
                call()
            times[name].append((now() - start) / calls[name] * 1e6)
    return times


def ratio(times, slow, fast):
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def peaks():
    """Float32 operations a second of one thread: in registers, and with inputs loaded; and bytes a second of a copy."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(PEAK)
        command = [shutil.which("c++") or "g++", "-O3", "-march=native", "-fPIC", "-shared"]
        subprocess.run([*command, str(source), "-o", str(out)], check=True, capture_output=True)
        made = ctypes.CDLL(str(out))
    made.registers.argtypes = [ctypes.c_long, ctypes.c_void_p]
    made.cache.argtypes = [ctypes.c_long, *[ctypes.c_void_p] * 3]
    lanes, times = made.lanes(), 200_000
    weights = torch.rand(1024)
    columns = torch.randint(0, 64, (1024,), dtype=torch.uint8)
    inputs = torch.zeros(64 * 4 * lanes + 16)
    aligned = inputs.data_ptr() + -inputs.data_ptr() % 64
    block, target = torch.zeros(1 << 24), torch.zeros(1 << 24)
    found = compare(
        {
            "registers": lambda: made.registers(times, weights.data_ptr()),
            "cache": lambda: made.cache(times // 256, weights.data_ptr(), columns.data_ptr(), aligned),
            "copy": lambda: target.copy_(block),
        },
        threads=1,
        rounds=7,
    )
    least = {name: min(values) * 1e-6 for name, values in found.items()}
    return (
        times * 10 * lanes * 2 / least["registers"],
        times // 256 * 1024 * 4 * lanes * 2 / least["cache"],
        2 * block.nbytes / least["copy"],
    )


def sparse(inputs, outputs, sparsity, block, *, whole=False):
    layer = nn.Linear(inputs, outputs).requires_grad_(requires_grad=False)
    kept = torch.rand(outputs, inputs // block) >= sparsity
    layer.weight.mul_(kept.repeat_interleave(block, dim=1))
    if whole:
        grid = STEPS.fit(*min_max(layer.weight))
        layer.weight.copy_(
            STEPS.values(STEPS.codes(layer.weight, grid["scales"], None), grid["scales"], None, torch.float32)
        )
    return layer


def dense_variants(inputs, outputs, tokens):
    layer = nn.Linear(inputs, outputs).requires_grad_(requires_grad=False)
    x, weight, bias = torch.randn(tokens, inputs), layer.weight, layer.bias
    pack, run = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    packed, half = pack(weight, tokens), pack(weight.bfloat16(), tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantized tensors, without another way to its kernels
        scales, zeros = weight.abs().amax(1).double() / 127, torch.zeros(outputs, dtype=torch.long)
        codes = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    codes = torch.ops.quantized.linear_prepack(codes, bias)
    half_x, half_bias = x.bfloat16(), bias.bfloat16()
    return x, {
        "stock": lambda: F.linear(x, weight, bias),
        "packed": lambda: run(x, packed, bias, "none", [], ""),
        "packed bfloat16": lambda: run(half_x, half, half_bias, "none", [], ""),
        "int8": lambda: torch.ops.quantized.linear_dynamic(x, codes, reduce_range=False),
    }


def measure(table, inputs, outputs, tokens, options, limits):
    x, variants = dense_variants(inputs, outputs, tokens)
    half, needed = x.bfloat16(), {}
    kernels = [
        (Unstructured(), 1, "packed", x, 1, (0.5, 0.8, 0.9)),
        (Pair(), 2, "packed bfloat16", half, 2, (0.8, 0.9)),
        (Quad(), 4, "int8", x, 4, (0.8, 0.9)),
    ]
    for backend, block, peer, given, width, sparsities in kernels:
        for sparsity in sparsities:
            layer = sparse(inputs, outputs, sparsity, block, whole=isinstance(backend, Quad))
            layer = layer.to(given.dtype)
            support = backend.supports(layer, torch.device("cpu"))
            if not support.ok:
                console.print(f"{type(backend).__name__}: {support.reason}")
                continue
            packed = backend.pack(layer)
            name = f"{type(backend).__name__.lower()} {sparsity:.0%}"
            variants[name] = lambda run=backend.run, packed=packed, given=given: run(packed, given)
            operations = 2 * layer.weight.count_nonzero().item() * tokens
            needed[name] = peer, operations, packed.nbytes + (inputs + outputs) * tokens * given.element_size(), width
    with torch.inference_mode():
        times = compare(variants, options.threads, options.rounds)
    registers, _, copy = limits
    for name, values in times.items():
        took = statistics.median(values)
        row = [f"{inputs} to {outputs}", str(tokens), name, f"{took:.0f}", f"{ratio(times, 'stock', name):.2f}"]
        if name in needed:
            peer, operations, size, width = needed[name]
            rate, speed = operations / took * 1e-3, size / took * 1e-3
            row += [f"{ratio(times, peer, name):.2f} {peer}", f"{operations / 1e6:.1f}", f"{size / 1e6:.2f}"]
            row += [f"{rate:.0f}", f"{rate * 1e9 / (registers * width * options.threads):.0%}"]
            row += [f"{speed:.1f}", f"{speed * 1e9 / copy:.0%}"]
        table.add_row(*row, end_section=name == list(times)[-1])


def models(options):
    """Whole BERTs of random weights, pruned by magnitude: every encoder layer by a backend, beside stock float32."""
    shapes = {"MiniLM-L6": (6, 384, 12), "BERT-base": (12, 768, 12)}
    recipes = {
        "80 %": ("cpu_unstructured", {"sparsity": 0.8}, []),
        "90 %": ("cpu_unstructured", {"sparsity": 0.9}, []),
        "1x2, 80 %": ("cpu_pair", {"sparsity": 0.8, "pattern": "block:1x2"}, []),
        "1x4, 80 %, int8": ("cpu_quad", {"sparsity": 0.8, "pattern": "block:1x4"}, [{"quantize": "int8"}]),
    }
    table = Table("model, 1 x 128 tokens", "recipe", "stock ms", "ms", "x stock", title="medians, all encoder layers")
    for name, (layers, width, heads) in shapes.items():
        config = BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
        )
        stock = BertModel(config).eval()
        found, batch = {"stock": stock}, {"input_ids": torch.randint(1000, 30000, (1, 128))}
        for recipe, (backend, prune, more) in recipes.items():
            stages = [{"prune": "magnitude", **prune}, *more]
            small = compress(copy.deepcopy(stock), {"stage": [{**stage, "exclude": ["pooler*"]} for stage in stages]})
            accelerate_model(small, backend, exclude=["pooler*"])
            found[recipe] = small
        with torch.inference_mode():
            calls = {key: functools.partial(model, **batch) for key, model in found.items()}
            times = compare(calls, options.threads, options.rounds)
        for recipe in recipes:
            table.add_row(
                name,
                recipe,
                f"{statistics.median(times['stock']) / 1e3:.1f}",
                f"{statistics.median(times[recipe]) / 1e3:.1f}",
                f"{ratio(times, 'stock', recipe):.2f}",
            )
    console.print(table)


def auto(options):
    """What ``backend="auto"`` chooses, beside stock float32, at numbers of tokens that it timed and others."""
    shapes = [(16, 16), (64, 64), (128, 512), (384, 384), (384, 1536), (768, 3072), (3072, 768)]
    zeros = {
        "0 %": (0.0, 1),
        "50 %": (0.5, 1),
        "2:4": (0.0, 1),
        "80 %": (0.8, 1),
        "80 % in 1x4": (0.8, 4),
        "95 %": (0.95, 1),
    }
    counts = (1, 2, 7, 16, 33, 128, 300, 512)
    table = Table(
        "layer", "zeros", *map(str, counts), title="x stock by number of tokens, and who runs it; =: torch, untouched"
    )
    found = []
    for (inputs, outputs), (name, kind) in itertools.product(shapes, zeros.items()):
        layer = sparse(inputs, outputs, *kind)
        if name == "2:4":
            layer.weight.mul_((torch.rand(outputs, inputs // 4, 4).argsort(dim=-1) < 2).view(outputs, inputs))
        fast = copy.deepcopy(layer)
        verdict = judge(nn.Sequential(fast), "auto", Speeds())["0"]
        if type(fast) is nn.Linear:  # nothing was faster, so it is as it was
            table.add_row(f"{inputs} to {outputs}", name, *["="] * len(counts))
            found += [(1.0, f"{inputs} to {outputs}, {name} zeros, untouched")] * len(counts)
            continue
        cells = []
        for tokens in counts:
            x = torch.randn(tokens, inputs)
            with torch.inference_mode():
                variants = {"stock": functools.partial(layer, x), "auto": functools.partial(fast, x)}
                speed = ratio(compare(variants, options.threads, options.rounds), "stock", "auto")
            who = verdict.backend(tokens)
            found.append((speed, f"{inputs} to {outputs}, {name} zeros, {tokens} tokens, {who}"))
            cells.append(f"{speed:.2f}" + ("" if who == "dense" else f" {who.removeprefix('cpu_')}"))
        table.add_row(f"{inputs} to {outputs}", name, *cells)
    console.print(table)
    slow = sorted(case for case in found if case[0] < 1 / 1.03)
    console.print(f"{len(found)} cases, of which {len(slow)} are more than 3 % slower than stock; the slowest:")
    for speed, what in sorted(found)[:5]:
        console.print(f"  {speed:.3f} {what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1])
    parser.add_argument("--layers", nargs="+", default=["768x3072", "384x1536", "3072x768"])
    parser.add_argument("--models", action="store_true", help="whole models instead of layers")
    parser.add_argument("--auto", action="store_true", help="what is chosen automatically")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.auto:
        torch.set_num_threads(options.threads)
        auto(options)
        return
    if options.models:
        torch.set_num_threads(options.threads)
        models(options)
        return
    torch.set_num_threads(1)
    limits = peaks()
    torch.set_num_threads(options.threads)
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.cpu.get_capabilities()['cpu_name']}, torch "
        f"{torch.__version__}, kernels for {library().variant}, {options.threads} threads; one thread does "
        f"{limits[0] / 1e9:.0f} GOP/s of float32 in registers, {limits[1] / 1e9:.0f} with inputs from the first cache, "
        f"and copies {limits[2] / 1e9:.1f} GB/s"
    )
    columns = [
        "layer",
        "tokens",
        "kernel",
        "us",
        "x stock",
        "x peer",
        "MOP",
        "MB",
        "GOP/s",
        "of peak",
        "GB/s",
        "of copy",
    ]
    table = Table(*columns)
    for layer in options.layers:
        for tokens in options.tokens:
            measure(table, *map(int, layer.split("x")), tokens, options, limits)
    console.print(table)


if __name__ == "__main__":
    main()
