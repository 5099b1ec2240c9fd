"""N:M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsehooks import Pattern, Target, permute_channels


@dataclass(frozen=True)
class Options:
    """The options of N:M.

    Attributes:
        n: how many weights of a group stay.
        m: how many consecutive weights of a row, along the input features, form a group.
        permute: whether the channels between two layers are first put in the order that keeps most, for M up to 4. The
            model computes the same.
        transposable: whether the columns are N:M too, along the output features, so that the backward product of a
            layer that trains is as sparse as the forward one. This keeps less.
    """

    n: int = 2
    m: int = 4
    permute: bool = False
    transposable: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"the pattern {self.n}:{self.m} must keep at least one weight of a group and drop one")
        if self.permute and self.m > 4:
            raise ValueError(f"'permute' would try all ways to share {2 * self.m} columns out; it takes groups up to 4")
        if self.permute and self.transposable:
            raise ValueError("'permute' looks for what keeps most along rows alone; leave it or 'transposable' out")


class NOfM(Pattern):
    """N of every M consecutive weights of a row stay (Mishra et al. 2021, arXiv:2104.08378).

    A unit is a group. A ramp masks the groups that lose least first, each of them to N at once; when it ends, every
    group has N. With ``transposable``, a unit is a tile of M x M, with N in each of its rows and columns (Hubara et al.
    2021, arXiv:2102.08124, their greedy algorithm).
    """

    Config = Options
    config: Options

    def check(self, shape: Sequence[int]) -> str | None:
        """Rows must divide into groups; if they are transposable, columns too."""
        if shape[1] % self.config.m:
            return f"its {shape[1]} input features do not divide by {self.config.m}"
        if self.config.transposable and shape[0] % self.config.m:
            return f"its {shape[0]} output features do not divide by {self.config.m}"
        return None

    def arrange(self, model: nn.Module, targets: Sequence[Target], seed: int) -> None:
        """Reorder the channels, if the options say so."""
        if self.config.permute:
            permute_channels(model, targets, self.config.n, self.config.m, seed)

    def share(self) -> float:
        """(M - N) / M."""
        return 1 - self.config.n / self.config.m

    def units(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a unit loses: the sum of what goes; shape (rows, columns / M), of tiles (rows / M, columns / M)."""
        units = {}
        for name, score in scores.items():
            parts = self._parts(score)
            wide = torch.promote_types(score.dtype, torch.float32)  # bfloat16 would make many sums equal
            lost = parts.masked_fill(self._kept(parts), float("-inf")).to(wide)
            here = lost != float("-inf")  # what went in an earlier run loses nothing more
            units[name] = torch.where(here.any(dim=-1), torch.where(here, lost, 0).sum(dim=-1), float("-inf"))
        return units

    def expand(self, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All of a unit that stays whole, the largest of the others; of equal scores the first ones."""
        masks = {}
        for name, score in scores.items():
            mask = self._kept(self._parts(score)) | keep[name].unsqueeze(-1)
            if self.config.transposable:
                mask = mask.unflatten(-1, (self.config.m, self.config.m)).transpose(1, 2)
            masks[name] = mask.reshape(score.shape)
        return masks

    def _parts(self, score: Tensor) -> Tensor:
        """The scores of each unit; shape (rows, columns / M, M), of tiles (rows / M, columns / M, M * M)."""
        parts = score.reshape(score.shape[0], -1, self.config.m)
        return parts.unflatten(0, (-1, self.config.m)).transpose(1, 2).flatten(2) if self.config.transposable else parts

    def _kept(self, parts: Tensor) -> Tensor:
        """What stays of units that do not stay whole."""
        order = parts.sort(dim=-1, descending=True, stable=True).indices
        if self.config.transposable:
            return _both_ways(parts.flatten(0, 1), order.flatten(0, 1), self.config.n, self.config.m).view(parts.shape)
        return torch.zeros_like(parts, dtype=torch.bool).scatter_(-1, order[..., : self.config.n], value=True)


def _both_ways(scores: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """What stays of tiles of M x M, N of each row and column: taken in order, while there is room for it.

    That can leave a row and a column short that meet in a weight that is taken. One of the others then gives way to the
    two that share its row or column with them: the exchange that gains most.

    Args:
        scores: shape (tiles, M * M).
        order: of each tile, from the largest score to the smallest.
        n: how many stay.
        m: the height and width of a tile.
    """
    each = torch.arange(len(scores), device=scores.device)
    kept = torch.zeros(len(scores), m, m, dtype=torch.bool, device=scores.device)
    for place in order.unbind(dim=1):
        row, column = place // m, place % m
        kept[each, row, column] = (kept[each, row].sum(dim=1) < n) & (kept[each, :, column].sum(dim=1) < n)
    while len(short := (kept.sum(dim=(1, 2)) < n * m).nonzero().flatten()):
        row = (kept[short].sum(dim=2) < n).byte().argmax(dim=1)
        column = (kept[short].sum(dim=1) < n).byte().argmax(dim=1)
        in_row, in_column = kept[short, row].unsqueeze(1), kept[short, :, column].unsqueeze(2)
        values = scores[short].to(torch.promote_types(scores.dtype, torch.float32)).view(-1, m, m)
        values = values.clamp(min=torch.finfo(values.dtype).min / 4)  # what went before has minus infinity
        places = torch.arange(len(short), device=scores.device)
        gain = values[places, row].unsqueeze(1) + values[places, :, column].unsqueeze(2) - values
        gain = gain.masked_fill(~kept[short] | in_row | in_column, float("-inf"))
        best = gain.flatten(1).argmax(dim=1)
        kept[short, best // m, best % m] = False
        kept[short, row, best % m] = True
        kept[short, best // m, column] = True
    return kept
