"""The built-in kernels: the inner loops of files and masks in numpy and torch."""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer the reference."""
    registry.add(
        Component("kernels", "numpy", "sparsehooks.builtin.kernels.reference:Numpy", "numpy and torch: the reference")
    )
