"""Backends: what runs a layer?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("dense", "dense:Dense", "torch, with the dense weight"),
        ("dense_packed", "dense_packed:DensePacked", "oneDNN, with the dense weight as its kernels read it, on CPUs"),
        ("semi_structured", "semi_structured:SemiStructured", "2:4 on sparse tensor cores, in float16 and bfloat16"),
        (
            "semi_structured_int8",
            "semi_structured:SemiStructuredInt8",
            "2:4 on sparse tensor cores, int8 weights and inputs rounded to 8 bits",
        ),
        ("int8", "int8:Int8", "products of int8 weights and inputs rounded to 8 bits, on CPUs"),
    ):
        registry.add(Component("backend", name, f"sparsehooks.builtin.backends.{target}", summary))
