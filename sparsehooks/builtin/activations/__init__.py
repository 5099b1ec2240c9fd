"""Activations: what makes the values between the layers sparse, or coarse?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary, shorthand in (
        ("relu", "relu:ReLU", "ReLU in place of GELU and SiLU, mixed in gradually (Mirzadeh et al. 2023)", None),
        ("cats", "thresholds:CATS", "small outputs of activation functions become zero (Lee et al. 2024)", None),
        ("teal", "thresholds:TEAL", "small inputs of layers become zero (Liu et al. 2024)", None),
        ("int", "quantized:Dynamic", "inputs of layers on a grid fitted to each token", r"int(?P<bits>\d+)"),
        ("static", "quantized:Static", "inputs of layers on a grid fitted once", r"static_int(?P<bits>\d+)"),
        ("pact", "quantized:Pact", "inputs of layers clipped at a learned level (Choi et al. 2018)", None),
    ):
        registry.add(Component("activation", name, f"sparsehooks.builtin.activations.{target}", summary, shorthand))
