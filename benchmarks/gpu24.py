"""2:4 on a GPU beside dense: is it right, and is it faster?

    python benchmarks/gpu24.py [--dtype bfloat16] [--quick]

For the shapes of BERT and Llama layers and several numbers of tokens: the time of torch's dense layer, of the
semi_structured backend with the library's default algorithm and with the one that its search finds for this number of
tokens, and of the int8 one. Each is compared with torch's outputs first. Ratios are medians over pairs of timings in
one process, in turn; above 1 is faster than dense. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch
from torch import nn

from sparsehooks import Backend, Steps
from sparsehooks.builtin.backends.semi_structured import SemiStructured, SemiStructuredInt8, _kind, _padded
from sparsehooks.speed import machine, ratio

SHAPES = [(768, 768), (768, 3072), (3072, 768), (1024, 4096), (2048, 8192), (4096, 4096), (4096, 14336), (14336, 4096)]
"""(inputs, outputs)."""
TOKENS = (1, 16, 128, 512, 2048, 8192)


def layer_of(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    """2:4 by magnitude, on an int8 grid of rows."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, device="cuda")
    with torch.no_grad():
        groups = layer.weight.view(outputs, -1, 4)
        kept = groups.abs().argsort(dim=-1).argsort(dim=-1) >= 2
        weight = torch.where(kept, groups, 0).view(outputs, inputs)
        steps = Steps(8)
        grid = steps.fit(weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True))["scales"]
        layer.weight.copy_(steps.values(steps.codes(weight, grid, None), grid, None, weight.dtype))
    return layer.to(dtype)


def searched(packed, rows):
    """With the fastest algorithm for just these tokens; None where there is no search."""
    if packed.positions is not None:
        return None
    columns = _padded(packed.library, rows).t()
    try:
        best = torch._cslt_sparse_mm_search(packed.values, columns, bias=packed.bias, **_kind(rows.dtype))
    except (AttributeError, RuntimeError):
        return None
    return packed._replace(algorithm=int(best))


def compare(backend: Backend, packed, layer, rows):
    """The largest error, as a share of the largest output; and how many times as fast as dense."""
    expected, found = layer(rows).float(), backend.run(packed, rows).float()
    error = float((found - expected).abs().max() / expected.abs().max())
    dense = functools.partial(layer, rows)
    return error, ratio(dense, functools.partial(backend.run, packed, rows), rows.device)


@torch.inference_mode()
def main() -> None:
    """One line a shape and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here that torch can use, so nothing was measured")
    dtype, device = getattr(torch, options.dtype), torch.device("cuda")
    print(machine(device), f"compute capability {torch.cuda.get_device_capability()}", sep=", ")
    wide, narrow = SemiStructured(), SemiStructuredInt8()
    print(f"{'inputs x outputs':>18} {'tokens':>7} {'2:4':>7} {'best':>7} {'int8':>7} {'error':>9} {'int8':>9}")
    worst = 0.0
    for inputs, outputs in SHAPES[1:3] if options.quick else SHAPES:
        layer = layer_of(inputs, outputs, dtype)
        supports = [backend.supports(layer, device) for backend in (wide, narrow)]
        for backend, support in zip((wide, narrow), supports, strict=True):
            if not support.ok:
                print(f"{inputs} x {outputs}: no {type(backend).__name__}: {support.reason}")
        for tokens in TOKENS:
            rows = torch.randn(tokens, inputs, device=device, dtype=dtype)
            cells = dict.fromkeys(("2:4", "best", "int8"), "-") | dict.fromkeys(("error", "error8"), "-")
            if supports[0].ok:
                packed = wide.pack(layer)._replace(algorithm=0)
                error, speed = compare(wide, packed, layer, rows)
                cells |= {"2:4": f"{speed:.2f}", "error": f"{error:.1e}"}
                worst = max(worst, error)
                if (tuned := searched(packed, rows)) is not None:
                    error, speed = compare(wide, tuned, layer, rows)
                    cells["best"] = f"{speed:.2f}"
                    worst = max(worst, error)
            if supports[1].ok:
                error, speed = compare(narrow, narrow.pack(layer), layer, rows)
                cells |= {"int8": f"{speed:.2f}", "error8": f"{error:.1e}"}
            print(
                f"{f'{inputs} x {outputs}':>18} {tokens:>7} {cells['2:4']:>7} {cells['best']:>7} {cells['int8']:>7} "
                f"{cells['error']:>9} {cells['error8']:>9}",
                flush=True,
            )
    print("right" if worst <= 0.02 else f"WRONG: outputs differ by {worst:.1e} of the largest")


if __name__ == "__main__":
    main()
