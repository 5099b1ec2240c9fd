"""N:M."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsehooks import Pattern, Target, permute_channels

TILES = 1 << 14
"""How many tiles are compared with all masks at once: for 2:4, 12 MB of sums."""


@dataclass(frozen=True)
class Options:
    """The options of N:M.

    Attributes:
        n: how many weights of a group stay.
        m: how many consecutive weights of a row, along the input features, form a group.
        permute: whether the channels between two layers are first put in the order that keeps most, for M up to 4. The
            model computes the same.
        transposable: whether the columns are N:M too, along the output features, so that the backward product of a
            layer that trains is as sparse as the forward one, for M up to 4. This keeps less.
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
        if self.transposable and self.m > 4:
            raise ValueError(f"'transposable' tries all masks of {self.m} x {self.m} weights; it takes groups up to 4")
        if self.permute and self.transposable:
            raise ValueError("'permute' looks for what keeps most along rows alone; leave it or 'transposable' out")


class NOfM(Pattern):
    """N of every M consecutive weights of a row stay (Mishra et al. 2021, arXiv:2104.08378).

    A unit is a group. A ramp masks the groups that lose least first, each of them to N at once; when it ends, every
    group has N. With ``transposable``, a unit is a tile of M x M, with N in each of its rows and columns (Hubara et al.
    2021, arXiv:2102.08124); of all such masks, it gets the one that keeps most.
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
        if self.config.transposable:
            masks = _both_ways(self.config.n, self.config.m).to(parts.device)
            best = [_best(tiles, masks) for tiles in parts.flatten(0, 1).split(TILES)]
            return masks[torch.cat(best)].view(parts.shape)
        order = parts.sort(dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(parts, dtype=torch.bool).scatter_(-1, order[..., : self.config.n], value=True)


@functools.cache
def _both_ways(n: int, m: int) -> Tensor:
    """All masks of M x M with N in each row and column; shape (masks, M * M), in order of what they keep."""
    rows = [[place in kept for place in range(m)] for kept in itertools.combinations(range(m), n)]
    tiles = itertools.product(rows, repeat=m)
    fitting = [tile for tile in tiles if all(sum(column) == n for column in zip(*tile, strict=True))]
    return torch.tensor(fitting, device="cpu").flatten(1)


def _best(tiles: Tensor, masks: Tensor) -> Tensor:
    """Of each tile the mask with the largest sum, of equal ones the first; shape (tiles,).

    What went in an earlier run has minus infinity: first of all, as little of it as can be comes back.
    """
    gone = tiles == float("-inf")
    over = masks.t().double()  # narrower, the sums would be rounded, the more so by TF32 and autocast
    sums = torch.where(gone, 0, tiles).double() @ over
    if gone.any():
        back = gone.double() @ over
        sums = sums.masked_fill(back > back.amin(dim=1, keepdim=True), float("-inf"))
    return sums.argmax(dim=1)
