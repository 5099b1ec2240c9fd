"""What torch's optimizers keep of each weight: how they name it, and what it says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsehooks.sharding import local, part, whole

MOMENTUM = ("exp_avg", "momentum_buffer")
"""How the running mean of the gradient is called (Adam, SGD)."""
BEGINNINGS = {"step_size": "lr", "sum": "initial_accumulator_value"}
"""The slots (Rprop, Adagrad) that do not begin at zero, and the option that they begin with."""


def momentum(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor | None:
    """The running mean of the gradient, sharded as the weight is; None if the optimizer keeps none."""
    slots = optimizer.state.get(weight, {})
    for key in MOMENTUM:
        if slots.get(key) is not None:
            found: Tensor = slots[key]
            return found
    return None if slots else weight.grad  # before the first step they are the same


def step_size(optimizer: torch.optim.Optimizer, weight: nn.Parameter, strength: float) -> Tensor | float:
    """By how much a weight moves for a unit of gradient, times the strength; under Adam a tensor, whole."""
    group = _group(optimizer, weight)
    if group is None:
        return 0.0  # it does not train
    rate = float(group["lr"]) * strength
    slots = optimizer.state.get(weight, {})
    if slots.get("exp_avg_sq") is None:
        return rate
    correction = 1 - group["betas"][1] ** float(slots["step"])
    sizes: Tensor = rate / ((whole(slots["exp_avg_sq"]) / correction).sqrt() + group["eps"])
    return sizes


def reset(optimizer: torch.optim.Optimizer, weight: nn.Parameter, where: Tensor) -> None:
    """Have the optimizer forget what it has seen of a weight.

    Args:
        optimizer: any of torch's.
        weight: perhaps sharded.
        where: bool, whole, of the shape of the weight.
    """
    group = _group(optimizer, weight) or {}
    for key, slot in optimizer.state.get(weight, {}).items():
        if isinstance(slot, Tensor) and slot.shape == where.shape:
            beginning = group[BEGINNINGS[key]] if key in BEGINNINGS else 0
            local(slot).masked_fill_(part(where, slot), beginning)


def _group(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict[str, Any] | None:
    """The options under which a weight trains, if it does."""
    return next((group for group in optimizer.param_groups if any(other is weight for other in group["params"])), None)
