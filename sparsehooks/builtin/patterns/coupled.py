"""Heads, channels and layers: slices of several matrices that go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from sparsehooks import Coupling, Member, Pattern, find_couplings

if TYPE_CHECKING:
    from sparsehooks import Target

GONE = float("-inf")


class Coupled(Pattern):
    """A unit's score is the mean over its weights, in all matrices that are targets, that are still there.

    Matrices of which nothing is part of a unit stay whole.
    """

    what: ClassVar[str]

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self.couplings: list[Coupling] = []
        self._shapes: dict[str, torch.Size] = {}
        self._coupled = False

    def couple(self, model: nn.Module, targets: Sequence[Target]) -> list[str]:
        """Find the slices."""
        scored = {target.parameter for target in targets}
        found, said = find_couplings(model, self.what)
        notes = [
            sentence for module, sentence in said if not module or any(name.startswith(f"{module}.") for name in scored)
        ]
        self._coupled = True
        self.couplings = []
        for coupling in found:
            weights = [member.parameter for member in coupling.weights]
            if not scored.intersection(weights):
                continue
            missing = self._missing(coupling, scored)
            if missing:
                notes.append(f"the {self.what}s of '{coupling.name}' stay whole: '{missing}' is not a target")
            else:
                self.couplings.append(coupling)
        along = {
            member.parameter for coupling in self.couplings for member in coupling.members if member.role == "vector"
        }
        self._shapes = {name: value.shape for name, value in model.named_parameters() if name in along}
        if not self.couplings and not notes:
            notes.append(f"{type(model).__name__} has no {self.what}s among its targets")
        return notes

    @staticmethod
    def _missing(coupling: Coupling, scored: set[str]) -> str | None:
        """The name of a weight without which no unit could go."""
        clauses = coupling.gone or ((tuple(coupling.weights),),)
        for alternatives in clauses:
            lacking = [
                [member.parameter for member in part if member.role == "weight" and member.parameter not in scored]
                for part in alternatives
            ]
            if all(lacking):
                return lacking[0][0]
        return None

    def check(self, shape: Sequence[int]) -> str | None:
        """Any matrix."""
        return None

    def _active(self, scores: Mapping[str, Tensor]) -> list[tuple[Coupling, list[Member]]]:
        if not self._coupled:  # without a model a matrix is a unit of its own
            wholes = {name: Member(name, 0, len(score)) for name, score in scores.items()}
            return [(Coupling(name, 1, (whole,), self.what), [whole]) for name, whole in wholes.items()]
        active = []
        for coupling in self.couplings:
            members = [member for member in coupling.weights if member.parameter in scores]
            if members:
                active.append((coupling, members))
        return active

    def units(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One vector a coupling, under its name."""
        units = {}
        for coupling, members in self._active(scores):
            total = count = torch.zeros(coupling.units, device=scores[members[0].parameter].device)
            for member in members:
                score = scores[member.parameter]
                wide = score.to(torch.promote_types(score.dtype, torch.float32))
                here = wide != GONE  # what went in an earlier run scores minus infinity
                total = total + member.sums(torch.where(here, wide, 0), coupling.units).to(total.device)
                count = count + member.sums(here.to(torch.float32), coupling.units).to(total.device)
            units[coupling.name] = torch.where(count > 0, total / count, GONE)
        return units

    def expand(self, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each unit's slices, and the elements of the biases and norms that go along."""
        masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        for coupling, members in self._active(scores):
            device = scores[members[0].parameter].device
            for member in coupling.members:
                name = member.parameter
                if member.role == "vector" and (not member.of or member.of in scores):
                    masks.setdefault(name, torch.ones(self._shapes[name], dtype=torch.bool, device=device))
                if name in masks:
                    member.narrow(masks[name], keep[coupling.name])
        return masks

    def spread(self, values: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mean of its units for a weight in two; matrices of which nothing is part of a unit are left out."""
        spread: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for coupling, members in self._active(scores):
            for member in members:
                name = member.parameter
                score, value = scores[name], values[coupling.name].to(scores[name].device)
                if name not in spread:
                    wide = torch.promote_types(value.dtype, torch.float32)
                    spread[name] = torch.zeros(score.shape, dtype=wide, device=score.device)
                    counts[name] = torch.zeros_like(spread[name])
                member.part(spread[name], coupling.units).add_(member.spread(value, score))
                member.part(counts[name], coupling.units).add_(1)
        return {name: spread[name] / counts[name] for name in scores if name in spread}


class Head(Coupled):
    """Attention heads; with grouped keys, all heads that share a key head."""

    what = "head"


class Channel(Coupled):
    """Channels: outputs of a layer together with what reads them."""

    what = "channel"


class Layer(Coupled):
    """Whole blocks.

    A masked block is zero, which only blocks of pre-norm models pass by unharmed (Llama, GPT-2, T5, ViT): there masking
    is the same as taking them out. In post-norm ones (BERT) what counts is the model after ``shrink``, which does so.
    """

    what = "layer"
