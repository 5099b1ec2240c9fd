"""Loss terms through the model's own forward: the way into loops that cannot be changed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from sparsehooks.errors import SessionError
from sparsehooks.loops.wrappers import is_wrapped, unwrapped
from sparsehooks.session import Session


class Handle(Protocol):
    """What can be taken off again."""

    def remove(self) -> None:
        """Take it off."""


def add_loss_terms(whole: nn.Module, session: Session) -> list[Handle]:
    """Add the session's loss terms to ``outputs.loss`` of every training forward of the model in ``whole``."""
    model = unwrapped(whole)

    def add(outputs: Any, inputs: dict[str, Any]) -> Any:
        terms = session.loss_terms(_full(model, outputs, inputs), inputs)
        if terms is None:
            return outputs
        own = outputs.get("loss")
        return _with_loss(outputs, terms if own is None else own + terms)

    return _after_forwards(whole, session, add)


class LossTerms:
    """The session's loss terms where a loop makes its own loss of the forwards of one batch."""

    def __init__(self) -> None:
        self._terms: list[Tensor] = []
        self._batch: Mapping[str, Any] | None = None

    def attach(self, whole: nn.Module, session: Session) -> list[Handle]:
        """Compute the terms of every training forward of the model in ``whole``."""
        model = unwrapped(whole)

        def collect(outputs: Any, inputs: dict[str, Any]) -> Any:
            if self._batch is None:
                raise SessionError(
                    "this Trainer runs its model in the backward, as cached losses of Sentence Transformers do, where "
                    "nothing can be distilled; use another loss, or leave the distill stages out"
                )
            if inputs.keys() & self._batch.keys():  # what the loop keeps back for its loss, such as the labels
                inputs = {**self._batch, **inputs}
            terms = session.loss_terms(_full(model, outputs, inputs), inputs)
            if terms is not None:
                self._terms.append(terms)
            return outputs

        return _after_forwards(whole, session, collect)

    def begin(self, batch: Mapping[str, Any]) -> None:
        """The loop is about to compute the loss of a batch."""
        self._terms, self._batch = [], batch

    def end(self) -> Tensor | None:
        """The mean over the forwards of this batch, or None if there was none in training."""
        terms, self._terms, self._batch = self._terms, [], None
        return torch.stack(terms).mean() if terms else None


def _after_forwards(whole: nn.Module, session: Session, then: Callable[[Any, dict[str, Any]], Any]) -> list[Handle]:
    """Call ``then`` with the outputs and the named inputs of every training forward; what it returns is the output."""
    if not session.distils:
        return []
    model = unwrapped(whole)
    signature = inspect.signature(model.forward)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if not trains(module) or not session.running:
            return outputs
        with session.aborting():
            if not isinstance(outputs, Mapping):
                raise SessionError(
                    "distillation needs a model whose forward returns a mapping, as transformers models do"
                )
            return then(outputs, {**dict(zip(signature.parameters, args, strict=False)), **kwargs})

    handles = [*_ask_for_outputs(model, session), model.register_forward_hook(after, with_kwargs=True)]
    return [*handles, CalledWhole(model)] if is_wrapped(whole) else handles


def _ask_for_outputs(model: nn.Module, session: Session) -> list[Handle]:
    """Make training forwards return what the session needs of them: hidden states, attention maps."""
    if not session.outputs.needed:
        return []

    _let_sharded_record(model)

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, {**kwargs, **session.outputs.ask()}) if trains(module) and session.running else None

    return [model.register_forward_pre_hook(ask, with_kwargs=True)]


def _let_sharded_record(model: nn.Module) -> None:
    """Have transformers return hidden states of classes that ``fully_shard`` made: it knows them by their names."""
    from torch.distributed.fsdp import FSDPModule
    from transformers.utils import output_capturing

    for module in model.modules():
        if isinstance(module, FSDPModule) and hasattr(module, "_can_record_outputs"):
            output_capturing._CAN_RECORD_REGISTRY[module] = module._can_record_outputs  # type: ignore[index, assignment]


class CalledWhole:
    """Have ``model.forward(...)`` run the model's hooks, as ``model(...)`` does, until ``remove`` is called.

    Sentence Transformers and PEFT call the models in them that way.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._own, self._inside = model, vars(model).get("forward"), False
        forward = model.forward

        @functools.wraps(forward)
        def through_hooks(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if self._inside else model(*args, **kwargs)

        model.forward = through_hooks
        self._handles = [  # around all others
            model.register_forward_pre_hook(self._enter, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Give the model its own ``forward`` back."""
        for handle in self._handles:
            handle.remove()
        del self._model.forward
        if self._own is not None:
            self._model.forward = self._own

    def _enter(self, *_: Any) -> None:
        self._inside = True

    def _leave(self, *_: Any) -> None:
        self._inside = False


def _full(model: nn.Module, outputs: Any, inputs: dict[str, Any]) -> Any:
    """Outputs that have logits: TRL's fused head leaves them out, and only a second forward gives them."""
    if not inputs.pop("fused_lm_head", False):
        return outputs
    return model.forward(**inputs)


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    if hasattr(outputs, "loss") or not isinstance(outputs, ModelOutput):
        outputs["loss"] = loss
        return outputs
    return _class_with_loss(type(outputs))(**outputs, loss=loss)


@functools.cache
def _class_with_loss(cls: type[ModelOutput]) -> type[ModelOutput]:
    """The output class of an encoder with a field for the loss: DDP rebuilds outputs from their fields."""
    return dataclasses.make_dataclass(f"{cls.__name__}WithLoss", [("loss", Tensor | None, None)], bases=(cls,))


def trains(module: nn.Module) -> bool:
    """Whether this forward is one of training."""
    return module.training and torch.is_grad_enabled()
