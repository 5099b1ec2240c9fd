"""Plain PyTorch and Accelerate loops: a context manager around a loop that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsehooks.errors import SessionError
from sparsehooks.loops.forward import add_loss_terms
from sparsehooks.loops.wrappers import arm_all, disarm_all, refuse_deepspeed, reset_compiled, unwrapped
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
    goes on where the state says. A closure that is given to ``optimizer.step`` is followed, too.

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
        SessionError: if the weights or the optimizer are of a kind that masks cannot follow; and at the end, if
            schedules of the recipe wait for an optimizer that was never called.
    """
    manager = as_manager(plugins)
    refuse_deepspeed(model, getattr(accelerator, "distributed_type", None))
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, torch.optim.LBFGS):
        raise SessionError(
            "LBFGS tries several weights within one step, where masks do not reach them; use another optimizer"
        )
    whole, model = model, unwrapped(model)
    session = Session.of(Recipe.of(recipe, manager), manager, model, total_steps)
    opened = disarm_all(model)
    step = inner.param_groups[0].get(KEY, {}).get("step", 0)
    handles: list[Any] = []
    try:
        with session.aborting():
            session.start(model, inner, step, folder=None if folder is None else Path(folder), opened=opened)
        handles += add_loss_terms(whole, session)
        handles.append(inner.register_load_state_dict_post_hook(lambda _: session.reload()))
        handles.append(inner.register_step_pre_hook(_before_step(session, getattr(accelerator, "scaler", None))))
        handles.append(inner.register_step_post_hook(lambda *_: session.after_step()))
        reset_compiled(whole)
        with session.aborting():
            yield session
            if session.step == 0 and not session.complete:
                raise SessionError(
                    "the loop never called the optimizer that sparsehooks.attach was given, so no schedule has moved; "
                    "give attach the one whose step() the loop calls"
                )
            session.finish()
    finally:
        for handle in handles:
            handle.remove()
    arm_all(model, session)


def _before_step(session: Session, scaler: Any) -> Callable[..., Any]:
    """The hook that runs before a step; where a closure computes the gradients, once it has."""

    def ready() -> None:
        session.before_step(1.0 if scaler is None else scaler.get_scale())

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # the optimizer is the first argument
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            ready()
            return None

        def closure_and_ready() -> Any:
            loss = closure()
            ready()
            return loss

        return args[:1], {**kwargs, "closure": closure_and_ready}

    return before
