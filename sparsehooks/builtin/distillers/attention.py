"""Attention maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsehooks import Batch, Distiller, Need, SessionError
from sparsehooks.builtin.distillers.layers import check_layers, paired


@dataclass(frozen=True)
class Options:
    """The options of attention.

    Attributes:
        compare: ``"scores"``, what enters the softmax, as TinyBERT does; or ``"maps"``, the probabilities.
        layers: which learn from which: ``"all"``, ``"last"``, ``"uniform"`` (layer i of Ls from layer i * Lt / Ls) or
            pairs ``[[student, teacher], ...]``, counted from 1; the losses are averaged.
    """

    compare: Literal["scores", "maps"] = "scores"
    layers: str | tuple[tuple[int, ...], ...] = "all"

    def __post_init__(self) -> None:
        check_layers(self.layers, first=1)


class Attention(Distiller):
    """The mean squared error of the attention of each head (Jiao et al. 2020, TinyBERT, arXiv:1909.10351, equation 7).

    Models return probabilities. Their logarithms are the scores but for one number a query, which the softmax takes
    out anyway: each query's scores are compared after their mean is subtracted. Keys that are padding do not count, nor
    those of no probability (the future of a causal model, what underflows, what the student's dropout took; kept
    entries carry its factor, which the mean takes out of scores but not out of maps). Student and teacher need as many
    heads; if they have not, use relation.
    """

    Config = Options
    config: Options
    needs = frozenset({Need.ATTENTIONS})

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,): the mean over keys, heads and layers of the squared difference."""
        pairs = paired("attention", "attentions", student, teacher, self.config.layers, first=1)
        errors = [self._error(ours.float(), theirs.float(), batch) for ours, theirs in pairs]
        return batch.items(torch.stack(errors).mean(dim=0))

    def _error(self, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        """Of two maps, (samples, heads, queries, keys), for each query: (samples, queries)."""
        if ours.shape != theirs.shape:
            raise SessionError(
                f"attention needs maps of one shape (samples, heads, queries, keys), got {tuple(ours.shape)} from the "
                f"student and {tuple(theirs.shape)} from the teacher; use relation"
            )
        counts = (ours > 0) & (theirs > 0)
        mask = batch.mask((len(ours), ours.shape[-1]))
        if mask is not None:
            counts &= mask[:, None, None, :]
        keys = counts.sum(dim=-1, keepdim=True).clamp(min=1)
        if self.config.compare == "scores":
            ours, theirs = (_scores(maps, counts, keys) for maps in (ours, theirs))
        errors = (ours - theirs).masked_fill(~counts, 0).square().sum(dim=-1, keepdim=True) / keys
        return errors.squeeze(-1).mean(dim=1)


def _scores(maps: Tensor, counts: Tensor, keys: Tensor) -> Tensor:
    """What has entered the softmax, with mean zero over the keys that count."""
    scores = maps.masked_fill(~counts, 1).log()
    return scores - scores.sum(dim=-1, keepdim=True) / keys
