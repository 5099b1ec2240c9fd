"""Shrinking: what is masked as a whole leaves the model, whose outputs stay the same.

The sizes of a shrunk transformers model no longer follow from its config alone. ``shrink`` describes the difference,
and ``resize`` applies a description to a model that was made of the config, before weights are loaded into it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsehooks.coupling import (
    Coupling,
    Fold,
    Member,
    depth_keys,
    features,
    find_couplings,
    is_linear,
    is_transposed,
    join,
    matrix,
    set_depth,
)
from sparsehooks.sites import SparseInput

COUNTS = frozenset(
    {
        *("in_features", "out_features", "nf", "nx", "in_channels", "out_channels", "num_features", "embedding_dim"),
        *("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads"),
        *("all_head_size", "inner_dim", "split_size"),
    }
)
"""The attributes of modules that a description may set to another whole number."""
FACTORS = frozenset({"scaling"})
"""Those that it may set to another number."""


MARK = "_shrunk_layers"
"""The attribute of a model that was shrunk, here or before it was saved: the number of its blocks, where some went."""
NUMBERS = ("layer_idx", "layer_id", "layer_index", "block_idx")
"""Where a module keeps the number of its block."""


def shrink(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Cut out of a model what its masks exclude as a whole, in place.

    Blocks of which all matrices are masked go; heads, groups of heads and channels go where nothing that they compute
    arrives: their outputs (with biases and norms), or what reads them, are all zero. Neurons whose row is masked while
    their bias is not are constant; where nothing but an elementwise function follows, the constant moves into the next
    bias. At least one unit of each coupling stays, and parameters remain the objects that they are.

    Args:
        model: its masked weights are zero.
        masks: by parameter name, of the shapes and names before.

    Returns:
        what a model made of the config alone does not have: {"modules": {name: {"shapes", "attributes"}},
        "layers": {name: count}}; empty if nothing was ever cut.
    """
    from transformers import PreTrainedModel

    before = _facts(model)
    masks = dict(masks)
    with torch.no_grad():
        depths = _cut_layers(model, masks)
        couplings = [coupling for kind in ("head", "channel") for coupling in find_couplings(model, kind)[0]]
        if not _cut(model, masks, couplings) and not depths:
            warnings.warn(
                "shrink has cut nothing: no block, head or channel is masked as a whole; prune with a pattern such as "
                "'channel' before it",
                stacklevel=2,
            )
    layers = {**getattr(model, MARK, {}), **depths}
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel):
            setattr(module, MARK, {})  # whoever saves only this part
    setattr(model, MARK, layers)
    return describe(model) if isinstance(model, PreTrainedModel) else _difference(model, before)


# -------------------------------------------------------------------------------------------------------- blocks


def _cut_layers(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, int]:
    depths: dict[str, int] = {}
    if all(mask.any() for mask in masks.values()):
        return depths
    for coupling in find_couplings(model, "layer")[0]:
        gone = _gone(model, masks, coupling)
        kept = [index for index in range(coupling.units) if not gone[index]]
        if len(kept) < coupling.units:
            keep_blocks(model, coupling, kept)
            _rename(masks, coupling.name, {old: new for new, old in enumerate(kept)})
            depths[coupling.name] = len(kept)
    return depths


def keep_blocks(model: nn.Module, coupling: Coupling, kept: list[int]) -> None:
    """Take the other blocks out of a list of them, and count anew wherever the model and its configs do."""
    blocks = cast(nn.ModuleList, model.get_submodule(coupling.name))
    keys = depth_keys(model, coupling.name)
    _keep_position_bias(blocks, kept[0])
    for index in reversed(range(coupling.units)):
        if index not in kept:
            del blocks[index]
    for new, old in enumerate(kept):
        for part in blocks[new].modules():
            for key in NUMBERS:
                if getattr(part, key, None) == old:
                    setattr(part, key, new)
    for config, key in keys:
        set_depth(config, key, kept, coupling.units)
    holder = model.get_submodule(coupling.name.rpartition(".")[0])
    for key in ("n_layers", "num_layers", "num_hidden_layers"):
        if getattr(holder, key, None) == coupling.units:
            setattr(holder, key, len(kept))


def _keep_position_bias(blocks: nn.ModuleList, first: int) -> None:
    """In T5 the first block has the position biases of all: they move to the first that stays."""
    if not first:
        return
    for name, part in blocks[0].named_modules():
        bias = part._modules.get("relative_attention_bias")
        if bias is not None:
            heir = blocks[first].get_submodule(name)
            heir.relative_attention_bias = bias
            heir.has_relative_attention_bias = True  # type: ignore[assignment]


def _rename(masks: dict[str, Tensor], container: str, numbers: Mapping[int, int]) -> None:
    renamed = {}
    for name, mask in masks.items():
        index, _, rest = name.removeprefix(f"{container}.").partition(".")
        if not name.startswith(f"{container}."):
            renamed[name] = mask
        elif int(index) in numbers:
            renamed[join(container, str(numbers[int(index)]), rest)] = mask
    masks.clear()
    masks.update(renamed)


# ------------------------------------------------------------------------------------------- heads and channels


def _cut(model: nn.Module, masks: Mapping[str, Tensor], couplings: list[Coupling]) -> bool:
    """Cut what is gone; whether anything was."""
    keep: dict[tuple[str, int], Tensor] = {}
    for coupling in couplings:
        gone = _gone(model, masks, coupling)
        if coupling.fold is not None:
            constant = _constant(model, masks, coupling, gone)
            _fold(model, coupling.fold, constant)
            gone |= constant
        if gone.all():
            gone[0] = False
        if not gone.any():
            continue
        for member in coupling.members:
            long = gone.repeat_interleave(member.size)
            length = matrix(model, member.parameter).shape[member.dim]
            kept = keep.setdefault((member.parameter, member.dim), torch.ones(length, dtype=torch.bool))
            kept[member.offset : member.offset + len(long)] &= ~long
        for module, attribute, amount in coupling.attributes:
            setattr(model.get_submodule(module), attribute, int((~gone).sum()) * amount)
    for (name, dim), kept in keep.items():
        _narrow(model, name, dim, kept.nonzero().flatten())
    return bool(keep)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def _narrow(model: nn.Module, name: str, dim: int, index: Tensor) -> None:
    """Keep some rows or columns of a parameter, and change the sizes that its layer has about it."""
    module, attribute = _owner(model, name)
    value = cast(Tensor, getattr(module, attribute))
    cut = _select(value.data, is_transposed(module), dim, index)
    if isinstance(value, nn.Parameter):
        value.grad = None
        value.data = cut
    else:
        module._buffers[attribute] = cut
    if attribute == "weight":
        _refresh(module)


def _select(tensor: Tensor, transposed: bool, dim: int, index: Tensor) -> Tensor:
    index = index.to(tensor.device)
    if tensor.dim() < 3:
        axis = 1 - dim if transposed and tensor.dim() == 2 else dim
        return tensor.index_select(axis, index).contiguous()
    flat = tensor.flatten(1).index_select(dim, index)  # a channel of a convolution is as many columns as its kernel
    return flat.reshape(flat.shape[0], -1, *tensor.shape[2:]).contiguous()


def _refresh(module: nn.Module) -> None:
    """The sizes that a layer keeps beside its weight."""
    weight = cast(Tensor, module.weight)
    if is_linear(module):
        outputs, inputs = features(module)
        names = {"out_features": outputs, "in_features": inputs, "nf": outputs, "nx": inputs}
    elif weight.dim() > 2:
        names = {"out_channels": weight.shape[0], "in_channels": weight.shape[1]}
    elif weight.dim() == 2:
        names = {"embedding_dim": weight.shape[1]}
    else:
        names = {"num_features": weight.shape[0]}
    for name, value in names.items():
        if hasattr(module, name):
            setattr(module, name, value)


def _gone(model: nn.Module, masks: Mapping[str, Tensor], coupling: Coupling) -> Tensor:
    """Which units may be cut; at least one is not."""
    if coupling.kind == "layer":
        gone = torch.zeros(coupling.units, dtype=torch.bool)
        for unit in range(coupling.units):
            weights = [member.parameter for member in coupling.weights if member.unit == unit]
            gone[unit] = bool(weights) and all(name in masks and not masks[name].any() for name in weights)
    else:
        gone = torch.ones(coupling.units, dtype=torch.bool)
        for clause in coupling.gone:
            met = torch.zeros_like(gone)
            for alternative in clause:
                zero = torch.ones_like(gone)
                for member in alternative:
                    zero &= _zero(model, masks, member, coupling.units)
                met |= zero
            gone &= met
        if not coupling.gone:
            gone.zero_()
    if gone.all():
        gone[0] = False
    return gone


def _zero(model: nn.Module, masks: Mapping[str, Tensor], member: Member, units: int) -> Tensor:
    """Of which units a slice is masked; a bias may as well be zero."""
    if member.parameter in masks:
        alive = matrix(model, member.parameter, masks[member.parameter])
    elif member.role == "weight" or not member.of:
        return torch.zeros(units, dtype=torch.bool)
    else:
        alive = matrix(model, member.parameter) != 0
    return (member.sums(alive.to(torch.float32), units) == 0).cpu()


def _constant(model: nn.Module, masks: Mapping[str, Tensor], coupling: Coupling, gone: Tensor) -> Tensor:
    """Which units are constant, because their row is masked, and not gone."""
    row = next(member for member in coupling.weights if member.dim == 0)
    constant = _zero(model, masks, row, coupling.units) & ~gone
    if (constant | gone).all():
        constant[int((~gone).nonzero()[0])] = False  # one stays
    return constant


def _fold(model: nn.Module, fold: Fold, constant: Tensor) -> None:
    if not constant.any():
        return
    producer, consumer = model.get_submodule(fold.producer), model.get_submodule(fold.consumer)
    bias, target = producer._parameters.get("bias"), cast(nn.Parameter, consumer.bias)
    if bias is None:
        return
    index = constant.nonzero().flatten().to(bias.device)
    value = fold.activation(bias.detach().to(torch.float32).index_select(0, index))
    if isinstance(consumer, SparseInput):
        value = consumer._sparsehooks_site.act(value)
    weight = matrix(model, f"{fold.consumer}.weight").to(torch.float32)
    weight = weight.reshape(weight.shape[0], len(constant), -1).sum(dim=2)  # a flattened channel is several columns
    moved = weight.index_select(1, index.to(weight.device)) @ value.to(weight.device)
    target.data.add_(moved.to(target.dtype))


# -------------------------------------------------------------------------------------------------- description


def _facts(model: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """The shapes and numbers of every module."""
    facts: dict[str, dict[str, dict[str, Any]]] = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        facts[name] = {
            "shapes": {key: list(value.shape) for key, value in tensors.items() if value is not None},
            "attributes": {
                key: value
                for key in sorted(COUNTS | FACTORS)
                if isinstance(value := module.__dict__.get(key), (int, float)) and not isinstance(value, bool)
            },
        }
    return facts


def describe(model: nn.Module) -> dict[str, Any]:
    """What a transformers model has that one made of its config has not, as ``shrink`` returns it."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = type(model)(copy.deepcopy(cast(Any, model).config))
    return _difference(model, _facts(made))


def _difference(model: nn.Module, before: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    modules = {}
    for name, facts in _facts(model).items():
        changed = {}
        for kind, values in facts.items():
            old = before.get(name, {}).get(kind, {})
            changed[kind] = {key: value for key, value in values.items() if old.get(key, value) != value}
        if any(changed.values()):
            modules[name] = {kind: values for kind, values in changed.items() if values}
    found = {"modules": modules, "layers": dict(getattr(model, MARK, {}))}
    return {key: value for key, value in found.items() if value}


def check(shrunk: Any) -> str | None:
    """What is wrong with a description that a file gives, in a few words."""
    if not isinstance(shrunk, Mapping) or not set(shrunk) <= {"modules", "layers"}:
        return "'shrunk' must be a table of 'modules' and 'layers'"
    modules, layers = shrunk.get("modules", {}), shrunk.get("layers", {})
    if not isinstance(modules, Mapping) or not isinstance(layers, Mapping):
        return "'shrunk' must be a table of tables"
    if not all(isinstance(name, str) and _is_count(count) for name, count in layers.items()):
        return "the layers in 'shrunk' must be whole numbers"
    return next((problem for name, changes in modules.items() if (problem := _check_module(name, changes))), None)


def _check_module(name: str, changes: Any) -> str | None:
    if not isinstance(changes, Mapping) or not set(changes) <= {"shapes", "attributes"}:
        return f"'shrunk' says something unknown about '{name}'"
    shapes, attributes = changes.get("shapes", {}), changes.get("attributes", {})
    if not isinstance(shapes, Mapping) or not isinstance(attributes, Mapping):
        return f"the shapes and attributes of '{name}' in 'shrunk' must be tables"
    for shape in shapes.values():
        if not isinstance(shape, (list, tuple)) or not all(_is_count(size) for size in shape):
            return f"a shape of '{name}' in 'shrunk' is not a list of sizes"
    for key, value in attributes.items():
        if not (key in COUNTS and _is_count(value)) and not (key in FACTORS and type(value) in {int, float}):
            return f"'shrunk' sets '{key}' of '{name}', which cannot be"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def resize(model: nn.Module, shrunk: Mapping[str, Any]) -> None:
    """Give a model that was made of the config the sizes of the description; what it does not have is passed over.

    Raises:
        ValueError: in one sentence, if the description does not fit the model.
    """
    setattr(model, MARK, dict(shrunk.get("layers", {})))
    for name, count in shrunk.get("layers", {}).items():
        blocks = _place(model, name)
        if blocks is not None and not (isinstance(blocks, nn.ModuleList) and len(blocks) == count):
            raise ValueError(f"'{name}' has not the {count} blocks that 'shrunk' says")
    for name, changes in shrunk.get("modules", {}).items():
        module = _place(model, name)
        if module is None:
            continue
        for key, shape in changes.get("shapes", {}).items():
            old = {**module._buffers, **module._parameters}.get(key)
            if (
                old is None
                or old.dim() != len(shape)
                or any(new > size for new, size in zip(shape, old.shape, strict=True))
            ):
                raise ValueError(f"'{join(name, key)}' cannot get the shape {list(shape)} that 'shrunk' says")
            new = torch.zeros(tuple(shape), dtype=old.dtype, device=old.device)
            if isinstance(old, nn.Parameter):
                module._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
            else:
                module._buffers[key] = new
        for key, value in changes.get("attributes", {}).items():
            if key not in module.__dict__:
                raise ValueError(f"'{name}' has no '{key}', which 'shrunk' sets")
            setattr(module, key, value)


def _place(model: nn.Module, name: str) -> nn.Module | None:
    """The module of a description, in a model with a head or without."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    for candidate in (name, join(prefix, name), name.removeprefix(f"{prefix}.") if prefix else name):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None
