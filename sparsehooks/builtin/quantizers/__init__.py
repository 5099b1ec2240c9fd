"""Quantizers: on which grid do the values lie?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    registry.add(
        Component(
            kind="quantizer",
            name="int8",
            target="sparsehooks.builtin.quantizers.int8:Int8",
            summary="8 bits a weight, one scale an output row",
        )
    )
