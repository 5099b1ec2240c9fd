"""Sparse layers that run faster than dense ones on CPUs, and faster files and masks: compiled kernels for sparsehooks.

Importing this module imports neither torch nor the kernels.
"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl

__version__ = "0.1.0"


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer the backends, and the kernels of files and masks."""
    for name, target, summary in (
        ("cpu_unstructured", "Unstructured", "float32 weights that are not zero, wherever they are, on CPUs"),
        ("cpu_pair", "Pair", "blocks of 1x2 weights in bfloat16, on CPUs"),
        ("cpu_quad", "Quad", "blocks of 1x4 int8 weights, and inputs rounded to 8 bits, on CPUs"),
    ):
        registry.add(Component("backend", name, f"sparsehooks_cpu.backends:{target}", summary))
    registry.add(Component("kernels", "cpu", "sparsehooks_cpu.routines:Cpu", "compiled loops over files and masks"))
