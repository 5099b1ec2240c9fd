"""Optimal brain surgeon with an empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsehooks import Criterion, Need, WeightView


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
        if self.samples < 1 or self.block < 1 or self.damping <= 0:
            raise ValueError("'samples', 'block' and 'damping' must be positive")


class Obs(Criterion):
    """The loss that a weight's removal costs to second order (Kurtic et al. 2022, arXiv:2203.07259, equations 3 and 7).

    The inverse of the block-diagonal empirical Fisher matrix is kept by rank-one updates (Woodbury); it holds
    ``block`` numbers a weight.
    """

    Config = Options
    config: Options
    needs = frozenset({Need.GRADIENT})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.samples = self.config.samples
        self._inverse: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def collect(self, view: WeightView) -> None:
        """``F^-1 <- F^-1 - (F^-1 g)(F^-1 g)^T / (m + g^T F^-1 g)`` for each block."""
        assert view.gradient is not None
        gradient = self._blocks(view.gradient)
        inverse = self._inverse.get(view.name)
        if inverse is None or view.name in self._used:  # each update sees gradients of its own
            self._used.discard(view.name)
            eye = torch.eye(gradient.shape[1], device=gradient.device) / self.config.damping
            inverse = eye.repeat(len(gradient), 1, 1)
        moved = torch.einsum("bij,bj->bi", inverse, gradient)
        scale = self.samples + torch.einsum("bi,bi->b", gradient, moved)
        self._inverse[view.name] = inverse - torch.einsum("bi,bj->bij", moved, moved / scale[:, None])

    def score(self, view: WeightView) -> Tensor:
        """``w^2 / (2 (F^-1)_qq)``."""
        inverse = self._inverse.get(view.name)
        if inverse is None:
            return view.weight.float().square()
        self._used.add(view.name)
        diagonal = inverse.diagonal(dim1=1, dim2=2).flatten()[: view.weight.numel()].reshape(view.weight.shape)
        return view.weight.float().square() / (2 * diagonal.clamp(min=torch.finfo(torch.float32).tiny))

    def state_dict(self) -> dict[str, Tensor]:
        """The inverses that no update has used yet."""
        return {name: inverse for name, inverse in self._inverse.items() if name not in self._used}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self._inverse = dict(state)

    def _blocks(self, matrix: Tensor) -> Tensor:
        flat = matrix.flatten().float()
        size = min(self.config.block, flat.numel())
        return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)
