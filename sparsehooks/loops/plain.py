"""Plain PyTorch and Accelerate loops: a context manager around a loop that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsehooks.errors import SessionError
from sparsehooks.loops.checkpoints import read_state, write_state
from sparsehooks.loops.forward import add_loss_terms
from sparsehooks.loops.steps import OptimizerSteps
from sparsehooks.loops.wrappers import (
    arm_all,
    disarm_all,
    refuse_deepspeed,
    reset_compiled,
    unwrapped,
    unwrapped_optimizer,
)
from sparsehooks.plugins import PluginManager, as_manager
from sparsehooks.recipe import Recipe
from sparsehooks.resuming import step_in
from sparsehooks.session import Session

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
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[Session]:
    """Compress the model while an unchanged loop trains it.

    ``with sparsehooks.attach(model, optimizer, recipe, total_steps=N):`` around the loop; the hooks of the optimizer
    do the rest. At the end the model holds its final weights, and ``model.save_pretrained()`` writes the sparse form.
    Distillation adds to ``outputs.loss``. After ``optimizer.load_state_dict`` or ``accelerator.load_state`` the run
    goes on where the state says. A closure that is given to ``optimizer.step`` is followed, too.

    Args:
        model: the model that is trained, prepared by Accelerate or not.
        optimizer: any torch optimizer, prepared or not.
        recipe: a path, a mapping, or a ``Recipe``.
        total_steps: optimizer steps of the whole run; fractions in schedules refer to it.
        accelerator: for prepared models; unwraps them.
        plugins: see ``PluginManager``.
        folder: where to keep what a resumed run needs of its start (a recipe with ``teacher = "self"``).
        scaler: the gradient scaler of a loop in fp16; Accelerate's is known.

    Yields:
        the session.

    Raises:
        RecipeError: if the recipe cannot be read.
        PlanError: all problems together, before the model is touched.
        SessionError: if the weights or the optimizer are of a kind that masks cannot follow; and at the end, if
            schedules of the recipe wait for an optimizer that was never called.
    """
    manager = as_manager(plugins)
    refuse_deepspeed(model, getattr(accelerator, "distributed_type", None))
    inner = unwrapped_optimizer(optimizer)
    if isinstance(inner, torch.optim.LBFGS):
        raise SessionError(
            "LBFGS tries several weights within one step, where masks do not reach them; use another optimizer"
        )
    whole, model = model, unwrapped(model)
    session = Session.of(Recipe.of(recipe, manager), manager, model, total_steps)
    opened = disarm_all(model)
    step = step_in(inner)
    handles: list[Any] = []
    try:
        with session.aborting():
            session.start(model, inner, step, folder=None if folder is None else Path(folder), opened=opened)
        handles += add_loss_terms(whole, session)
        handles += _follow_checkpoints(session, inner, accelerator)
        scaler = getattr(accelerator, "scaler", None) if scaler is None else scaler
        handles.append(OptimizerSteps(session, inner, scaler))
        reset_compiled(whole)
        with session.aborting():
            yield session
            if session.step == 0 < total_steps:
                raise SessionError(
                    "the loop never called the optimizer that sparsehooks.attach was given, so nothing was done; give "
                    "attach the one whose step() the loop calls"
                )
            session.finish()
    finally:
        for handle in handles:
            handle.remove()
    arm_all(model, session)


def _follow_checkpoints(
    session: Session, optimizer: torch.optim.Optimizer, accelerator: Accelerator | None
) -> list[Any]:
    """The optimizer carries the state, but for sharded weights, where it lies in a file of Accelerate's checkpoint."""
    if not session.sharded:
        return [optimizer.register_load_state_dict_post_hook(lambda _: session.reload())]
    if accelerator is None:
        return []  # what saves and loads sharded weights saves and loads session.state_dict() too
    return [
        accelerator.register_save_state_pre_hook(lambda _models, _weights, folder: write_state(session, folder)),
        accelerator.register_load_state_pre_hook(lambda _, folder: session.load_state_dict(read_state(folder))),
    ]
