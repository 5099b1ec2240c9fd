"""Criteria: which weights matter?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    registry.add(
        Component(
            kind="criterion",
            name="magnitude",
            target="sparsehooks.builtin.criteria.magnitude:Magnitude",
            summary="keep the largest absolute values",
        )
    )
    registry.add(
        Component(
            kind="criterion",
            name="random",
            target="sparsehooks.builtin.criteria.random:Random",
            summary="keep a random choice, the same on every rank",
        )
    )
