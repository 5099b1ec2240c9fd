"""Hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsehooks import Batch, Distiller, Need, SessionError


@dataclass(frozen=True)
class Options:
    """The options of hidden.

    Attributes:
        layers: ``"all"`` compares the embeddings' output and that of every layer, and averages; ``"last"`` the last.
    """

    layers: Literal["all", "last"] = "all"


class Hidden(Distiller):
    """The mean squared error of hidden states (Romero et al. 2015; Jiao et al. 2020, arXiv:1909.10351).

    Where the widths differ, a learned projection takes the student's states to the teacher's width; it is dropped
    when the model is saved.
    """

    Config = Options
    config: Options
    needs = frozenset({Need.HIDDEN_STATES})

    def prepare(self, student: nn.Module, teacher: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """One projection, (teacher width, student width), where it is needed."""
        ours, theirs = _width(student), _width(teacher)
        if ours == theirs:
            return {}
        return {"projection": torch.randn(theirs, ours, generator=generator) / ours**0.5}

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,): the mean over width and layers of the squared difference."""
        ours, theirs = student.get("hidden_states"), teacher.get("hidden_states")
        if ours is None or theirs is None:
            raise SessionError("hidden: the model or its teacher returns no hidden_states (encoder-decoders do not)")
        if self.config.layers == "last":
            ours, theirs = ours[-1:], theirs[-1:]
        if len(ours) != len(theirs):
            raise SessionError(
                f"hidden: the student has {len(ours) - 1} layers and the teacher {len(theirs) - 1}; "
                'use { use = "hidden", layers = "last" }'
            )
        if learned:
            ours = [state @ learned["projection"].to(state.dtype).t() for state in ours]
        errors = [(state - goal).float().square().mean(dim=-1) for state, goal in zip(ours, theirs, strict=True)]
        return batch.items(torch.stack(errors).mean(dim=0))


def _width(model: nn.Module) -> int:
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if width is None:
        raise SessionError(f"hidden: {type(model).__name__} has no config.hidden_size to know its width by")
    return int(width)
