"""The built-in codecs: how tensors lie in the file."""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer the codecs."""
    for name, target, summary in (
        ("bitmap", "bitmap:Bitmap", "positions: one bit an element"),
        ("2:4", "two_of_four:TwoOfFour", "positions: two of each four in a row, three groups of four a byte"),
        ("raw", "raw:Raw", "values: as they are"),
        ("int8", "int8:Int8", "values on a symmetric int8 grid: a byte each and a scale a row"),
    ):
        registry.add(Component("codec", name, f"sparsehooks.builtin.codecs.{target}", summary))
