"""Optimal brain surgeon with an empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsehooks import Criterion, Need, WeightView

CHUNK = 4096
"""Blocks that are inverted at once."""


@dataclass(frozen=True)
class Options:
    """The options of OBS.

    Attributes:
        samples: gradients that are seen before each update.
        block: weights of a diagonal block of the Fisher matrix.
        damping: what is added to its diagonal.
    """

    samples: int = 64
    block: int = 50
    damping: float = 1e-7

    def __post_init__(self) -> None:
        for name in ("samples", "block", "damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"'{name}' = {getattr(self, name)} is not positive")


class Obs(Criterion):
    """The loss that a weight's removal costs to second order (Kurtic et al. 2022, arXiv:2203.07259, equations 3 and 7).

    The blocks of the empirical Fisher matrix are summed up, ``block`` float32 numbers a weight, and inverted in float64
    when they are used: the rank-one updates of the inverse in the paper lose their digits in float32.
    """

    Config = Options
    config: Options
    needs = frozenset({Need.GRADIENT})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.samples = self.config.samples
        self._fisher: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def collect(self, view: WeightView) -> None:
        """``F <- F + g g^T / m`` for each block."""
        assert view.gradient is not None
        gradient = self._blocks(view.gradient)
        added = torch.einsum("bi,bj->bij", gradient, gradient / self.samples)
        if view.name in self._fisher and view.name not in self._used:
            self._fisher[view.name] = self._fisher[view.name].to(added.device).add_(added)
        else:  # each update sees gradients of its own
            self._fisher[view.name] = added
            self._used.discard(view.name)

    def score(self, view: WeightView) -> Tensor:
        """``w^2 / (2 (F^-1)_qq)``."""
        fisher = self._fisher[view.name].to(view.weight.device)
        self._used.add(view.name)
        diagonals = []
        for part in fisher.split(CHUNK):
            block = part.double()
            # of fewer gradients than weights the sum is singular, and its float32 rounding may exceed the damping
            rounding = torch.finfo(torch.float32).eps * block.diagonal(dim1=1, dim2=2).sum(dim=1)
            block.diagonal(dim1=1, dim2=2).add_(self.config.damping + rounding[:, None])
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(block))
            diagonals.append(inverse.diagonal(dim1=1, dim2=2))
        diagonal = torch.cat(diagonals).flatten()[: view.weight.numel()].reshape(view.weight.shape)
        return (view.weight.double().square() / (2 * diagonal)).float()

    def state_dict(self) -> dict[str, Tensor]:
        """The matrices that no update has used yet."""
        return {name: fisher for name, fisher in self._fisher.items() if name not in self._used}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self._fisher = {name: fisher.clone() for name, fisher in state.items()}
        self._used.clear()

    def _blocks(self, matrix: Tensor) -> Tensor:
        flat = matrix.flatten().float()
        size = min(self.config.block, flat.numel())
        return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)
