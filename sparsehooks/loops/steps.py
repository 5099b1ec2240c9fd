"""A session that follows the steps of an optimizer, in loops that call nothing else."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparsehooks.loops.wrappers import unwrapped_optimizer
from sparsehooks.session import Session
from sparsehooks.sharding import local


class OptimizerSteps:
    """Calls the session before and after each step, until ``remove``.

    Args:
        session: that has started.
        optimizer: any of torch's.
        scaler: a gradient scaler, which may skip a step: that counts, as it does in the Trainer.
    """

    def __init__(self, session: Session, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        self._session = session
        self._optimizer = optimizer
        self._scaler = scaler
        self._counts = self._stepped = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if scaler is not None:
            scaler.step = self._with_skips(scaler.step)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Follow no more."""
        for handle in self._handles:
            handle.remove()
        if self._scaler is not None:
            del self._scaler.step

    def _ready(self) -> None:
        """The gradients are."""
        self._session.before_step(1.0 if self._scaler is None else self._scaler.get_scale())

    def _before(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # the optimizer is the first argument
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        self._stepped = True
        self._counts = closure is not None or not _only_makes_state(self._optimizer)
        if closure is None:
            if self._counts:
                self._ready()
            return None

        def closure_and_ready() -> Any:  # where a closure computes the gradients, once it has
            loss = closure()
            self._ready()
            return loss

        return args[:1], {**kwargs, "closure": closure_and_ready}

    def _after(self, *_: Any) -> None:
        if self._counts:
            overflow = getattr(self._optimizer, "found_inf", None)  # by which fused optimizers skip a step themselves
            self._session.after_step(skipped=overflow is not None and bool(overflow))

    def _with_skips(self, step: Any) -> Any:
        """The scaler's step, after which one that it has left out is counted."""

        @functools.wraps(step)
        def step_or_skip(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._stepped = False
            found = step(optimizer, *args, **kwargs)
            if unwrapped_optimizer(optimizer) is self._optimizer and not self._stepped:
                self._ready()
                self._session.after_step(skipped=True)
            return found

        return step_or_skip


def _only_makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is the step, of no gradients at no rate, by which torch makes room for a distributed checkpoint."""
    if optimizer.state or any(float(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]
    return all(weight.grad is not None and not bool(local(weight.grad).any()) for weight in weights)
