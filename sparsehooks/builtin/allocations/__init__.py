"""Allocations: how is the budget shared between the layers?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("uniform", "uniform:Uniform", "the same sparsity in every layer"),
        ("global", "over_all:Global", "one threshold over all layers"),
        ("erk", "erk:Erk", "small layers stay denser"),
        ("owl", "owl:Owl", "layers with more outliers keep more"),
    ):
        registry.add(Component("allocation", name, f"sparsehooks.builtin.allocations.{target}", summary))
