"""The compiled kernels: which of them this CPU has, and how they are called."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsehooks_cpu import variants
from sparsehooks_cpu.packing import LANES, PANEL, ROWS

VARIABLE = "SPARSEHOOKS_CPU_VARIANT"
"""An environment variable that names the variant to take, in place of the best that the CPU can run."""
AGREED = {"sparsehooks_layout": (1, ROWS, PANEL, LANES), "sparsehooks_routines": (1,)}
"""What the library has to agree with: the versions of its interfaces, and the order of packed weights."""
ROUTINES = {
    "flag": "pnnip n",
    "count": "pn n",
    "unpack_bits": "pnp -",
    "pack_bits": "pnnp i",
    "pack_planes": "pnnip -",
    "unpack_planes": "pinnp -",
    "split_gaps": "pnipp -",
    "join_gaps": "pnnpip -",
    "split_exponents": "pnnipiippp n",
    "checksum": "pnn n",
    "between": "pnnppp n",
    "largest": "pnnpnp -",
}
"""The inner loops of files and masks: what they take and what they return, as ``TYPES`` calls it."""
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "-": None}
KERNELS = ("float32_float32", "bfloat16_float32", "bfloat16_bfloat16", "int8_float32")
"""What is multiplied, and the dtype of inputs and outputs."""

logger = logging.getLogger(__name__)


class Packed(NamedTuple):
    """A weight as the kernels read it; see kernels.cpp.

    Attributes:
        values: int32, the bits of the units that are not zero, and some that are.
        columns: uint8, one for each value.
        rows: uint8, (tiles, ROWS).
        counts: uint8, (tiles, ROWS).
        starts: int64, (tiles + 1,).
        bias: float32, (out_features,).
        scales: float32, (out_features,), of int8 codes.
        sums: int32, (out_features,), of the int8 codes of a row.
        out_features: rows of the weight.
        in_features: columns of the weight.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    counts: Tensor
    starts: Tensor
    bias: Tensor
    scales: Tensor | None
    sums: Tensor | None
    out_features: int
    in_features: int


class _Weights(ctypes.Structure):
    """The same in C."""

    _fields_ = tuple((name, ctypes.c_int64 if "features" in name else ctypes.c_void_p) for name in Packed._fields)


class Library(NamedTuple):
    """What was loaded.

    Attributes:
        variant: for which CPUs it was compiled.
        kernels: by name.
        routines: the inner loops of files and masks, by name.
        problem: why there are none.
    """

    variant: str = ""
    kernels: dict[str, Callable[..., int]] = {}  # noqa: RUF012 - never changed
    routines: dict[str, Callable[..., int]] = {}  # noqa: RUF012 - never changed
    problem: str = ""


@functools.cache
def library() -> Library:
    """The best variant that the CPU can run and the package has. Loaded once; a problem is logged once."""
    found = _load()
    if found.problem:
        logger.warning("the kernels of sparsehooks-cpu are off: %s", found.problem)
    return found


def _load() -> Library:
    capabilities = torch.cpu.get_capabilities()
    able = [
        name
        for name, variant in variants.of(platform.machine()).items()
        if all(capabilities.get(need, False) for need in variant.needs)
    ]
    built = [name for name in able if (_folder() / variants.file(name)).is_file()]
    chosen = os.environ.get(VARIABLE) or (built[-1] if built else "")
    if not chosen:
        return Library(problem="they were not compiled; install a C++ compiler, then sparsehooks-cpu from its source")
    if chosen not in built:
        return Library(problem=f"{VARIABLE} is '{chosen}', and this CPU or package has only {', '.join(built)}")
    path = _folder() / variants.file(chosen)
    try:
        loaded = ctypes.CDLL(str(path))
        found = {name: tuple((ctypes.c_int64 * len(values)).in_dll(loaded, name)) for name, values in AGREED.items()}
    except (OSError, ValueError) as error:
        return Library(problem=f"'{path}' cannot be loaded: {error}")
    if found != AGREED:
        return Library(problem=f"'{path}' is of another version; install sparsehooks-cpu again")
    kernels: dict[str, Callable[..., int]] = {}
    for name in KERNELS:
        if hasattr(loaded, f"sparsehooks_{name}"):
            kernel = getattr(loaded, f"sparsehooks_{name}")
            kernel.argtypes = [ctypes.POINTER(_Weights), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
            kernels[name] = kernel
    routines: dict[str, Callable[..., int]] = {}
    for name, signature in ROUTINES.items():
        routines[name] = routine = getattr(loaded, f"sparsehooks_{name}")
        *routine.argtypes, _, routine.restype = [TYPES[letter] for letter in signature.replace(" ", "-")]
    return Library(chosen, kernels, routines)


def _folder() -> Path:
    return Path(__file__).parent


def problem(kernel: str, feature: str) -> str | None:
    """Why a kernel is not there, in a few words.

    Args:
        kernel: what is multiplied.
        feature: what a CPU must have for it.
    """
    found = library()
    if found.problem:
        return f"the kernels are off: {found.problem}"
    return (
        None
        if f"{kernel}_float32" in found.kernels
        else f"it needs {feature}, and the kernels for {found.variant} have none"
    )


def multiply(kernel: str, packed: Packed, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
    """The outputs of a layer, by as many threads as torch takes.

    Args:
        kernel: what is multiplied: float32, bfloat16 or int8.
        packed: the weight.
        input: (..., in_features).

    Returns:
        (..., out_features), in the input's dtype.
    """
    if input.shape[-1] != packed.in_features:
        raise ValueError(f"the layer takes {packed.in_features} features, got inputs of shape {tuple(input.shape)}")
    kernels, native = library().kernels, f"{kernel}_{input.dtype}".replace("torch.", "")
    rows = input if input.dim() == 2 else input.reshape(-1, packed.in_features)
    if native not in kernels:
        native, rows = f"{kernel}_float32", rows.to(torch.float32)
    rows = rows.contiguous()
    found = rows.new_empty(len(rows), packed.out_features)
    weights = _Weights(*[part.data_ptr() if isinstance(part, Tensor) else part for part in packed])
    if not kernels[native](weights, rows.data_ptr(), found.data_ptr(), len(rows), torch.get_num_threads()):
        raise MemoryError(f"there is no memory for the inputs of {len(rows)} tokens")
    if input.dim() != 2:
        found = found.reshape(*input.shape[:-1], packed.out_features)
    return found.to(input.dtype)
