"""Patterns: in which shape may weights go?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    registry.add(
        Component(
            kind="pattern",
            name="unstructured",
            target="sparsehooks.builtin.patterns.unstructured:Unstructured",
            summary="every weight on its own",
        )
    )
    registry.add(
        Component(
            kind="pattern",
            name="n:m",
            target="sparsehooks.builtin.patterns.n_of_m:NOfM",
            summary="n of every m weights in a row stay, as 2:4",
            shorthand=r"(?P<n>[0-9]+):(?P<m>[0-9]+)",
        )
    )
    registry.add(
        Component(
            kind="pattern",
            name="block",
            target="sparsehooks.builtin.patterns.tiles:Block",
            summary="rectangular blocks",
        )
    )
    registry.add(
        Component(
            kind="pattern",
            name="row",
            target="sparsehooks.builtin.patterns.tiles:Row",
            summary="whole rows, one output neuron each",
        )
    )
    registry.add(
        Component(
            kind="pattern",
            name="column",
            target="sparsehooks.builtin.patterns.tiles:Column",
            summary="whole columns, one input feature each",
        )
    )
