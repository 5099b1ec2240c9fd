"""sparsehooks: make models smaller and faster while they train.

The public names are resolved on first use: importing this package imports neither torch nor transformers. What it
does at once is to make ``transformers`` able to open the models it saves, whenever ``transformers`` is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsehooks.artifact.register import register

if TYPE_CHECKING:
    from sparsehooks.artifact.folder import decompress as decompress
    from sparsehooks.artifact.folder import inspect as inspect
    from sparsehooks.artifact.folder import verify as verify
    from sparsehooks.artifact.write import save_pretrained as save_pretrained
    from sparsehooks.catalog import Component as Component
    from sparsehooks.catalog import Registry as Registry
    from sparsehooks.components import (
        Allocation as Allocation,
    )
    from sparsehooks.components import (
        Backend as Backend,
    )
    from sparsehooks.components import (
        Batch as Batch,
    )
    from sparsehooks.components import (
        Codec as Codec,
    )
    from sparsehooks.components import (
        ComponentBase as ComponentBase,
    )
    from sparsehooks.components import (
        Criterion as Criterion,
    )
    from sparsehooks.components import (
        Distiller as Distiller,
    )
    from sparsehooks.components import (
        Layout as Layout,
    )
    from sparsehooks.components import (
        Moment as Moment,
    )
    from sparsehooks.components import (
        Need as Need,
    )
    from sparsehooks.components import (
        Pattern as Pattern,
    )
    from sparsehooks.components import (
        Quantizer as Quantizer,
    )
    from sparsehooks.components import (
        Schedule as Schedule,
    )
    from sparsehooks.components import (
        Support as Support,
    )
    from sparsehooks.components import (
        WeightView as WeightView,
    )
    from sparsehooks.components import (
        Window as Window,
    )
    from sparsehooks.errors import (
        ArtifactError as ArtifactError,
    )
    from sparsehooks.errors import (
        PlanError as PlanError,
    )
    from sparsehooks.errors import (
        PluginError as PluginError,
    )
    from sparsehooks.errors import (
        RecipeError as RecipeError,
    )
    from sparsehooks.errors import (
        SessionError as SessionError,
    )
    from sparsehooks.errors import (
        SparseHooksError as SparseHooksError,
    )
    from sparsehooks.hookspecs import StageStatus as StageStatus
    from sparsehooks.hookspecs import hookimpl as hookimpl
    from sparsehooks.loops.plain import attach as attach
    from sparsehooks.loops.posttrain import compress as compress
    from sparsehooks.loops.trainer import CompressionCallback as CompressionCallback
    from sparsehooks.loops.trainer import attach_trainer as attach_trainer
    from sparsehooks.masks import MaskChange as MaskChange
    from sparsehooks.masks import top_counts as top_counts
    from sparsehooks.plan import Plan as Plan
    from sparsehooks.plugins import PluginManager as PluginManager
    from sparsehooks.quantization import from_codes as from_codes
    from sparsehooks.quantization import row_scales as row_scales
    from sparsehooks.quantization import to_codes as to_codes
    from sparsehooks.recipe import (
        DistillStage as DistillStage,
    )
    from sparsehooks.recipe import (
        PruneStage as PruneStage,
    )
    from sparsehooks.recipe import (
        QuantizeStage as QuantizeStage,
    )
    from sparsehooks.recipe import (
        Recipe as Recipe,
    )
    from sparsehooks.recipe import (
        Use as Use,
    )
    from sparsehooks.recipe import (
        read_toml as read_toml,
    )
    from sparsehooks.session import Session as Session
    from sparsehooks.session import SessionView as SessionView

_HOME = {
    "artifact.folder": "decompress inspect verify",
    "artifact.write": "save_pretrained",
    "catalog": "Component Registry",
    "components": "Allocation Backend Batch Codec ComponentBase Criterion Distiller Layout Moment Need Pattern "
    "Quantizer Schedule Support WeightView Window",
    "errors": "ArtifactError PlanError PluginError RecipeError SessionError SparseHooksError",
    "hookspecs": "StageStatus hookimpl",
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
__all__ = ["__version__", *_MODULE]  # noqa: PLE0604 - strings all


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'sparsehooks' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"sparsehooks.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register()
