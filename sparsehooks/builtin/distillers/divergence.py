"""How far one distribution is from another."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(goal: Tensor, other: Tensor) -> Tensor:
    """``KL(goal || other)`` over the last dimension, both as log probabilities."""
    return (goal.exp() * (goal - other)).sum(dim=-1)


def hide(scores: Tensor, where: Tensor) -> Tensor:
    """Scores before a softmax that gives ``where`` (bool) no probability; finite, because 0 times infinity is none."""
    return scores.masked_fill(where, torch.finfo(scores.dtype).min)
