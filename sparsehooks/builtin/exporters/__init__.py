"""Exporters: who else shall read a saved model?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (("dense", "dense:Dense", "an ordinary safetensors folder, bit for bit"),):
        registry.add(Component("exporter", name, f"sparsehooks.builtin.exporters.{target}", summary))
