"""Regularizers: what pushes weights towards zero?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("l1", "lasso:L1", "the sum of absolute values"),
        ("group_lasso", "lasso:GroupLasso", "the sum of the norms of the pattern's groups"),
    ):
        registry.add(Component("regularizer", name, f"sparsehooks.builtin.regularizers.{target}", summary))
