"""The compiled kernels: which of them this CPU has, and how they are called."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    "unpack_bits": "pnpn n",
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
KERNELS = (
    ("float32", torch.float32),
    ("bfloat16", torch.float32),
    ("bfloat16", torch.bfloat16),
    ("int8", torch.float32),
)
"""What is multiplied, and the dtype of inputs and outputs."""

logger = logging.getLogger(__name__)


class Weights(ctypes.Structure):
    """A weight as C has it; see kernels.cpp."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
    )


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernels read it.

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
        native: all of these for C, made once as it would take as long as a small product.
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
    native: Weights = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Take the addresses."""
        parts = [getattr(self, name) for name, _ in Weights._fields_]
        native = Weights(*[part.data_ptr() if isinstance(part, Tensor) else part for part in parts])
        object.__setattr__(self, "native", native)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor))


class Library(NamedTuple):
    """What was loaded.

    Attributes:
        variant: for which CPUs it was compiled.
        kernels: by what is multiplied, and by the dtype of inputs.
        routines: the inner loops of files and masks, by name.
        problem: why there are none.
    """

    variant: str = ""
    kernels: Mapping[str, Mapping[torch.dtype, Callable[..., int]]] = {}
    routines: Mapping[str, Callable[..., int]] = {}
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
    kernels: dict[str, dict[torch.dtype, Callable[..., int]]] = {}
    for what, dtype in KERNELS:
        kernel = getattr(loaded, f"sparsehooks_{what}_{dtype}".replace("torch.", ""), None)
        if kernel is not None:
            kernel.argtypes = [ctypes.POINTER(Weights), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
            kernels.setdefault(what, {})[dtype] = kernel
    routines: dict[str, Callable[..., int]] = {}
    for name, signature in ROUTINES.items():
        routines[name] = routine = getattr(loaded, f"sparsehooks_{name}")
        takes, gives = signature.split()
        routine.argtypes, routine.restype = [TYPES[letter] for letter in takes], TYPES[gives]
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
    return None if kernel in found.kernels else f"it needs {feature}, and the kernels for {found.variant} have none"


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
    kernels = library().kernels[kernel]
    given = (input if input.dtype in kernels else input.to(torch.float32)).contiguous()
    found = given.new_empty(*input.shape[:-1], packed.out_features)
    tokens = input.numel() // packed.in_features
    if not kernels[given.dtype](packed.native, given.data_ptr(), found.data_ptr(), tokens, torch.get_num_threads()):
        raise MemoryError(f"there is no memory for the inputs of {tokens} tokens")
    return found if found.dtype == input.dtype else found.to(input.dtype)  # to() alone would take a microsecond
