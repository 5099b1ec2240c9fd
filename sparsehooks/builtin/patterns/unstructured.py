"""Unstructured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparsehooks import Pattern


class Unstructured(Pattern):
    """Every weight is a unit of its own."""

    def check(self, shape: Sequence[int]) -> str | None:
        """Any matrix."""
        return None

    def units(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The scores themselves."""
        return scores

    def expand(self, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The units are the weights."""
        return keep
