"""What opening a sparse file costs against the dense one, with ``from_pretrained`` in fresh processes.

    python benchmarks/load.py [--rounds 5] [--sparsity 0.9]

The model has the sizes of SmolLM-135M and random weights; every matrix is pruned by magnitude. Each round opens every
file once, from a warm cache, on one thread. A dense load only maps the file, so both sides also read every weight
once ("used"). Times are medians, ratios medians over the rounds. Memory is the highest resident size above that after
the imports, which are those of the codecs too. A sparse file is there sooner than the dense one where files come
slower than "up to MB/s": the bytes that it saves over the seconds that it takes longer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import sparsehooks
from sparsehooks.artifact import loading  # noqa: F401 - what a load imports, as the model's class
from sparsehooks.artifact.folder import installed_codecs

LEVELS = ("fast", "balanced", "small")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

logging.disable_progress_bar()


def make(sparsity):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            num_hidden_layers=30,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                threshold = weight.abs().flatten().kthvalue(round(sparsity * weight.numel())).values
                weight.masked_fill_(weight.abs() <= threshold, 0.0)
    return model


def save(folder, sparsity):
    """The folders of all cases by dtype and name."""
    model, cases = make(sparsity), {}
    for dtype, torch_dtype in DTYPES.items():
        model.to(torch_dtype)
        cases[dtype] = {name: folder / f"{dtype}-{name}" for name in ("dense", *LEVELS)}
        model.save_pretrained(cases[dtype]["dense"])
        for level in LEVELS:
            sparsehooks.save_pretrained(model, cases[dtype][level], level=level)
    return cases


def resident(key):
    """Bytes, as the kernel counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(key)


def measure(folder):
    """Open one folder in this process, which has opened nothing before."""
    torch.set_num_threads(1)
    installed_codecs()
    (Path(folder) / "model.safetensors").read_bytes()
    base = resident("VmRSS")
    start, start_cpu = time.perf_counter(), time.process_time()
    model = LlamaForCausalLM.from_pretrained(folder)
    loaded, loaded_cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for weight in model.parameters():
            weight.view(torch.int16).max()  # reads it at little cost
    return {
        "load_s": loaded - start,
        "load_cpu_s": loaded_cpu - start_cpu,
        "used_s": time.perf_counter() - start,
        "used_cpu_s": time.process_time() - start_cpu,
        "peak_bytes": resident("VmHWM") - base,
    }


def run(folder):
    done = subprocess.run([sys.executable, __file__, "--measure", folder], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def compare(cases, rounds):
    """One row a case: medians, and ratios to the dense file of the same dtype and round."""
    found = {(dtype, name): [] for dtype in cases for name in cases[dtype]}
    for _ in range(rounds):
        for (dtype, name), results in found.items():
            results.append(run(cases[dtype][name]))
    rows = []
    for (dtype, name), results in found.items():
        dense = found[dtype, "dense"]
        row = {"case": f"{dtype} {name}", "bytes": (cases[dtype][name] / "model.safetensors").stat().st_size}
        for key in results[0]:
            row[key] = statistics.median(result[key] for result in results)
            row[f"{key}_ratio"] = statistics.median(
                result[key] / other[key] for result, other in zip(results, dense, strict=True)
            )
        if name != "dense":
            first = next(other for other in rows if other["case"] == f"{dtype} dense")
            row["over_dense_and_file"] = row["peak_bytes"] / (first["peak_bytes"] + row["bytes"])
            longer = row["used_s"] - first["used_s"]
            row["up_to_mb_s"] = (first["bytes"] - row["bytes"]) / longer / 1e6 if longer > 0 else math.inf
        rows.append(row)
    return rows


def show(row):
    times = [f"{row[key]:.2f} ({row[f'{key}_ratio']:.2f}x)" for key in ("load_s", "used_s", "used_cpu_s")]
    print(
        f"{row['case']:>13} | {row['bytes'] / 1e6:6.1f} | {' | '.join(times)} | {row['peak_bytes'] / 1e6:.0f} | "
        f"{row.get('over_dense_and_file', math.nan):.3f} | {row.get('up_to_mb_s', math.nan):.0f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(save(Path(folder), options.sparsity), options.rounds)
    print("case | MB | loaded s | used s | used CPU s (x dense each) | peak MB | peak / (dense + file) | up to MB/s")
    for row in rows:
        show(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
