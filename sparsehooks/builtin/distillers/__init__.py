"""Distillers: what does the teacher teach?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("kl", "kl:KL", "the distribution of the outputs (Hinton et al. 2015)"),
        ("hidden", "hidden:Hidden", "the hidden states (Romero et al. 2015)"),
    ):
        registry.add(Component("distiller", name, f"sparsehooks.builtin.distillers.{target}", summary))
