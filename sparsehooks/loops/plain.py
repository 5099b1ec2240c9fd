"""Plain PyTorch and Accelerate loops: a context manager around a loop that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_utils import unwrap_model

from sparsehooks.artifact.quantizer import SparseHooksConfig, arm, disarm
from sparsehooks.loops.forward import add_loss_terms
from sparsehooks.plugins import PluginManager, as_manager
from sparsehooks.recipe import Recipe
from sparsehooks.session import KEY, Session

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    total_steps: int,
    accelerator: Accelerator | None = None,
    plugins: Sequence[Any] | PluginManager = (),
    folder: str | Path | None = None,
) -> Iterator[Session]:
    """Compress the model while an unchanged loop trains it.

    ``with sparsehooks.attach(model, optimizer, recipe, total_steps=N):`` around the loop; the hooks of the optimizer
    do the rest. At the end the model holds its final weights, and ``model.save_pretrained()`` writes the sparse form.
    Distillation adds to ``outputs.loss``. After ``optimizer.load_state_dict`` or ``accelerator.load_state`` the run
    goes on where the state says.

    Args:
        model: the model that is trained, prepared by Accelerate or not.
        optimizer: any torch optimizer, prepared or not.
        recipe: a path, a mapping, or a ``Recipe``.
        total_steps: optimizer steps of the whole run; fractions in schedules refer to it.
        accelerator: for prepared models; unwraps them.
        plugins: see ``PluginManager``.
        folder: where to keep what a resumed run needs of its start (a recipe with ``teacher = "self"``).

    Yields:
        the session.

    Raises:
        RecipeError: if the recipe cannot be read.
        PlanError: all problems together, before the model is touched.
    """
    manager = as_manager(plugins)
    unwrapped = accelerator.unwrap_model(model) if accelerator is not None else unwrap_model(model)
    inner = getattr(optimizer, "optimizer", optimizer)
    session = Session.of(Recipe.of(recipe, manager), manager, unwrapped, total_steps)
    config = disarm(unwrapped)
    step = inner.param_groups[0].get(KEY, {}).get("step", 0)
    handles: list[Any] = []
    try:
        with session.aborting():
            session.start(
                unwrapped,
                inner,
                step,
                folder=None if folder is None else Path(folder),
                opened=config.pruned if config is not None else None,
            )
        handles += add_loss_terms(unwrapped, session)
        handles.append(inner.register_load_state_dict_post_hook(lambda _: session.reload()))
        scaler = getattr(accelerator, "scaler", None)
        handles.append(
            inner.register_step_pre_hook(lambda *_: session.before_step(1.0 if scaler is None else scaler.get_scale()))
        )
        handles.append(inner.register_step_post_hook(lambda *_: session.after_step()))
        with session.aborting():
            yield session
            session.finish()
    finally:
        for handle in handles:
            handle.remove()
    arm(unwrapped, SparseHooksConfig(**session.provenance))
