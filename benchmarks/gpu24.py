"""2:4 on a GPU beside dense: is it right, and is it faster?

    python benchmarks/gpu24.py [--dtype bfloat16] [--quick]

For the shapes of BERT and Llama layers and several numbers of tokens: the microseconds of torch's dense layer, and how
many times as fast the semi_structured backend is with the library's default algorithm, with the one that its search
finds for just so many tokens, and in int8. Then, for many tokens, the forward and the backward of a layer that trains:
dense, masked by SR-STE, and with the backend as well, for masks that are 2:4 along rows and for masks that are so both
ways. Medians over pairs of timings, in turn, in one process. Outputs are compared with the dense ones, gradients with
those of the masked layer; the errors are shares of the largest value. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from contextlib import ExitStack

import torch
from torch import nn

from sparsehooks import Backend, attach, compress
from sparsehooks.builtin.backends.semi_structured import SemiStructured, SemiStructuredInt8, tuned
from sparsehooks.speed import machine, ratio

SHAPES = [(768, 768), (768, 3072), (3072, 768), (1024, 4096), (2048, 8192), (4096, 4096), (4096, 14336), (14336, 4096)]
"""(inputs, outputs)."""
DEVICE = torch.device("cuda")
RIGHT = {"2:4": 0.02, "int8": 0.05, "both ways": 0.02}
TOKENS = (1, 16, 128, 512, 2048, 8192)
MANY = (2048, 8192, 32768)
"""Tokens of a step of training."""
PATTERNS = {"2:4": "2:4", "both ways": {"use": "2:4", "transposable": True}}


def layer_of(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    """2:4 by magnitude, on an int8 grid of rows."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, device=DEVICE, dtype=dtype)
    compress(nn.Sequential(layer), {"stage": [{"prune": "magnitude", "pattern": "2:4"}, {"quantize": "int8"}]})
    return layer


def microseconds(function):
    """Of a call, the median of ten."""
    times = []
    for _ in range(11):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[1:])


def compare(backend: Backend, packed, layer, rows):
    """The largest error, as a share of the largest output; and how many times as fast as dense."""
    expected, found = layer(rows).float(), backend.run(packed, rows).float()
    error = float((found - expected).abs().max() / expected.abs().max())
    return error, ratio(functools.partial(layer, rows), functools.partial(backend.run, packed, rows), rows.device)


def measure(layer, rows, wide, narrow):
    """The figures of a line, by the column's name."""
    found = {"dense": f"{microseconds(functools.partial(layer, rows)):.0f}"}
    errors = {}
    if wide is not None:
        default = wide._replace(algorithm=0)
        errors["2:4"], speed = compare(SemiStructured(), default, layer, rows)
        found["2:4"] = f"{speed:.2f}"
        best = tuned(default, *rows.shape)
        if best.algorithm != default.algorithm:
            error, speed = compare(SemiStructured(), best, layer, rows)
            errors["2:4"], found["best"] = max(errors["2:4"], error), f"{speed:.2f}"
    if narrow is not None:
        errors["int8"], speed = compare(SemiStructuredInt8(), narrow, layer, rows)
        found["int8"] = f"{speed:.2f}"
    return found, errors


def training(inputs, outputs, dtype, left, pattern=None, **stage):
    """A model of one layer, in a run that ends with ``left``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, device=DEVICE, dtype=dtype))
    if pattern is not None:
        recipe = {"stage": [{"prune": "sr_ste", "pattern": pattern, **stage}]}
        optimizer = torch.optim.SGD(model.parameters())
        left.enter_context(attach(model, optimizer, recipe, total_steps=1))
        optimizer.step()  # without gradients yet: the masks stay as they are
    return model


@torch.enable_grad()
def pass_through(model, rows, above):
    """Forward and backward, with the gradients of the inputs, of the weight and of the bias."""
    for tensor in (rows, *model.parameters()):
        tensor.grad = None
    model(rows).backward(above)
    return [rows.grad, *(weight.grad for weight in model.parameters())]


def measure_training(inputs, outputs, dtype, tokens):
    """The figures of a line, by the column's name; and the errors of the gradients."""
    rows = torch.randn(tokens, inputs, device=DEVICE, dtype=dtype, requires_grad=True)
    above = torch.randn(tokens, outputs, device=DEVICE, dtype=dtype)
    found, errors = {}, {}
    with ExitStack() as left:
        dense = functools.partial(pass_through, training(inputs, outputs, dtype, left), rows, above)
        found["dense"] = f"{microseconds(dense):.0f}"
        for name, pattern in PATTERNS.items():
            masked, sparse = (
                functools.partial(pass_through, training(inputs, outputs, dtype, left, pattern, **stage), rows, above)
                for stage in ({}, {"backend": "semi_structured"})
            )
            errors[name] = max(
                float((one - other).abs().max() / other.abs().max())
                for one, other in zip(sparse(), masked(), strict=True)
            )
            found["masked"] = f"{ratio(dense, masked, DEVICE):.2f}"
            found[name] = f"{ratio(dense, sparse, DEVICE):.2f}"
    return found, errors


@torch.no_grad()
def main() -> None:
    """One line a shape and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here that torch can use, so nothing was measured")
    print(machine(DEVICE), "compute capability {}.{}".format(*torch.cuda.get_device_capability()), sep=", ")
    dtype, shapes = getattr(torch, options.dtype), SHAPES[1:3] if options.quick else SHAPES
    wrong = []

    def line(inputs, outputs, tokens, columns, found, errors):
        cells = (f"{found.get(name, '-'):>9}" for name in columns)
        said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"{f'{inputs} x {outputs}':>16} {tokens:>7}", *cells, said, flush=True)
        wrong.extend(f"{name} at {inputs} x {outputs}" for name, error in errors.items() if not error <= RIGHT[name])

    columns = ("dense", "2:4", "best", "int8")
    print(f"{'inputs x outputs':>16} {'tokens':>7}", *(f"{name:>9}" for name in columns), "errors")
    for inputs, outputs in shapes:
        layer = layer_of(inputs, outputs, dtype)
        packed = []
        for backend in (SemiStructured(), SemiStructuredInt8()):
            support = backend.supports(layer, DEVICE)
            packed.append(backend.pack(layer) if support.ok else None)
            if not support.ok:
                print(f"{inputs} x {outputs}: {type(backend).__name__} does not run: {support.reason}")
        for tokens in TOKENS:
            rows = torch.randn(tokens, inputs, device=DEVICE, dtype=dtype)
            line(inputs, outputs, tokens, columns, *measure(layer, rows, *packed))
    columns = ("dense", "masked", "2:4", "both ways")
    print(f"{'training':>16} {'tokens':>7}", *(f"{name:>9}" for name in columns), "errors")
    for inputs, outputs in shapes:
        for tokens in MANY:
            line(inputs, outputs, tokens, columns, *measure_training(inputs, outputs, dtype, tokens))
    sys.exit(f"wrong outputs: {', '.join(sorted(set(wrong)))}" if wrong else 0)


if __name__ == "__main__":
    main()
