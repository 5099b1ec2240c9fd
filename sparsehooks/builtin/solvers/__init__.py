"""Solvers: how are the survivors of a pruned layer repaired?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("sparsegpt", "sparsegpt:SparseGPT", "column by column, each error moved into the columns that follow"),
        ("gptq", "gptq:GPTQ", "rounding column by column, each error moved into the columns that follow"),
        ("awq", "scaling:AWQ", "columns with large inputs scaled up by what loses least, then rounded"),
        ("smoothquant", "scaling:SmoothQuant", "activations made as even as the weights, which are then rounded"),
        ("least_squares", "least_squares:LeastSquares", "the mask first, then the best values of what stays"),
    ):
        registry.add(Component("solver", name, f"sparsehooks.builtin.solvers.{target}", summary))
