"""Patterns: in which shape may weights go?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary, shorthand in (
        ("unstructured", "unstructured:Unstructured", "every weight on its own", None),
        ("n:m", "n_of_m:NOfM", "n of every m weights in a row stay, as 2:4", r"(?P<n>[0-9]+):(?P<m>[0-9]+)"),
        ("block", "tiles:Block", "rectangular blocks, as block:1x4", r"block:(?P<height>[0-9]+)x(?P<width>[0-9]+)"),
        ("row", "tiles:Row", "whole rows, one output neuron each", None),
        ("column", "tiles:Column", "whole columns, one input feature each", None),
        ("head", "coupled:Head", "attention heads, or groups of heads that share keys", None),
        ("channel", "coupled:Channel", "channels between two layers, rows and columns at once", None),
        ("layer", "coupled:Layer", "whole blocks of a transformer", None),
    ):
        registry.add(Component("pattern", name, f"sparsehooks.builtin.patterns.{target}", summary, shorthand))
