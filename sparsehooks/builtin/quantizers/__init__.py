"""Quantizers: on which grid do the values lie?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (("int8", "int8:Int8", "8 bits a weight, one scale an output row"),):
        registry.add(Component("quantizer", name, f"sparsehooks.builtin.quantizers.{target}", summary))
