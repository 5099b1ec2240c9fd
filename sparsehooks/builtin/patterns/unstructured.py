"""Unstructured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsehooks import Pattern


@dataclass(frozen=True)
class Options:
    """The option of unstructured pruning.

    Attributes:
        per: within what weights are compared: a layer (or all, as the allocation says), or each row for itself, so that
            every row keeps the same number.
    """

    per: Literal["layer", "row"] = "layer"


class Unstructured(Pattern):
    """Every weight is a unit of its own."""

    Config = Options
    config: Options

    def check(self, shape: Sequence[int]) -> str | None:
        """Any matrix."""
        return None

    def units(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The scores themselves, or their ranks within their row: float32, the largest 0, then -1, -2, ..."""
        if self.config.per == "layer":
            return scores
        return {name: _ranks(score) for name, score in scores.items()}

    def expand(self, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The units are the weights."""
        return keep

    def spread(self, values: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The units are the weights; ranks say nothing of their values."""
        if self.config.per == "row":
            raise NotImplementedError
        return values


def _ranks(score: Tensor) -> Tensor:
    order = score.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.empty(score.shape, dtype=torch.float32, device=score.device)
    places = -torch.arange(score.shape[1], dtype=torch.float32, device=score.device)
    ranks.scatter_(1, order, places.expand_as(ranks))
    return ranks.masked_fill(score == float("-inf"), float("-inf"))
