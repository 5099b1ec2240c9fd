"""Gram matrices made positive definite."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsehooks import SessionError

TRIES = 6


@dataclass(frozen=True)
class Options:
    """What solvers that factor the Gram matrix share.

    Attributes:
        damping: what is added to its diagonal, as a part of the diagonal's mean.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise ValueError(f"'damping' = {self.damping} is not a positive number, such as 0.01")


def without_dead(gram: Tensor) -> tuple[Tensor, Tensor]:
    """A copy with 1 on the diagonal of the features that are always zero, and which those are."""
    dead = gram.diagonal() == 0
    gram = gram.clone()
    gram.diagonal()[dead] = 1.0
    return gram, dead


def factor(name: str, gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped matrix and its lower Cholesky factor; the damping grows tenfold, with a warning, where it fails.

    Args:
        name: of the layer, for messages.
        gram: symmetric, float32.
        damping: a part of the mean of the diagonal.

    Raises:
        SessionError: if no damping helps.
    """
    mean, part = float(gram.diagonal().mean()), damping
    for _ in range(TRIES):
        damped = gram.clone()
        damped.diagonal().add_(part * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info) and bool(torch.isfinite(lower.diagonal()).all()):
            if part != damping:
                warnings.warn(
                    f"'{name}': its inputs are nearly dependent; the damping was raised to {part:g}", stacklevel=3
                )
            return damped, lower
        part *= 10
    raise SessionError(f"'{name}': the Gram matrix of its inputs cannot be factored; give more calibration batches")
