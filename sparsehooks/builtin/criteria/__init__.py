"""Criteria: which weights matter?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("magnitude", "magnitude:Magnitude", "keep the largest absolute values"),
        ("random", "random:Random", "keep a random choice, the same on every rank"),
    ):
        registry.add(Component("criterion", name, f"sparsehooks.builtin.criteria.{target}", summary))
