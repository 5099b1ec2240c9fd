"""Backends: what runs a layer?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    registry.add(
        Component(
            kind="backend",
            name="dense",
            target="sparsehooks.builtin.backends.dense:Dense",
            summary="torch, with the dense weight",
        )
    )
