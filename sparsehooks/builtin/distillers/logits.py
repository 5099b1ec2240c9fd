"""Losses over logits. Each is multiplied by the squared temperature, so that its gradients keep their size."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsehooks import Batch, Distiller, SessionError
from sparsehooks.builtin.distillers.divergence import divergence, hide


@dataclass(frozen=True)
class Options:
    """The options of every loss over logits.

    Attributes:
        temperature: both distributions are softmax(logits / temperature); the loss is multiplied by its square.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"'temperature' = {self.temperature} is not a positive number")


@dataclass(frozen=True)
class JSDOptions(Options):
    """The options of JSD.

    Attributes:
        beta: the teacher's share of the mixture, in [0, 1]; 0 is kl and 1 is reverse_kl.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"'beta' = {self.beta} is outside [0, 1]")


@dataclass(frozen=True)
class DKDOptions(Options):
    """The options of DKD.

    Attributes:
        alpha: the factor of what the target class has.
        beta: the factor of how the rest is shared between the other classes.
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "beta"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"'{key}' = {getattr(self, key)} is not a number of at least 0")


class OverClasses(Distiller):
    """What all losses over logits refuse."""

    def prepare(self, student: nn.Module, teacher: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing to learn.

        Raises:
            SessionError: models whose outputs are no distributions over the same classes in the same order.
        """
        configs = [getattr(model, "config", None) for model in (student, teacher)]
        if any(getattr(config, "problem_type", None) == "multi_label_classification" for config in configs):
            raise SessionError("it compares distributions over classes, and the labels of a multi-label model are none")
        ours, theirs = (getattr(config, "id2label", None) or {} for config in configs)
        if ours != theirs and sorted(ours.values()) == sorted(theirs.values()):
            raise SessionError(
                f"the student names its classes {list(ours.values())} and the teacher {list(theirs.values())}; give "
                "both one order"
            )
        return {}


class Divergence(OverClasses):
    """A divergence between the two distributions, times the squared temperature."""

    config: Options
    name: ClassVar[str]

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,): samples, or the tokens that the labels count."""
        ours, theirs = (p.log_softmax(-1) for p in _logits(self.name, student, teacher, self.config.temperature))
        return batch.items(self._between(ours, theirs) * self.config.temperature**2)

    @abstractmethod
    def _between(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Of log probabilities, shape (..., classes): shape (...)."""


class KL(Divergence):
    """``T^2 KL(teacher || student)`` over the last dimension of the logits (Hinton et al. 2015, arXiv:1503.02531)."""

    Config = Options
    config: Options

    name = "kl"

    def _between(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return divergence(theirs, ours)


class ReverseKL(Divergence):
    """``T^2 KL(student || teacher)``: the student may leave out some answers (Gu et al. 2024, arXiv:2306.08543)."""

    Config = Options
    config: Options

    name = "reverse_kl"

    def _between(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return divergence(ours, theirs)


class JSD(Divergence):
    """``T^2 (beta KL(teacher || m) + (1 - beta) KL(student || m))`` with ``m = beta teacher + (1 - beta) student``.

    The generalised Jensen-Shannon divergence of Agarwal et al. 2024 (GKD, arXiv:2306.13649, equation 1). It vanishes
    at both ends of beta (divided by beta it tends to kl, by 1 - beta to reverse_kl), which stand for these two.
    """

    Config = JSDOptions
    config: JSDOptions

    name = "jsd"

    def _between(self, ours: Tensor, theirs: Tensor) -> Tensor:
        beta = self.config.beta
        if beta == 0:
            return divergence(theirs, ours)
        if beta == 1:
            return divergence(ours, theirs)
        mixture = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))
        return beta * divergence(theirs, mixture) + (1 - beta) * divergence(ours, mixture)


class DKD(OverClasses):
    """Decoupled distillation: ``T^2 (alpha TCKD + beta NCKD)`` (Zhao et al. 2022, arXiv:2203.08679, equation 7).

    TCKD is the divergence of (target class, all others), NCKD that of the other classes among themselves. With the
    teacher's probability p of the target, ``KL = TCKD + (1 - p) NCKD``: a teacher that is sure of itself no longer
    hides what it knows of the other classes. It needs class labels: of samples, of tokens, or of next tokens.
    """

    Config = DKDOptions
    config: DKDOptions

    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """Shape (items,): samples, or the tokens that the labels count."""
        ours, theirs = _logits("dkd", student, teacher, self.config.temperature)
        labels = batch.targets()
        if labels is None or labels.is_floating_point() or labels.shape != ours.shape[:-1]:
            found = "there are none" if labels is None else f"got {tuple(labels.shape)} of {labels.dtype}"
            raise SessionError(f"dkd needs a class label for each of {tuple(ours.shape[:-1])} outputs; {found}; use kl")
        target = torch.zeros_like(ours, dtype=torch.bool).scatter_(-1, labels.clamp(min=0).unsqueeze(-1), 1)
        split = divergence(_target_and_rest(theirs, target), _target_and_rest(ours, target))
        others = divergence(hide(theirs, target).log_softmax(-1), hide(ours, target).log_softmax(-1))
        return batch.items((self.config.alpha * split + self.config.beta * others) * self.config.temperature**2)


def _logits(
    name: str, student: Mapping[str, Any], teacher: Mapping[str, Any], temperature: float
) -> tuple[Tensor, Tensor]:
    """The logits of both over the temperature, float32."""
    if student.get("logits") is None or teacher.get("logits") is None:
        raise SessionError(f"{name} compares logits, and the model returns none; use hidden for an encoder")
    ours, theirs = student["logits"].float(), teacher["logits"].float()
    if ours.shape != theirs.shape:
        raise SessionError(
            f"{name} needs logits of one shape, got {tuple(ours.shape)} from the student and {tuple(theirs.shape)} "
            "from the teacher; for other classes or another vocabulary use a loss over hidden states"
        )
    if ours.shape[-1] < 2:
        raise SessionError(f"{name} compares distributions over classes, and the model gives one number; use hidden")
    return ours / temperature, theirs / temperature


def _target_and_rest(logits: Tensor, target: Tensor) -> Tensor:
    """The log probabilities of the target class and of all others together, shape (..., 2)."""
    both = torch.stack([hide(logits, ~target).logsumexp(-1), hide(logits, target).logsumexp(-1)], dim=-1)
    return both.log_softmax(-1)
