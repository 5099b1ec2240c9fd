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
        """The scores themselves."""
        return scores

    def select(self, units: Mapping[str, Tensor], counts: Mapping[str, int]) -> Mapping[str, Tensor]:
        """The largest of a matrix, or of each of its rows; what does not divide goes to the first rows."""
        if self.config.per == "layer":
            return super().select(units, counts)
        return {name: self._rows(unit, counts[name]) for name, unit in units.items()}

    def expand(self, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The units are the weights."""
        return keep

    def spread(self, values: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The units are the weights."""
        return values

    def _rows(self, score: Tensor, count: int) -> Tensor:
        each, more = divmod(count, len(score))
        left = (score != float("-inf")).sum(dim=1)
        if count and int(left.min()) < each + (more > 0):  # an earlier run took more of some rows than of others
            return super().select({"rows": _ranks(score)}, {"rows": count})["rows"]
        return torch.cat([_largest(score[:more], each + 1), _largest(score[more:], each)])


def _largest(score: Tensor, count: int) -> Tensor:
    """The mask of the ``count`` largest of each row, of equal ones the first."""
    if count == 0 or not len(score):
        return torch.zeros_like(score, dtype=torch.bool)
    least = score.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    mask = score >= least
    if int(mask.sum()) > count * len(score):
        equal = score == least
        mask ^= equal
        mask |= equal & (equal.cumsum(dim=1) <= count - mask.sum(dim=1, keepdim=True))
    return mask


def _ranks(score: Tensor) -> Tensor:
    """Places within a row: the largest 0, then -1, -2, ..."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.empty(score.shape, dtype=torch.float32, device=score.device)
    places = -torch.arange(score.shape[1], dtype=torch.float32, device=score.device)
    ranks.scatter_(1, order, places.expand_as(ranks))
    return ranks.masked_fill(score == float("-inf"), float("-inf"))
