"""Export models that sparsehooks quantized to the compressed-tensors format of transformers and vLLM.

Importing this module imports neither torch nor compressed-tensors.
"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl

__version__ = "0.1.0"


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer the exporter; ``pack-quantized`` and ``int-quantized`` are the names of its two formats."""
    registry.add(
        Component(
            "exporter",
            "compressed-tensors",
            "sparsehooks_compressed_tensors.exporter:CompressedTensors",
            "integer weights for transformers and vLLM; also as pack-quantized or int-quantized",
            shorthand="(?P<format>pack-quantized|int-quantized)",
        )
    )
