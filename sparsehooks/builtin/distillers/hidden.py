"""Hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsehooks import Batch, Distiller, Need, SessionError
from sparsehooks.builtin.distillers.layers import check_layers, paired


@dataclass(frozen=True)
class Options:
    """The options of hidden.

    Attributes:
        layers: which learn from which: ``"all"``, ``"last"``, ``"uniform"`` (layer i of Ls from layer i * Lt / Ls) or
            pairs ``[[student, teacher], ...]``. 0 is the embeddings' output, which all but ``"last"`` and pairs take
            along; the losses are averaged.
    """

    layers: str | tuple[tuple[int, ...], ...] = "all"

    def __post_init__(self) -> None:
        check_layers(self.layers, first=0)


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
        return projection("hidden", student, teacher, generator)

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,): the mean over width and layers of the squared difference."""
        pairs = paired("hidden", "hidden_states", student, teacher, self.config.layers, first=0)
        errors = [(projected(state, learned) - goal).float().square().mean(dim=-1) for state, goal in pairs]
        return batch.items(torch.stack(errors).mean(dim=0))


class Cosine(Distiller):
    """``1 - cos`` of the angle between the last hidden states (Sanh et al. 2019, DistilBERT, arXiv:1910.01108).

    Where the widths differ, a learned projection takes the student's states to the teacher's width, as in hidden.
    """

    needs = frozenset({Need.HIDDEN_STATES})

    def prepare(self, student: nn.Module, teacher: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """One projection, (teacher width, student width), where it is needed."""
        return projection("cosine", student, teacher, generator)

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,), in [0, 2]."""
        ((state, goal),) = paired("cosine", "hidden_states", student, teacher, "last", first=0)
        return batch.items(1 - F.cosine_similarity(projected(state, learned).float(), goal.float(), dim=-1))


def projection(name: str, student: nn.Module, teacher: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """What a loss over hidden states learns: one matrix, (teacher width, student width), where these differ."""
    ours, theirs = _width(name, student), _width(name, teacher)
    return {} if ours == theirs else {"projection": torch.randn(theirs, ours, generator=generator) / ours**0.5}


def projected(states: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
    """The student's states, (..., width), in the teacher's width."""
    return states @ learned["projection"].to(states.dtype).t() if learned else states


def _width(name: str, model: nn.Module) -> int:
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if width is None:
        raise SessionError(f"{name}: {type(model).__name__} has no config.hidden_size to know its width by")
    return int(width)
