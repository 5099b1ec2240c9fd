"""sparsehooks: make models smaller and faster while they train.

The public names are resolved on first use: importing this package imports neither torch nor transformers. What it
does at once is to make ``transformers`` able to open the models it saves, whenever ``transformers`` is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsehooks.artifact.register import register

if TYPE_CHECKING:
    from sparsehooks.accelerating import (
        Verdicts as Verdicts,
        accelerate_model as accelerate_model,
        restore_model as restore_model,
    )
    from sparsehooks.artifact.access import load_state_dict as load_state_dict, safe_open as safe_open
    from sparsehooks.artifact.convert import convert as convert
    from sparsehooks.artifact.export import export as export
    from sparsehooks.artifact.folder import decompress as decompress, inspect as inspect, verify as verify
    from sparsehooks.artifact.write import save_pretrained as save_pretrained
    from sparsehooks.catalog import Component as Component, Registry as Registry
    from sparsehooks.components import (
        Activation as Activation,
        Allocation as Allocation,
        Backend as Backend,
        Codec as Codec,
        ComponentBase as ComponentBase,
        Criterion as Criterion,
        Distiller as Distiller,
        Exporter as Exporter,
        Kernels as Kernels,
        Moment as Moment,
        Need as Need,
        Pattern as Pattern,
        Quantizer as Quantizer,
        Regularizer as Regularizer,
        Schedule as Schedule,
        Solver as Solver,
        Support as Support,
        Window as Window,
        check_moment as check_moment,
    )
    from sparsehooks.computing import kernels as kernels
    from sparsehooks.coupling import Coupling as Coupling, Member as Member, find_couplings as find_couplings
    from sparsehooks.errors import (
        ArtifactError as ArtifactError,
        PlanError as PlanError,
        PluginError as PluginError,
        RecipeError as RecipeError,
        SessionError as SessionError,
        SparseHooksError as SparseHooksError,
    )
    from sparsehooks.grids import (
        Steps as Steps,
        fake_quantize as fake_quantize,
        min_max as min_max,
        read_grid as read_grid,
        significant as significant,
    )
    from sparsehooks.hookspecs import StageStatus as StageStatus, hookimpl as hookimpl
    from sparsehooks.loops.plain import attach as attach
    from sparsehooks.loops.posttrain import compress as compress
    from sparsehooks.loops.trainer import CompressionCallback as CompressionCallback, attach_trainer as attach_trainer
    from sparsehooks.masks import (
        MaskChange as MaskChange,
        least_counts as least_counts,
        straight_through as straight_through,
        top_counts as top_counts,
    )
    from sparsehooks.measuring import activation_sparsity as activation_sparsity
    from sparsehooks.permutation import permute_channels as permute_channels
    from sparsehooks.plan import Plan as Plan
    from sparsehooks.plugins import PluginManager as PluginManager
    from sparsehooks.problems import (
        BalanceProblem as BalanceProblem,
        Choose as Choose,
        LayerProblem as LayerProblem,
        Quantize as Quantize,
    )
    from sparsehooks.quantization import from_codes as from_codes, row_scales as row_scales, to_codes as to_codes
    from sparsehooks.ranges import Range as Range, find_range as find_range
    from sparsehooks.recipe import (
        ActivationStage as ActivationStage,
        DistillStage as DistillStage,
        Grow as Grow,
        PruneStage as PruneStage,
        QuantizeStage as QuantizeStage,
        Recipe as Recipe,
        RegularizeStage as RegularizeStage,
        ShrinkStage as ShrinkStage,
        Use as Use,
        read_toml as read_toml,
    )
    from sparsehooks.session import Session as Session
    from sparsehooks.students import keep_layers as keep_layers
    from sparsehooks.targets import Target as Target
    from sparsehooks.trials import Verdict as Verdict
    from sparsehooks.views import (
        Batch as Batch,
        Layout as Layout,
        SessionView as SessionView,
        WeightView as WeightView,
    )

_HOME = {
    "accelerating": "Verdicts accelerate_model restore_model",
    "artifact.access": "load_state_dict safe_open",
    "artifact.convert": "convert",
    "artifact.export": "export",
    "artifact.folder": "decompress inspect verify",
    "artifact.write": "save_pretrained",
    "catalog": "Component Registry",
    "components": "Activation Allocation Backend Codec ComponentBase Criterion Distiller Exporter Kernels Moment Need "
    "Pattern Quantizer Regularizer Schedule Solver Support Window check_moment",
    "computing": "kernels",
    "coupling": "Coupling Member find_couplings",
    "errors": "ArtifactError PlanError PluginError RecipeError SessionError SparseHooksError",
    "grids": "Steps fake_quantize min_max read_grid significant",
    "hookspecs": "StageStatus hookimpl",
    "loops.plain": "attach",
    "loops.posttrain": "compress",
    "loops.trainer": "CompressionCallback attach_trainer",
    "masks": "MaskChange least_counts straight_through top_counts",
    "measuring": "activation_sparsity",
    "permutation": "permute_channels",
    "plan": "Plan",
    "plugins": "PluginManager",
    "quantization": "from_codes row_scales to_codes",
    "problems": "BalanceProblem Choose LayerProblem Quantize",
    "ranges": "Range find_range",
    "recipe": "ActivationStage DistillStage Grow PruneStage QuantizeStage Recipe RegularizeStage ShrinkStage Use "
    "read_toml",
    "session": "Session",
    "students": "keep_layers",
    "targets": "Target",
    "trials": "Verdict",
    "views": "Batch Layout SessionView WeightView",
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
