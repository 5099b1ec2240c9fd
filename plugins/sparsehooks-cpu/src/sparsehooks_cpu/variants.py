"""The CPUs that the kernels are compiled for."""

from __future__ import annotations

from typing import NamedTuple


class Variant(NamedTuple):
    """What one of them has.

    Attributes:
        flags: of GCC and Clang.
        needs: as ``torch.cpu.get_capabilities`` calls it.
    """

    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def __add__(self, other: object) -> Variant:
        """A CPU that has this and more."""
        assert isinstance(other, Variant)
        return Variant(self.flags + other.flags, self.needs + other.needs)


GENERIC = Variant()
AVX2 = Variant(("-mavx2", "-mfma"), ("avx2", "fma3"))
AVX512 = AVX2 + Variant(
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"), ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
)
AVX512_VNNI = AVX512 + Variant(("-mavx512vnni",), ("avx512_vnni",))
AVX512_BF16 = AVX512_VNNI + Variant(("-mavx512bf16",), ("avx512_bf16",))

X86 = {
    "generic": GENERIC,
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": AVX512_VNNI,
    "avx512_bf16": AVX512_BF16,
}
"""By name, each one with what the one before has."""
OTHERS = {"generic": GENERIC}
"""Where the compiler's own vectors are all there is, as NEON on ARM."""


def of(machine: str) -> dict[str, Variant]:
    """Those of an architecture, as ``platform.machine()`` calls it."""
    return X86 if machine.lower() in {"x86_64", "amd64"} else OTHERS


def file(name: str) -> str:
    """Where a variant lies in the package."""
    return f"kernels_{name}.so"
