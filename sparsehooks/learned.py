"""What components learn beside the model: leaf tensors under one AdamW that belongs to the session.

Never parameters of the model (a new one adds a state-dict key) and never in the user's optimizer (whose groups the
learning-rate scheduler and a resumed run count).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsehooks.distributed import average


class Learned:
    """The learned tensors of a run, by the owner that made them."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._groups: dict[str, dict[str, Any]] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def add(self, owner: str, made: Mapping[str, Tensor], device: torch.device, learning_rate: float) -> None:
        """Take in what a component made."""
        tensors = {name: tensor.detach().to(device).clone().requires_grad_() for name, tensor in made.items()}
        self._tensors[owner] = tensors
        if not tensors:
            return
        self._groups[owner] = {"params": list(tensors.values()), "lr": learning_rate}
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW([self._groups[owner]], weight_decay=0.0)
        else:
            self._optimizer.add_param_group(self._groups[owner])

    def of(self, owner: str) -> dict[str, Tensor]:
        """The tensors of an owner as they are now, with gradients; empty if it made none."""
        return self._tensors.get(owner, {})

    def before_step(self, scale: float) -> None:
        """Average the gradients over the ranks, and take the scale of a gradient scaler out."""
        for tensor in self._all():
            if tensor.grad is not None:
                average(tensor.grad)
                tensor.grad /= scale

    def after_step(self, *, skipped: bool) -> None:
        """Train, unless the step was skipped or a gradient overflowed."""
        if self._optimizer is None:
            return
        gradients = [tensor.grad for tensor in self._all() if tensor.grad is not None]
        if not skipped and all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The tensors and their optimizer."""
        return {
            "tensors": {owner: {n: t.detach() for n, t in tensors.items()} for owner, tensors in self._tensors.items()},
            "order": list(self._groups),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for owner, stored in state["tensors"].items():
            for name, tensor in stored.items():
                self._tensors[owner][name].data.copy_(tensor)
        self._groups = {owner: self._groups[owner] for owner in state["order"]}
        self._optimizer = None
        if self._groups:
            self._optimizer = torch.optim.AdamW(list(self._groups.values()), weight_decay=0.0)
            self._optimizer.load_state_dict(state["optimizer"])

    def _all(self) -> list[Tensor]:
        return [tensor for tensors in self._tensors.values() for tensor in tensors.values()]
