"""Activations: what makes the values between the layers sparse?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("relu", "relu:ReLU", "ReLU in place of GELU and SiLU, mixed in gradually (Mirzadeh et al. 2023)"),
        ("cats", "thresholds:CATS", "small outputs of activation functions become zero (Lee et al. 2024)"),
        ("teal", "thresholds:TEAL", "small inputs of layers become zero (Liu et al. 2024)"),
    ):
        registry.add(Component("activation", name, f"sparsehooks.builtin.activations.{target}", summary))
