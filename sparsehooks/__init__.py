"""sparsehooks: make models smaller and faster while they train.

The public names are resolved on first use: importing this package imports neither torch nor transformers. What it
does at once is to make ``transformers`` able to open the models it saves, whenever ``transformers`` is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsehooks.artifact.register import register

if TYPE_CHECKING:
    from sparsehooks.artifact.folder import decompress, inspect, verify
    from sparsehooks.artifact.write import save_pretrained
    from sparsehooks.catalog import Component
    from sparsehooks.components import (
        Allocation,
        Backend,
        Batch,
        Codec,
        ComponentBase,
        Criterion,
        Distiller,
        Layout,
        Moment,
        Need,
        Pattern,
        Quantizer,
        Schedule,
        Support,
        WeightView,
        Window,
    )
    from sparsehooks.errors import ArtifactError, PlanError, PluginError, RecipeError, SessionError, SparseHooksError
    from sparsehooks.hookspecs import hookimpl
    from sparsehooks.loops.plain import attach
    from sparsehooks.loops.posttrain import compress
    from sparsehooks.loops.trainer import CompressionCallback, attach_trainer
    from sparsehooks.masks import MaskChange, top_counts
    from sparsehooks.plan import Plan
    from sparsehooks.plugins import PluginManager
    from sparsehooks.quantization import from_codes, row_scales, to_codes
    from sparsehooks.recipe import DistillStage, PruneStage, QuantizeStage, Recipe, Use, read_toml
    from sparsehooks.session import Session, SessionView

_HOME = {
    "artifact.folder": "decompress inspect verify",
    "artifact.write": "save_pretrained",
    "catalog": "Component",
    "components": "Allocation Backend Batch Codec ComponentBase Criterion Distiller Layout Moment Need Pattern "
    "Quantizer Schedule Support WeightView Window",
    "errors": "ArtifactError PlanError PluginError RecipeError SessionError SparseHooksError",
    "hookspecs": "hookimpl",
    "loops.plain": "attach",
    "loops.posttrain": "compress",
    "loops.trainer": "CompressionCallback attach_trainer",
    "masks": "MaskChange top_counts",
    "plan": "Plan",
    "plugins": "PluginManager",
    "quantization": "from_codes row_scales to_codes",
    "recipe": "DistillStage PruneStage QuantizeStage Recipe Use read_toml",
    "session": "Session SessionView",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__version__ = "0.1.0"
__all__ = [  # noqa: PLE0604 - the table above, flat
    "__version__",
    *_MODULE,
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'sparsehooks' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"sparsehooks.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register()
