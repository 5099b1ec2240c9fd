"""Which layer of the student learns from which layer of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsehooks import SessionError

NAMED = ("all", "last", "uniform")

Layers = str | tuple[tuple[int, ...], ...]
"""``"all"``: each from the same; ``"last"``: the last from the last; ``"uniform"``: layer i of Ls from layer
``i * Lt / Ls`` of Lt; or pairs ``((student, teacher), ...)``. Layers count from 1; 0 is the embeddings' output."""


def check_layers(layers: Layers, first: int) -> None:
    """Refuse what is no mapping, with a ``ValueError``.

    Args:
        layers: the option.
        first: the lowest layer that there is.
    """
    if isinstance(layers, str):
        valid = layers in NAMED
    else:
        valid = bool(layers) and all(len(pair) == 2 and min(pair) >= first for pair in layers)
    if not valid:
        names = ", ".join(f"'{name}'" for name in NAMED)
        raise ValueError(
            f"'layers' = {layers!r} is none of {names}, nor pairs [[student, teacher], ...] of layers from {first} on"
        )


def paired(
    name: str, key: str, student: Mapping[str, Any], teacher: Mapping[str, Any], layers: Layers, first: int
) -> list[tuple[Tensor, Tensor]]:
    """What the layers of the student and of the teacher returned, in the pairs that ``layers`` asks for.

    Args:
        name: of the loss.
        key: in the outputs: a tuple with one tensor a layer.
        student: its output.
        teacher: its output.
        layers: the option.
        first: the layer of the first tensor.

    Raises:
        SessionError: if they are not there, or not as many as ``layers`` needs.
    """
    ours, theirs = _of_all_layers(name, key, student), _of_all_layers(name, key, teacher)
    own, other = len(ours) - 1 + first, len(theirs) - 1 + first
    there = f"{name}: the student has {own} layers and the teacher {other}"
    if isinstance(layers, tuple):
        chosen = [(pair[0], pair[1]) for pair in layers]
        if any(pair[0] > own or pair[1] > other for pair in chosen):
            raise SessionError(f"{there}; 'layers' = {[list(pair) for pair in chosen]} names one that is not there")
    elif layers == "last":
        chosen = [(own, other)]
    elif layers == "all" and own != other:
        raise SessionError(f'{there}; use layers = "last", "uniform", or pairs [[student, teacher], ...]')
    elif own != other and (own < 1 or other % own):
        raise SessionError(f'{there}, which do not divide; use layers = "last", or pairs [[student, teacher], ...]')
    else:
        chosen = [(layer, layer if own == other else layer * other // own) for layer in range(first, own + 1)]
    return [(ours[one - first], theirs[two - first]) for one, two in chosen]


def _of_all_layers(name: str, key: str, output: Mapping[str, Any]) -> Sequence[Tensor]:
    found: Sequence[Tensor] | None = output.get(key)
    if not found:
        raise SessionError(f"{name}: the model or its teacher returns no {key} (encoder-decoders do not)")
    return found
