"""Export models that sparsehooks saved to ONNX, compared with the model by onnxruntime.

Importing this module imports neither torch nor onnx.
"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl

__version__ = "0.1.0"


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer the exporter."""
    registry.add(Component("exporter", "onnx", "sparsehooks_onnx.exporter:Onnx", "one model.onnx, for onnxruntime"))
