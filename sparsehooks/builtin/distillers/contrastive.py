"""Sentence embeddings, told apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsehooks import Batch, Distiller, Need
from sparsehooks.builtin.distillers.hidden import projected, projection
from sparsehooks.builtin.distillers.layers import paired


@dataclass(frozen=True)
class Options:
    """The options of contrastive.

    Attributes:
        temperature: what the cosines are divided by; the loss is not multiplied by its square.
        pooling: what a sentence's embedding is: the mean of the last hidden states of its real tokens, or the first.
    """

    temperature: float = 0.05
    pooling: Literal["mean", "first"] = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"'temperature' = {self.temperature} is not a positive number")


class Contrastive(Distiller):
    """The cross entropy of finding the teacher's embedding of the same sentence among those of the micro-batch.

    ``-log softmax_j(cos(student_i, teacher_j) / temperature)`` at j = i (Tian et al. 2020, arXiv:1910.10699; InfoNCE,
    van den Oord et al. 2018). A sentence alone in its micro-batch teaches nothing, and accumulated micro-batches are
    not one large batch. Where the widths differ, a learned projection takes the student's states to the teacher's.
    """

    Config = Options
    config: Options
    needs = frozenset({Need.HIDDEN_STATES})
    contrasts = True

    def prepare(self, student: nn.Module, teacher: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """One projection, (teacher width, student width), where it is needed."""
        return projection("contrastive", student, teacher, generator)

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,): the samples; where tokens are counted, each has the value of its sample."""
        ((ours, theirs),) = paired("contrastive", "hidden_states", student, teacher, "last", first=0)
        if len(ours) == 1 and not torch.compiler.is_compiling():
            warnings.warn("contrastive: a micro-batch of one sample teaches nothing; make them larger", stacklevel=2)
        embeddings = self._embedding(projected(ours, learned), batch)
        cosines = embeddings @ self._embedding(theirs, batch).t()
        right = torch.arange(len(cosines), device=cosines.device)
        values = F.cross_entropy(cosines / self.config.temperature, right, reduction="none")
        return batch.items(values[:, None].expand(ours.shape[:2]))

    def _embedding(self, states: Tensor, batch: Batch) -> Tensor:
        """Unit vectors, (samples, width), float32."""
        states, mask = states.float(), batch.mask(states.shape[:2])
        if self.config.pooling == "first":
            pooled = (
                states[:, 0]
                if mask is None
                else states.take_along_dim(mask.int().argmax(dim=1)[:, None, None], 1)[:, 0]
            )
        elif mask is None:
            pooled = states.mean(dim=1)
        else:
            pooled = (states * mask[:, :, None]).sum(dim=1)  # the length does not matter
        return F.normalize(pooled, dim=-1)
