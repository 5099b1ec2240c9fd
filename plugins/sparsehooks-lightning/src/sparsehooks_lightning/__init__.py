"""Compress a model with sparsehooks while PyTorch Lightning trains it.

A loop like any other: the callback only opens and closes ``sparsehooks.attach`` and passes the metrics on. The state
of the recipe travels in the optimizer, which Lightning saves in its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

import sparsehooks
from sparsehooks import PluginManager, Recipe, Session, SessionError

__version__ = "0.1.0"
__all__ = ["Compression", "compressed"]


class Compression(Callback):
    """Compress the model while Lightning trains it: ``Trainer(callbacks=[Compression("recipe.toml")])``.

    When training ends, the model holds its final weights, and ``save_pretrained`` of a transformers model in the
    module writes the sparse form. Checkpoints stay dense and resume bit for bit.

    Args:
        recipe: a path, a mapping, or a ``Recipe``; its names are those of ``compressed(module)``.
        plugins: see ``sparsehooks.PluginManager``.

    Raises:
        SparseHooksError: in ``fit``, before the first step, if the recipe does not fit the model or the Trainer.
    """

    def __init__(
        self, recipe: Recipe | Mapping[str, Any] | str | Path, plugins: Sequence[Any] | PluginManager = ()
    ) -> None:
        self.recipe = recipe
        self.plugins = plugins
        self.session: Session | None = None
        self._attached: AbstractContextManager[Session] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: a checkpoint is loaded."""
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise SessionError(
                f"the strategy {type(trainer.strategy).__name__} is not supported: masks cannot reach the weights; use "
                "one device or DDP"
            )
        if len(trainer.optimizers) != 1:
            raise SessionError(
                f"the module has {len(trainer.optimizers)} optimizers, and a run of sparsehooks follows one; give "
                "configure_optimizers one, with several parameter groups if need be"
            )
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise SessionError(
                "the schedules need to know how long the run is; give the Trainer max_steps or max_epochs"
            )
        attached = sparsehooks.attach(
            compressed(pl_module),
            trainer.optimizers[0],
            self.recipe,
            total_steps=int(total),
            plugins=self.plugins,
            folder=trainer.default_root_dir,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )
        self.session = attached.__enter__()
        self._attached = attached

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log the sparsity."""
        if self.session is not None:
            pl_module.log("sparsity", self.session.sparsity)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the metrics on."""
        if self.session is not None:
            self.session.metrics({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish: from here on the model saves in the sparse form."""
        self._detach(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo what the run has left on the model."""
        self._detach(exception)

    def _detach(self, error: BaseException | None) -> None:
        attached, self._attached, self.session = self._attached, None, None
        if attached is not None:
            attached.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)


def compressed(module: LightningModule) -> nn.Module:
    """The module that is compressed, by whose names a recipe goes: the only one in it with parameters, or itself."""
    parameters = {id(weight) for weight in module.parameters()}
    children: list[nn.Module]
    children = [child for child in module.children() if {id(weight) for weight in child.parameters()} == parameters]
    return children[0] if len(children) == 1 else module
