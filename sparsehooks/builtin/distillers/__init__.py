"""Distillers: what does the teacher teach?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    registry.add(
        Component(
            kind="distiller",
            name="kl",
            target="sparsehooks.builtin.distillers.kl:KL",
            summary="the distribution of the outputs (Hinton et al. 2015)",
        )
    )
    registry.add(
        Component(
            kind="distiller",
            name="hidden",
            target="sparsehooks.builtin.distillers.hidden:Hidden",
            summary="the hidden states (Romero et al. 2015)",
        )
    )
