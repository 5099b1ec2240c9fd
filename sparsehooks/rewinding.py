"""Rewinding: the weights of an earlier step, for the lottery ticket (Frankle and Carbin 2019, arXiv:1803.03635)."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from sparsehooks.sharding import write
from sparsehooks.teachers import keep_start, read_start


class Snapshot:
    """The weights and buffers of a step.

    Args:
        folder: where it is kept for resuming; None keeps it in memory only.
        fingerprint: of the one that a resumed run had made already.
    """

    def __init__(self, model: nn.Module, folder: Path | None, fingerprint: str | None = None) -> None:
        if fingerprint is not None:
            self._state = dict(read_start(model, folder, fingerprint).state_dict())
        else:
            self._state = copy.deepcopy(model.state_dict())
            fingerprint = keep_start(model, folder)
        self.fingerprint = fingerprint

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go back to these weights, with an optimizer that has seen nothing yet."""
        for name, tensor in model.state_dict().items():
            write(tensor, self._state[name])
        optimizer.state.clear()
