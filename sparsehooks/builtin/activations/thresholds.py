"""Thresholds below which activations become zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsehooks import Activation


@dataclass(frozen=True)
class Options:
    """The options of thresholds.

    Attributes:
        batches: on how many training batches they are calibrated, where no calibration batches are given.
    """

    batches: int = 8

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"'batches' must be at least 1, got {self.batches}")


class Threshold(Activation):
    """Values of ``|x| <= t`` become zero.

    ``t`` is the quantile of ``|x|`` over the calibration tokens, without padding, that gives the stage's sparsity. The
    gradient passes where a value stays.
    """

    Config = Options
    config: Options
    calibrated = "sparsity"

    def batches(self) -> int:
        """As the option says."""
        return self.config.batches

    def apply(self, values: Tensor, amount: float | Tensor, before: Tensor | None = None) -> Tensor:
        """The values with zeros; ``amount`` is the threshold."""
        return values.masked_fill(values.abs() <= amount, 0.0)


class TEAL(Threshold):
    """Of the inputs of each layer, those of ``|x| <= t`` become zero (arXiv:2408.14690)."""

    place = "input"


class CATS(Threshold):
    """Of the outputs of each activation function, those of ``|act(x)| <= t`` become zero (arXiv:2404.08763)."""

    place = "output"
