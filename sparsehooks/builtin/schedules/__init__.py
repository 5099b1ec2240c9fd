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
        ("constant", "rounds:Constant", "everything from the start, chosen anew at every update"),
        ("iterative", "rounds:Iterative", "in rounds that take an equal share of what is left, with rewinding"),
        ("feedback", "feedback:Feedback", "as far as a metric allows"),
    ):
        registry.add(Component("schedule", name, f"sparsehooks.builtin.schedules.{target}", summary))
