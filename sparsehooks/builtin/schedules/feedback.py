"""A schedule that follows the model's own metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsehooks import Schedule, SessionError, Window


@dataclass(frozen=True)
class Options(Window):
    """The options of feedback; the evaluations say what ``every`` would.

    Attributes:
        metric: its name among the metrics of an evaluation, such as ``"eval_accuracy"``.
        drop: how far it may lie behind the first evaluation, in its own units.
        mode: whether the metric is better when it is larger ("max") or smaller ("min"); left out, "min" if its name
            ends with "loss" or "perplexity".
        raise_by: the share of the final sparsity that each evaluation within the drop adds at first.
    """

    metric: str = "eval_loss"
    drop: float = 0.01
    mode: Literal["max", "min"] | None = None
    raise_by: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every != 1:
            raise ValueError(f"'every' = {self.every} has no effect: the evaluations decide; leave it out")
        if not self.drop >= 0:
            raise ValueError(f"'drop' = {self.drop} is not 0 or more; say how far the metric may fall")
        if not 0.0 < self.raise_by <= 1.0:
            raise ValueError(f"'raise_by' = {self.raise_by} is outside (0, 1]")

    def larger_is_better(self) -> bool:
        """As ``mode`` says, or the name."""
        return self.mode == "max" if self.mode else not self.metric.endswith(("loss", "perplexity"))


SMALLEST = 0.005
"""Raises below this share are not worth a step back: the sparsity holds."""


class Feedback(Schedule):
    """Sparsity rises while the metric stays within the drop; else the last raise is undone and the next one halved.

    The first evaluation of the window, of the model as it is, is what the others are compared with: evaluate before
    the first step or early. The final sparsity is what the metric allows, and at most the stage's.
    """

    Config = Options
    config: Options
    adaptive = True

    def __init__(self, config: Options | None = None) -> None:
        super().__init__(config)
        self._share = self._applied = self._before = 0.0
        self._raise = self.config.raise_by
        self._reference: float | None = None

    def sparsity(self, progress: float) -> float:
        """The share that the metric has allowed so far."""
        return self._share

    def at(self, step: int, total_steps: int) -> float:
        """The same at any step."""
        return self._share

    def due(self, step: int, total_steps: int) -> bool:
        """After an evaluation that changed the share."""
        first, last = self.window(total_steps)
        return first <= step <= last and self._share != self._applied

    def acted(self) -> None:
        """What was decided last is in force."""
        self._before, self._applied = self._applied, self._share

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Raise, or step back."""
        if self.config.metric not in metrics:
            raise SessionError(
                f"the schedule 'feedback' follows '{self.config.metric}', and the evaluation gives "
                f"{', '.join(metrics) or 'nothing'}; set 'metric' to one of them"
            )
        if not math.isfinite(metrics[self.config.metric]):
            raise SessionError(f"'{self.config.metric}' is {metrics[self.config.metric]}; look at the evaluation")
        value = metrics[self.config.metric] * (1 if self.config.larger_is_better() else -1)
        if self._reference is None:
            self._reference = value
        if self._share != self._applied:
            return  # what was decided last has not been tried yet
        if value >= self._reference - self.config.drop:
            if self._raise >= SMALLEST:
                self._share = min(1.0, self._applied + self._raise)
        elif self._before < self._applied:
            self._share, self._raise = self._before, self._raise / 2

    def state_dict(self) -> dict[str, Tensor]:
        """The shares, the next raise and the reference."""
        reference = float("nan") if self._reference is None else self._reference
        numbers = [self._share, self._applied, self._before, self._raise, reference]
        return {"numbers": torch.tensor(numbers, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self._share, self._applied, self._before, self._raise, reference = state["numbers"].tolist()
        self._reference = None if reference != reference else reference  # noqa: PLR0124 - NaN stands for none
