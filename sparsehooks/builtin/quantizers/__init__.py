"""Quantizers: on which grid do the values lie?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary, shorthand in (
        ("int", "uniform:Uniform", "integers of 2 to 8 bits times a scale", r"int(?P<bits>\d+)"),
        ("lsq", "lsq:Lsq", "integers whose scales train with the weights", None),
        ("kmeans", "kmeans:KMeans", "few shared values, found by k-means and trained on", None),
        ("nf4", "levels:NF4", "16 quantiles of a normal distribution, scaled by blocks", None),
        ("apot", "levels:APoT", "sums of powers of two, with a learned scale", None),
    ):
        registry.add(Component("quantizer", name, f"sparsehooks.builtin.quantizers.{target}", summary, shorthand))
