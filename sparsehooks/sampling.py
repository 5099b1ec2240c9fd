"""The magnitudes of activations, and the thresholds that they give."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsehooks import distributed
from sparsehooks.errors import SessionError
from sparsehooks.padding import Padding, without_padding

LIMIT = 1 << 20
"""How many values of a layer a threshold is fitted to; of more, a random part counts."""
GRID = 1024
"""In how many steps the schedule's share is told apart."""


@dataclass
class Recorder:
    """What the layers have to know of the batch that runs.

    Attributes:
        on: whether values are collected.
        padding: of the batch that runs.
    """

    on: bool = False
    padding: Padding = field(default_factory=Padding)


class Sample:
    """The magnitudes that have passed a layer.

    Args:
        name: of the module, for messages.
        recorder: tells what to collect.
    """

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name = name
        self._recorder = recorder
        self._parts: list[Tensor] = []
        self._peaks: list[Tensor] = []
        self._rate = 1.0
        self._generator = torch.Generator().manual_seed(distributed.seed_of(name))

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Collect the magnitudes of a batch, without padding.

        Raises:
            SessionError: if they are not finite.
        """
        if not self._recorder.on:
            return
        magnitudes = without_padding(values.detach(), self._recorder.padding.of(self.name)).abs().flatten()
        if not bool(magnitudes.isfinite().all()):
            raise SessionError(f"the activations of '{self.name}' are not finite; look at the data, or exclude it")
        if magnitudes.numel():
            self._peaks.append(magnitudes.max().float())
        self._parts.append(self._thin(magnitudes, self._rate))
        while self._rate > 2**-40 and sum(part.numel() for part in self._parts) > LIMIT:
            self._rate /= 2
            self._parts = [self._thin(torch.cat(self._parts), 0.5)]

    def table(self, sparsity: float) -> Tensor:
        """The thresholds at the shares 0, 1/GRID, ..., 1 of the sparsity: order statistics, -1 where nothing goes.

        Raises:
            SessionError: if nothing was collected.
        """
        ordered, _ = self.seen()
        counts = [round(sparsity * share / GRID * ordered.numel()) for share in range(GRID + 1)]
        picked = ordered[torch.tensor([max(count - 1, 0) for count in counts], device=ordered.device)].double()
        table = torch.where(torch.tensor(counts, device=picked.device) > 0, picked, -1.0)
        distributed.average(table)
        return table.cpu()

    def seen(self) -> tuple[Tensor, Tensor]:
        """The magnitudes in ascending order (a random part of very many), and the largest of each batch.

        Raises:
            SessionError: if nothing was collected.
        """
        ordered = torch.cat(self._parts).sort().values if self._parts else torch.empty(0)
        if not ordered.numel():
            raise SessionError(f"nothing has passed '{self.name}' yet; give calibration batches, or exclude it")
        return ordered, torch.stack(self._peaks)

    def _thin(self, values: Tensor, rate: float) -> Tensor:
        if rate == 1.0:
            return values
        return values[(torch.rand(values.numel(), generator=self._generator) < rate).to(values.device)]
