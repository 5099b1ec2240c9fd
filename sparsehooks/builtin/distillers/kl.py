"""KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsehooks import Batch, Distiller, SessionError


@dataclass(frozen=True)
class Options:
    """The options of KL.

    Attributes:
        temperature: both distributions are softmax(logits / temperature); the loss is multiplied by its square, so
            that its gradients keep their size.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"'temperature' = {self.temperature} is not a positive number")


class KL(Distiller):
    """``T^2 KL(teacher || student)`` over the last dimension of the logits (Hinton et al. 2015, arXiv:1503.02531)."""

    Config = Options
    config: Options

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,): samples, or the tokens that the labels count."""
        if student.get("logits") is None or teacher.get("logits") is None:
            raise SessionError("kl compares logits, and the model returns none; use hidden for an encoder")
        ours, theirs = student["logits"].float(), teacher["logits"].float()
        if ours.shape != theirs.shape or ours.shape[-1] < 2:
            raise SessionError(
                f"kl needs logits of one shape over two or more classes, got {tuple(ours.shape)} from the student "
                f"and {tuple(theirs.shape)} from the teacher"
            )
        temperature = self.config.temperature
        ours = (ours / temperature).log_softmax(dim=-1)
        theirs = (theirs / temperature).log_softmax(dim=-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(dim=-1)
        return batch.items(divergence * temperature**2)
