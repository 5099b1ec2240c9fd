"""Schedules: when?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    registry.add(
        Component(
            kind="schedule",
            name="oneshot",
            target="sparsehooks.builtin.schedules.ramps:OneShot",
            summary="everything at one moment",
        )
    )
    registry.add(
        Component(
            kind="schedule",
            name="linear",
            target="sparsehooks.builtin.schedules.ramps:Linear",
            summary="in equal steps",
        )
    )
    registry.add(
        Component(
            kind="schedule",
            name="cubic",
            target="sparsehooks.builtin.schedules.ramps:Cubic",
            summary="fast at first, then slowly",
        )
    )
    registry.add(
        Component(
            kind="schedule",
            name="cosine",
            target="sparsehooks.builtin.schedules.ramps:Cosine",
            summary="slowly, fast, slowly",
        )
    )
