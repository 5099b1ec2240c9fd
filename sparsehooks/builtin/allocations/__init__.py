"""Allocations: how is the budget shared between the layers?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    registry.add(
        Component(
            kind="allocation",
            name="uniform",
            target="sparsehooks.builtin.allocations.uniform:Uniform",
            summary="the same sparsity in every layer",
        )
    )
    registry.add(
        Component(
            kind="allocation",
            name="global",
            target="sparsehooks.builtin.allocations.over_all:Global",
            summary="one threshold over all layers",
        )
    )
