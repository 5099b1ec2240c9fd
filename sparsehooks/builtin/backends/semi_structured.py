"""2:4 on sparse tensor cores."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsehooks import Backend, Steps, Support, read_grid
from sparsehooks.builtin.backends.two_four import cutlass_order, off_pattern, pack

STEPS = Steps(8)
TYPICAL = 512
"""The tokens for which cuSPARSELt looks for its fastest algorithm."""


class Library(NamedTuple):
    """Whose kernels multiply, and of what the shapes have to be multiples: (weight's rows, its columns, tokens).

    Attributes:
        name: of the library.
        wide: for float16 and bfloat16.
        narrow: for int8.
    """

    name: str
    wide: tuple[int, int, int]
    narrow: tuple[int, int, int]

    def multiples(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """Those of a dtype."""
        return self.narrow if dtype == torch.int8 else self.wide


CUSPARSELT = Library("cuSPARSELt", (16, 16, 8), (32, 32, 16))
CUTLASS = Library("CUTLASS", (32, 64, 8), (16, 128, 16))


class Packed(NamedTuple):
    """A 2:4 matrix, padded with zero groups.

    Attributes:
        library: for which it is packed.
        values: what is kept; for cuSPARSELt with the positions, in an order of its own.
        positions: for CUTLASS.
        outputs: the rows without the padding.
        bias: padded too.
        algorithm: of cuSPARSELt.
    """

    library: Library
    values: Tensor
    positions: Tensor | None
    outputs: int
    bias: Tensor | None = None
    algorithm: int = 0


class SemiStructured(Backend):
    """2:4 weights in float16 or bfloat16 on GPUs with sparse tensor cores (Mishra et al. 2021, arXiv:2104.08378).

    By cuSPARSELt or, on compute capability 8.x without it, CUTLASS. The operations of torch.sparse drop what is off the
    pattern without a word, so the weight is checked first. It trains, too: with masks that are 2:4 both ways, the
    backward product is sparse as well (Hubara et al. 2021, arXiv:2102.08124).
    """

    trains = True

    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes on compute capability 8.0 and above, for a 2:4 weight, if a small product comes out right."""
        if (why := _unable(device)) is not None:
            return Support(ok=False, reason=why)
        if layer.weight.dtype not in (torch.float16, torch.bfloat16):
            return Support(
                ok=False,
                reason=f"its weight is {layer.weight.dtype}; load it as float16 or bfloat16, or train under autocast",
            )
        why = _failure(device, layer.weight.dtype) or _not_24(layer.weight)
        return Support(ok=why is None, reason=why or "")

    def pack(self, layer: nn.Linear) -> Packed:
        """The two values of each four, and where they lie."""
        packed = _pack(layer.weight.detach(), _library())
        bias = None
        if layer.bias is not None:
            height, _, _ = packed.library.multiples(layer.bias.dtype)
            bias = _padded(layer.bias.detach()[:, None], height, 1).flatten()
        return tuned(packed._replace(bias=bias), TYPICAL, layer.in_features)

    def run(self, packed: Packed, input: Tensor) -> Tensor:  # noqa: A002
        """Half of the products."""
        rows = input.reshape(-1, input.shape[-1])
        return _multiply(packed, rows).reshape(*input.shape[:-1], packed.outputs)


class SemiStructuredInt8(Backend):
    """2:4 weights on an int8 grid of rows: whole numbers on sparse tensor cores.

    What enters a layer is rounded to 8 bits, each token on a symmetric grid of its own.
    """

    rounds_inputs = True

    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes on compute capability 8.0 and above, for a 2:4 weight on a grid, if a small product comes out right."""
        why = _unable(device) or _failure(device, torch.int8) or _not_24(layer.weight)
        if why is None and read_grid(layer.weight, STEPS) is None:
            why = "its weight lies on no int8 grid of rows; quantize it by int8"
        return Support(ok=why is None, reason=why or "", exact=False)

    def pack(self, layer: nn.Linear) -> tuple[Packed, Tensor, Tensor | None]:
        """The codes, their scales, and the bias."""
        grid = read_grid(layer.weight.detach(), STEPS)
        assert grid is not None, "supports() has read the grid"
        codes = (layer.weight.detach().float() / grid["scales"]).round().to(torch.int8)
        scales = grid["scales"].float().flatten().expand(len(codes)).contiguous()
        bias = None if layer.bias is None else layer.bias.detach().float()
        return tuned(_pack(codes, _library()), TYPICAL, layer.in_features), scales, bias

    def run(self, packed: tuple[Packed, Tensor, Tensor | None], input: Tensor) -> Tensor:  # noqa: A002
        """Whole products, scaled once."""
        matrix, scales, bias = packed
        rows = input.reshape(-1, input.shape[-1]).float()
        steps = rows.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-126) / STEPS.most
        codes = (rows / steps).round().to(torch.int8)
        found = _multiply(matrix, codes).float() * steps * scales
        found = found if bias is None else found + bias
        return found.to(input.dtype).reshape(*input.shape[:-1], matrix.outputs)


def _unable(device: torch.device) -> str | None:
    """Why a device has no sparse tensor cores that torch can use."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"2:4 runs on NVIDIA's GPUs, not on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"2:4 needs compute capability 8.0, this GPU has {major}.{minor}"
    if major > 8 and not torch.backends.cusparselt.is_available():
        return f"2:4 on compute capability {major}.{minor} needs cuSPARSELt, which this torch does not have"
    return None


def _library() -> Library:
    return CUSPARSELT if torch.backends.cusparselt.is_available() else CUTLASS


def _not_24(weight: Tensor) -> str | None:
    where = off_pattern(weight)
    return None if where is None else f"its weight is not 2:4: {where}; prune it with pattern = '2:4'"


@functools.cache
def _failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a small product does not come out, once for each device: a library can be there and fail at its first use."""
    try:
        # small whole numbers: every sum is exact
        weight = torch.arange(64 * 128, device=device).view(64, 128) % 5 - 2
        weight = torch.where(torch.arange(128, device=device) % 4 < 2, weight, 0)
        rows = torch.arange(16 * 128, device=device).view(16, 128) % 3 - 1
        found = _multiply(_pack(weight.to(dtype), _library()), rows.to(dtype))
        if torch.equal(found.float(), rows.float() @ weight.float().t()):
            return None
        return f"{_library().name} gives wrong numbers here"
    except Exception as error:  # noqa: BLE001 - of a driver or a library
        return f"{_library().name} does not work here: {error}".splitlines()[0]


def _pack(weight: Tensor, library: Library) -> Packed:
    height, width, _ = library.multiples(weight.dtype)
    rows = len(weight)
    # a negative zero was seen to give garbage, and kernels take rows that follow one another
    weight = _padded(torch.where(weight != 0, weight, 0).contiguous(), height, width)
    if library is CUSPARSELT:
        return Packed(library, torch._cslt_compress(weight), None, rows)
    values, positions = pack(weight)
    return Packed(library, values, cutlass_order(positions, weight.dtype), rows)


def _padded(matrix: Tensor, height: int, width: int) -> Tensor:
    """With zeros, to multiples."""
    rows, columns = -matrix.shape[0] % height, -matrix.shape[1] % width
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _multiply(packed: Packed, rows: Tensor) -> Tensor:
    """Shape (tokens, outputs), in int32 if the rows are int8."""
    tokens, values, bias, kind = len(rows), packed.values, packed.bias, _kind(rows.dtype)
    if not tokens:
        return rows.new_zeros(0, packed.outputs, dtype=kind.get("out_dtype"))
    _, width, height = packed.library.multiples(rows.dtype)
    columns = _padded(rows, height, width).contiguous().t()
    if packed.positions is None:
        kind |= {"transpose_result": True, "alg_id": packed.algorithm}
        found = torch._cslt_sparse_mm(values, columns, bias=bias, **kind)
    elif bias is None:
        found = torch._sparse_semi_structured_mm(values, packed.positions, columns, **kind).t()
    else:
        found = torch._sparse_semi_structured_addmm(bias, values, packed.positions, columns, **kind).t()
    return found[:tokens, : packed.outputs].contiguous()


def _kind(dtype: torch.dtype) -> dict[str, Any]:
    return {"out_dtype": torch.int32} if dtype == torch.int8 else {}


_ALGORITHMS: dict[tuple[Any, ...], int] = {}


def tuned(packed: Packed, tokens: int, inputs: int) -> Packed:
    """With cuSPARSELt's fastest algorithm for so many tokens of so many inputs, if it can tell; searched once."""
    if packed.positions is not None:
        return packed
    values = packed.values
    key = values.shape, tokens, inputs, values.dtype, values.device, packed.bias is None
    if key not in _ALGORITHMS:
        _ALGORITHMS[key] = _search(packed, values.new_zeros(tokens, inputs))
    return packed._replace(algorithm=_ALGORITHMS[key])


def _search(packed: Packed, rows: Tensor) -> int:
    _, width, height = packed.library.multiples(rows.dtype)
    kind = {**_kind(rows.dtype), "transpose_result": True}
    with contextlib.suppress(RuntimeError, AttributeError):
        columns = _padded(rows, height, width).t()
        return int(torch._cslt_sparse_mm_search(packed.values, columns, bias=packed.bias, **kind))
    return packed.algorithm
