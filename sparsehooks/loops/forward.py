"""Loss terms through the model's own forward: the way into loops that cannot be changed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from sparsehooks.errors import SessionError
from sparsehooks.session import Session


def ask_for_outputs(model: nn.Module, session: Session) -> list[RemovableHandle]:
    """Make training forwards return what the session needs of them: hidden states, attention maps."""
    if not session.outputs.needed:
        return []

    _let_sharded_record(model)

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, {**kwargs, **session.outputs.ask()}) if trains(module) else None

    return [model.register_forward_pre_hook(ask, with_kwargs=True)]


def _let_sharded_record(model: nn.Module) -> None:
    """Have transformers return hidden states of classes that ``fully_shard`` made: it knows them by their names."""
    from torch.distributed.fsdp import FSDPModule
    from transformers.utils import output_capturing

    for module in model.modules():
        if isinstance(module, FSDPModule) and hasattr(module, "_can_record_outputs"):
            output_capturing._CAN_RECORD_REGISTRY[module] = module._can_record_outputs  # type: ignore[index, assignment]


def add_loss_terms(model: nn.Module, session: Session) -> list[RemovableHandle]:
    """Add the session's loss terms to ``outputs.loss`` of every training forward of the (unwrapped) model."""
    if not session.distils:
        return []
    signature = inspect.signature(model.forward)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if not trains(module):
            return outputs
        if not isinstance(outputs, Mapping):
            raise SessionError("distillation needs a model whose forward returns a mapping, as transformers models do")
        inputs = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
        terms = session.loss_terms(outputs, inputs)
        if terms is not None:
            own = outputs.get("loss")
            return _with_loss(outputs, terms if own is None else own + terms)
        return outputs

    return [*ask_for_outputs(model, session), model.register_forward_hook(add, with_kwargs=True)]


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
