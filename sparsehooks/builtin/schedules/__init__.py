"""Schedules: when?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("oneshot", "ramps:OneShot", "everything at one moment"),
        ("linear", "ramps:Linear", "in equal steps"),
        ("cubic", "ramps:Cubic", "fast at first, then slowly"),
        ("cosine", "ramps:Cosine", "slowly, fast, slowly"),
    ):
        registry.add(Component("schedule", name, f"sparsehooks.builtin.schedules.{target}", summary))
