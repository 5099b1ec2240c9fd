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
    """

    n: int = 2
    m: int = 4
    permute: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"the pattern {self.n}:{self.m} must keep at least one weight of a group and drop one")
        if self.permute and self.m > 4:
            raise ValueError(f"'permute' would try all ways to share {2 * self.m} columns out; it takes groups up to 4")


class NOfM(Pattern):
    """N of every M consecutive weights of a row stay (Mishra et al. 2021, arXiv:2104.08378).

    A unit is a group. A ramp masks the groups that lose least first, each of them to N at once; when it ends, every
    group has N.
    """

    Config = Options
    config: Options

    def check(self, shape: Sequence[int]) -> str | None:
        """Rows must divide into groups."""
        if shape[1] % self.config.m:
            return f"its {shape[1]} input features do not divide by {self.config.m}"
        return None

    def arrange(self, model: nn.Module, targets: Sequence[Target], seed: int) -> None:
        """Reorder the channels, if the options say so."""
        if self.config.permute:
            permute_channels(model, targets, self.config.n, self.config.m, seed)

    def share(self) -> float:
        """(M - N) / M."""
        return 1 - self.config.n / self.config.m

    def units(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a group loses: the sum of its M - N smallest scores; shape (rows, columns / M)."""
        lost = self.config.m - self.config.n
        units = {}
        for name, score in scores.items():
            wide = torch.promote_types(score.dtype, torch.float32)  # bfloat16 would make many sums equal
            smallest = self._sorted(score).values[..., :lost].to(wide)
            here = smallest != float("-inf")  # what went in an earlier run loses nothing more
            units[name] = torch.where(here.any(dim=-1), torch.where(here, smallest, 0).sum(dim=-1), float("-inf"))
        return units

    def expand(self, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All of a group that stays whole, the N largest of the others; of equal scores the first ones."""
        masks = {}
        for name, score in scores.items():
            ranked = self._sorted(score).indices
            mask = torch.ones_like(ranked, dtype=torch.bool)
            mask.scatter_(-1, ranked[..., : self.config.m - self.config.n], value=False)
            masks[name] = (mask | keep[name].unsqueeze(-1)).reshape(score.shape)
        return masks

    def _sorted(self, score: Tensor) -> torch.return_types.sort:
        groups = score.reshape(score.shape[0], -1, self.config.m)
        # descending and stable, read backwards: of equal scores the later ones come first, and go first
        order = groups.sort(dim=-1, descending=True, stable=True)
        return torch.return_types.sort((order.values.flip(-1), order.indices.flip(-1)))
