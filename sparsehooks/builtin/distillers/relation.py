"""Relations between queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsehooks import Batch, Distiller, Need, SessionError
from sparsehooks.builtin.distillers.divergence import divergence, hide
from sparsehooks.builtin.distillers.layers import check_layers, paired

PARTS = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class Options:
    """The options of relation.

    Attributes:
        relations: what is related with what, two of the letters q, k and v each. MiniLM v2 takes qq, kk and vv, v1 the
            attention itself and the values: qk and vv.
        heads: into how many relation heads student and teacher are cut; it divides both widths.
        layers: which learn from which: ``"last"``, ``"all"``, ``"uniform"`` (layer i of Ls from layer i * Lt / Ls) or
            pairs ``[[student, teacher], ...]``, counted from 1; the losses are averaged.
    """

    relations: tuple[str, ...] = ("qq", "kk", "vv")
    heads: int = 16
    layers: str | tuple[tuple[int, ...], ...] = "last"

    def __post_init__(self) -> None:
        check_layers(self.layers, first=1)
        if self.heads < 1:
            raise ValueError(f"'heads' = {self.heads} is not a number of at least 1")
        known = [one + other for one in PARTS for other in PARTS]
        if not self.relations or not set(self.relations) <= set(known):
            raise ValueError(f"'relations' = {list(self.relations)} is no list of {', '.join(known)}")


class Relation(Distiller):
    """``KL(teacher || student)`` of scaled dot products between tokens (Wang et al. 2020 and 2021, MiniLM).

    The relation of queries is ``softmax(Q Q^T / sqrt(d))`` over the real tokens, d the size of a relation head; those
    of keys and values likewise (MiniLM v2, arXiv:2012.15828, equations 4 to 6; v1, arXiv:2002.10957). Neither width
    nor head count need match, and a rotation of the features of a head changes nothing. Queries and keys are compared
    as their layers give them, before positions are rotated into them. There is no temperature.
    """

    Config = Options
    config: Options
    needs = frozenset({Need.PROJECTIONS})

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,): the mean over relation heads, relations and layers."""
        errors = []
        for relation in self.config.relations:
            first, second = (
                paired("relation", PARTS[part], student, teacher, self.config.layers, first=1) for part in relation
            )
            for (ours, theirs), (our_keys, their_keys) in zip(first, second, strict=True):
                goal = self._relation("teacher", theirs, their_keys, batch)
                found = self._relation("student", ours, our_keys, batch)
                errors.append(divergence(goal, found).mean(dim=1))
        return batch.items(torch.stack(errors).mean(dim=0))

    def _relation(self, whose: str, queries: Tensor, keys: Tensor, batch: Batch) -> Tensor:
        """Log probabilities, (samples, heads, tokens, tokens), of two tensors (samples, tokens, width)."""
        heads, width, mask = self.config.heads, queries.shape[-1], batch.mask(queries.shape[:2])
        if width % heads or keys.shape[-1] != width:
            raise SessionError(
                f"relation: 'heads' = {heads} does not cut the {whose}'s {width} and {keys.shape[-1]} features into as "
                "many equal parts; name a common divisor of all widths, and no qk where queries share keys"
            )
        queries, keys = (part.float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys))
        scores = queries @ keys.transpose(-1, -2) / (width // heads) ** 0.5
        return (scores if mask is None else hide(scores, ~mask[:, None, None, :])).log_softmax(-1)
