"""Parameters that are split over the ranks (DTensor, FSDP2): whole where something is decided, in parts where it acts.

Masks and what components learn are whole on every rank, so that a decision is the one that a single process makes, bit
for bit; a weight, its gradient and its optimizer state are gathered one at a time, only where something reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsehooks.distributed import gathered, rank

STATE_OF_FSDP = ("__composable_api_state_key", "_fsdp", "_is_fsdp")
"""How the names begin of what ``fully_shard`` keeps on modules."""


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of the model is split over ranks, also where a forward has gathered it for the moment."""
    return any(map(_is_distributed, model.parameters())) or any(_sharding_modules(model))


def reshard(model: nn.Module) -> None:
    """Give up what a forward has gathered: after one in evaluation mode, FSDP2 leaves whole copies in the modules."""
    for module in _sharding_modules(model):
        module.reshard()


def unsupported(model: nn.Module) -> str | None:
    """Why the parameters cannot be gathered and cut again here, in a few words, or None if they can."""
    from torch.distributed.tensor import Replicate, Shard

    for name, weight in model.named_parameters():
        for placement in getattr(weight, "placements", ()):
            if type(placement) not in (Shard, Replicate):
                return f"'{name}' is placed as {placement}"
    return None


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one a copy, for which every rank has to ask."""
    return tensor.detach().full_tensor() if _is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    return tensor.detach().to_local() if _is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def part(values: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what ``local(like)`` holds of ``like``: a view."""
    if _is_distributed(like):
        mesh: Any = like.device_mesh  # type: ignore[attr-defined]
        for dim, placement in enumerate(like.placements):  # type: ignore[attr-defined]
            if placement.is_shard():  # as torch.chunk cuts; ranks beyond the chunks hold nothing
                chunks = values.chunk(mesh.size(dim), placement.dim)
                index = mesh.get_local_rank(dim)
                values = chunks[index] if index < len(chunks) else values.narrow(placement.dim, 0, 0)
    return values


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Copy whole values, or values sharded as the tensor is, into a tensor that may be sharded."""
    local(tensor).copy_(local(values) if _is_distributed(values) else part(values, tensor))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model; what is sharded is gathered one after the other, on rank 0's CPU alone.

    The other ranks have to call it too, and get an empty dict of a sharded model.
    """
    if not is_sharded(model):
        return model.state_dict()
    reshard(model)
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:  # tied
            found |= {name: found[first[id(tensor)]]} if rank() == 0 else {}
            continue
        values = whole(tensor)
        if rank() == 0:
            found[name] = values.detach().cpu()
    return found


def whole_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a model without sharding, on every rank; ``fully_shard`` forbids ``deepcopy``.

    Args:
        model: sharded.
        memo: of ``deepcopy``: what stands for parts of the model.
    """
    reshard(model)
    memo = {} if memo is None else memo
    classes = {module: type(module) for module in _sharding_modules(model)}
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, dict) and key.startswith(STATE_OF_FSDP):
                memo[id(value)] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(whole(weight).clone(), requires_grad=weight.requires_grad)
    from torch.distributed.fsdp import FSDPModule

    try:
        for module, cls in classes.items():
            module.__class__ = cls.__mro__[cls.__mro__.index(FSDPModule) + 1]
        duplicate = copy.deepcopy(model, memo)
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
    for module in duplicate.modules():
        for key in [key for key in vars(module) if key.startswith(STATE_OF_FSDP)]:
            delattr(module, key)
    return duplicate


def _sharding_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def misfit(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> str | None:
    """The first weight that is not zero where its mask says so, on any rank, or None; every rank has to call it."""
    found = [
        name for name, mask in masks.items() if local(weights[name]).masked_fill(part(mask, weights[name]), 0).any()
    ]
    return next((names[0] for names in gathered(found) if names), None)
