"""Blocks, rows and columns: a matrix cut into equal tiles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsehooks import Pattern


class Tiles(Pattern):
    """A unit is a tile of the matrix; its score is the mean over its weights that are still there."""

    @abstractmethod
    def tile(self, shape: Sequence[int]) -> tuple[int, int]:
        """The height and width of a tile in a matrix of this shape."""

    def check(self, shape: Sequence[int]) -> str | None:
        """The tiles must fill the matrix."""
        height, width = self.tile(shape)
        if shape[0] % height or shape[1] % width:
            return f"its shape {shape[0]} x {shape[1]} does not divide into tiles of {height} x {width}"
        return None

    def units(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Shape (rows / height, columns / width)."""
        units = {}
        for name, score in scores.items():
            height, width = self.tile(score.shape)
            rows, columns = score.shape
            tiles = score.reshape(rows // height, height, columns // width, width).transpose(1, 2)
            here = tiles != float("-inf")  # what went in an earlier run scores minus infinity
            # bfloat16 would make most means equal
            total = torch.where(here, tiles, 0).to(torch.promote_types(score.dtype, torch.float32)).sum(dim=(2, 3))
            count = here.sum(dim=(2, 3))
            units[name] = torch.where(count > 0, total / count, float("-inf"))
        return units

    def expand(self, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each unit's tile."""
        return self.spread(keep, scores)

    def spread(self, values: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The value of each weight's tile."""
        spread = {}
        for name, score in scores.items():
            height, width = self.tile(score.shape)
            spread[name] = values[name].repeat_interleave(height, 0).repeat_interleave(width, 1)
        return spread


@dataclass(frozen=True)
class BlockOptions:
    """The options of blocks.

    Attributes:
        height: output features of a block.
        width: input features of a block.
    """

    height: int = 1
    width: int = 4

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a block of {self.height} x {self.width} is empty")


class Block(Tiles):
    """Rectangular blocks (Gray et al. 2017; Lagunas et al. 2021, arXiv:2109.04838)."""

    Config = BlockOptions
    config: BlockOptions

    def tile(self, shape: Sequence[int]) -> tuple[int, int]:
        """As the options say."""
        return self.config.height, self.config.width


class Row(Tiles):
    """Whole rows: all weights of an output neuron."""

    def tile(self, shape: Sequence[int]) -> tuple[int, int]:
        """One row."""
        return 1, shape[1]


class Column(Tiles):
    """Whole columns: all weights of an input feature."""

    def tile(self, shape: Sequence[int]) -> tuple[int, int]:
        """One column."""
        return shape[0], 1
