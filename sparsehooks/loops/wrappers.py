"""What wraps the model that a run compresses: compiled code, PEFT, Sentence Transformers, modules of one's own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import unwrap_model

from sparsehooks.artifact.quantizer import SparseHooksConfig, arm, disarm
from sparsehooks.errors import SessionError

if TYPE_CHECKING:
    from sparsehooks.session import Session


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that a run compresses, by whose names its recipe goes.

    This is the transformers model in what PEFT or Sentence Transformers have made of it, and in a module that adds
    no parameters of its own to it; else the module itself, without what DDP and ``torch.compile`` put around it.
    """
    model = _bare(model)
    if isinstance(model, PreTrainedModel):
        return model
    inner = getattr(model, "transformers_model", None)  # of Sentence Transformers
    if not isinstance(inner, PreTrainedModel):
        base: Any = getattr(model, "get_base_model", None)  # of PEFT
        inner = None if base is None else base()
    if not isinstance(inner, PreTrainedModel):
        parts = _transformers(model)
        inner = parts[0] if len(parts) == 1 and _holds_all(parts[0], model) else model
    return inner


def is_wrapped(model: nn.Module) -> bool:
    """Whether a run compresses a part of what the loop trains."""
    return _bare(model) is not unwrapped(model)


def _bare(model: nn.Module) -> nn.Module:
    """Without what DDP and ``torch.compile`` put around it."""
    model = unwrap_model(model)
    return getattr(model, "_orig_mod", model)


def _holds_all(part: nn.Module, model: nn.Module) -> bool:
    return {id(weight) for weight in model.parameters()} == {id(weight) for weight in part.parameters()}


def _transformers(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in a module, without those inside others."""
    found: list[PreTrainedModel] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not any(module in set(other.modules()) for other in found):
            found.append(module)
    return found


def unwrapped_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer in what Accelerate has made of it."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def refuse_deepspeed(model: nn.Module, kind: Any = None) -> None:
    """Refuse what keeps the weights where masks cannot reach them.

    Args:
        model: as the loop has it; ZeRO-3 marks its parameters.
        kind: Accelerate's ``distributed_type``, if there is one.

    Raises:
        SessionError: before training starts.
    """
    if getattr(kind, "value", kind) == "DEEPSPEED" or any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise SessionError("DeepSpeed is not supported: it keeps the weights where masks cannot reach them; use DDP")


def reset_compiled(model: nn.Module) -> None:
    """Have compiled models compile again: they ignore hooks that came after they did."""
    compiled = hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules())
    if compiled:
        torch.compiler.reset()


def disarm_all(model: nn.Module) -> list[str] | None:
    """Let the transformers models in a module save dense checkpoints.

    Returns:
        the names of the parameters whose zeros are masks, or None if none of the models was armed.
    """
    configs = [disarm(part) for part in _transformers(model)]
    opened = [config.pruned for config in configs if config is not None]
    return [name for names in opened for name in names] if opened else None


def arm_all(model: nn.Module, session: Session) -> None:
    """After a run: the transformers models in a module save the sparse form, and merging adapters keeps the zeros."""
    for part in _transformers(model):
        arm(part, SparseHooksConfig(**session.provenance(part)))
    for name in session.masks.masks:
        layer, _, rest = name.rpartition(".base_layer.")
        if rest == "weight":
            _keep_zeros(model.get_submodule(layer))


def _keep_zeros(layer: Any) -> None:
    """Have a layer with adapters leave the zeros of its weight alone when they are merged or taken out again."""
    for name in ("merge", "unmerge"):
        if hasattr(layer, name):
            setattr(layer, name, functools.partial(_keeping_zeros, layer, name))  # copies and pickles with the layer


def _keeping_zeros(layer: Any, method: str, *args: Any, **kwargs: Any) -> None:
    base = layer.get_base_layer()
    zeros = base.weight.detach() == 0
    getattr(type(layer), method)(layer, *args, **kwargs)
    with torch.no_grad():
        base.weight.masked_fill_(zeros, 0)
