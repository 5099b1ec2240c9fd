"""Which slices of which parameters go together: attention heads, the channels between two layers, whole blocks.

Found by structure: the names that layers carry inside their parent, and shapes that follow from each other. What is not
understood is said in a sentence, and stays whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sparsehooks.padding import is_encoder_decoder

Role = Literal["weight", "vector", "follower"]
"""A matrix that may be scored; what is masked with it (a bias or norm); what only changes its size (running mean)."""

QKV = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"))
OUTPUT = ("o_proj", "out_proj", "out_lin", "o", "dense")
HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("all_head_size", "inner_dim", "split_size")
FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("up_proj",), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("Wi",), "Wo"),
    (("lin1",), "lin2"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("ffn",), "ffn_output"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)
RELATIVE = re.compile(r"(^|\.)rel(ative)?_[a-z_]*bias$")
ACTIVATIONS = (
    "act",
    "act_fn",
    "activation",
    "activation_fn",
    "intermediate_act_fn",
    "intermediate.intermediate_act_fn",
)


@dataclass(frozen=True)
class Member:
    """The slices of one parameter, one for each unit of a coupling.

    Attributes:
        parameter: its name, or that of a buffer.
        dim: 0 for rows of the matrix (output features) or elements of a vector, 1 for columns.
        size: how many rows, columns or elements a unit has.
        offset: where those of the first unit begin; the others follow.
        role: what it is.
        of: the weight whose bias or norm it is; a vector without one goes along in any case.
        unit: the only unit, which owns all of the parameter.
    """

    parameter: str
    dim: int
    size: int = 1
    offset: int = 0
    role: Role = "weight"
    of: str = ""
    unit: int | None = None

    def narrow(self, mask: Tensor, keep: Tensor) -> None:
        """Have a mask (of the matrix or vector) exclude what is not kept, in place."""
        keep = keep.to(mask.device)
        if self.unit is not None:
            mask &= keep[self.unit]
            return
        long = keep.repeat_interleave(self.size)
        part = mask.narrow(self.dim, self.offset, len(long))
        part &= long.unsqueeze(1) if mask.dim() == 2 and self.dim == 0 else long

    def sums(self, matrix: Tensor, units: int) -> Tensor:
        """The sum of each unit's slice."""
        if self.unit is not None:
            sums = matrix.new_zeros(units)
            sums[self.unit] = matrix.sum()
            return sums
        line = matrix.sum(dim=1 - self.dim) if matrix.dim() == 2 else matrix
        return line.narrow(0, self.offset, units * self.size).reshape(units, self.size).sum(dim=1)

    def spread(self, values: Tensor, matrix: Tensor) -> Tensor:
        """The value of each unit at its weights, shaped to broadcast over ``part(matrix)``."""
        if self.unit is not None:
            return values[self.unit]
        long = values.repeat_interleave(self.size)
        return long.unsqueeze(1) if matrix.dim() == 2 and self.dim == 0 else long

    def part(self, matrix: Tensor, units: int) -> Tensor:
        """The slices of all units; a view."""
        return matrix if self.unit is not None else matrix.narrow(self.dim, self.offset, units * self.size)


@dataclass(frozen=True)
class Fold:
    """Two layers with nothing but an elementwise function between them.

    Attributes:
        producer: the module name of the first.
        consumer: the module name of the second.
        activation: what lies between.
    """

    producer: str
    consumer: str
    activation: Callable[[Tensor], Tensor] = field(compare=False)


@dataclass(frozen=True)
class Coupling:
    """Slices that go together.

    Attributes:
        name: a module's name.
        units: how many.
        members: what they are made of.
        kind: "head", "channel" or "layer".
        gone: when the model computes the same without a unit: for each clause there is an alternative of which all
            slices are zero. No clause: when all its weights are masked.
        attributes: (module, attribute, amount for a unit) of the numbers that follow.
        fold: if a constant that enters the second layer may move into its bias.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    kind: str
    gone: tuple[tuple[tuple[Member, ...], ...], ...] = ()
    attributes: tuple[tuple[str, str, int], ...] = ()
    fold: Fold | None = None

    @property
    def weights(self) -> list[Member]:
        """The members that may be scored."""
        return [member for member in self.members if member.role == "weight"]


Found = tuple[list[Coupling], list[tuple[str, str]]]
"""Couplings, and sentences, each with the name of the module that it is about."""


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as (input, output)."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def is_linear(module: Any) -> bool:
    """Whether a layer is one matrix."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Module) else None
    return weight is not None and weight.dim() == 2 and (isinstance(module, nn.Linear) or is_transposed(module))


def matrix(model: nn.Module, name: str, tensor: Tensor | None = None) -> Tensor:
    """A view of a parameter or buffer (or a tensor of its shape) as a matrix (outputs, inputs); vectors as they are."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    value = cast(Tensor, getattr(module, attribute)).detach() if tensor is None else tensor
    if value.dim() < 2:
        return value
    return value.t() if is_transposed(module) else value.flatten(1)


def features(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def rows(name: str, module: nn.Module, size: int = 1, offset: int = 0) -> list[Member]:
    """What makes the outputs of a layer: its rows, and the elements of its bias."""
    weight = f"{name}.weight"
    members = [Member(weight, 0, size, offset)]
    if module._parameters.get("bias") is not None:
        members.append(Member(f"{name}.bias", 0, size, offset, "vector", weight))
    return members


def columns(name: str, size: int = 1, offset: int = 0) -> Member:
    """What reads the inputs of a layer."""
    return Member(f"{name}.weight", 1, size, offset)


def child(module: nn.Module, path: str) -> Any:
    """A descendant or another attribute, or None."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def join(*names: str) -> str:
    """A dotted name."""
    return ".".join(name for name in names if name)


def shared(model: nn.Module) -> set[str]:
    """The names of parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def find_couplings(model: nn.Module, kind: str) -> Found:
    """All couplings of a kind, and sentences about what has none."""
    found, notes = {"head": heads, "channel": channels, "layer": layers}[kind](model)
    tied = shared(model)
    left = []
    for coupling in found:
        if parameter := next((member.parameter for member in coupling.members if member.parameter in tied), None):
            own = [member.parameter for member in coupling.weights if member.parameter not in tied] or [parameter]
            module = own[-1].rpartition(".")[0]
            notes.append(
                (module, f"the {kind}s of '{coupling.name}' stay whole: '{parameter}' is tied to another weight")
            )
        else:
            left.append(coupling)
    return left, notes


# ------------------------------------------------------------------------------------------------------- heads


def heads(model: nn.Module) -> Found:
    """The heads of each attention; with grouped keys, all heads that share one key head are one unit."""
    found: list[Coupling] = []
    notes: list[tuple[str, str]] = []
    joint: dict[str, list[tuple[Coupling, nn.Module]]] = {}
    blocks = _containers(model)
    for name, module in model.named_modules():
        result = _attention(model, name, module)
        if isinstance(result, str):
            notes.append((name, f"the heads of '{name}' stay whole: {result}"))
        elif result is not None and hasattr(module, "has_relative_attention_bias"):
            joint.setdefault(_without_index(name, blocks), []).append((result, module))
        elif result is not None:
            found.append(result)
    inside = tuple(f"{coupling.name}." for group in joint.values() for coupling, _ in group)
    outside = [name for name, _ in model.named_modules() if RELATIVE.search(name) and not name.startswith(inside)]
    if outside and found:  # one bias of as many heads for all blocks
        notes += [
            (one.name, f"the heads of '{one.name}' stay whole: '{outside[0]}' may be about heads") for one in found
        ]
        found = []
    for name, group in joint.items():
        if len({coupling.units for coupling, _ in group}) > 1:
            why = "the blocks share position biases, but have different numbers of heads"
            notes.append((group[0][0].name, f"the heads of '{name}' stay whole: {why}"))
            continue
        members = [member for coupling, _ in group for member in coupling.members]
        members += [
            Member(f"{coupling.name}.relative_attention_bias.weight", 1, role="follower")
            for coupling, module in group
            if getattr(module, "relative_attention_bias", None) is not None
        ]
        gone = tuple(clause for coupling, _ in group for clause in coupling.gone)
        attributes = tuple(change for coupling, _ in group for change in coupling.attributes)
        found.append(Coupling(name, group[0][0].units, tuple(members), "head", gone, attributes))
    return found, notes


def _without_index(name: str, blocks: dict[str, nn.ModuleList]) -> str:
    for container in blocks:
        if name.startswith(f"{container}."):
            return join(container, "*", name[len(container) + 1 :].partition(".")[2])
    return name


def _attention(model: nn.Module, name: str, module: nn.Module) -> Coupling | str | None:
    trio = next((trio for trio in QKV if all(is_linear(child(module, part)) for part in trio)), None)
    fused = trio is None and is_transposed(getattr(module, "c_attn", nn.Identity()))
    if trio is None and not fused:
        return _unknown_attention(module)
    if module._parameters:
        return f"it has a parameter '{min(module._parameters)}' of its own"
    if fused and getattr(module, "q_attn", None) is not None:
        return "its queries have a layer of their own, and keys and values share one"
    consumer = _output(model, name, fused=fused)
    if consumer is None:
        return "its output layer has no name that is known"
    # from the first row of a layer on, so many rows are the queries, keys or values
    places: list[tuple[str, int, int]]
    if fused:
        width = features(child(module, "c_attn"))[0] // 3
        places = [("c_attn", index * width, width) for index in range(3)]
    else:
        places = [(part, 0, features(child(module, part))[0]) for part in trio or ()]
    size = _head_size(module, places[0][2])
    if size is None or not _follows(module, size, [width for _, _, width in places], child(model, consumer)):
        return f"heads of {size or 'unknown'} features do not follow from the shapes of its layers"
    known = {part for part, _, _ in places} | {consumer.rpartition(".")[2], "relative_attention_bias"}
    for extra, layer in module.named_children():
        if extra not in known and any(tuple(part.shape) != (size,) for part in layer.parameters()):
            return f"it is not known what its layer '{extra}' does"
    units, group = places[1][2] // size, places[0][2] // places[1][2]
    parts = [rows(join(name, part), child(module, part), width // units, offset) for part, offset, width in places]
    reads = columns(consumer, size * group)
    amounts = {**dict.fromkeys(HEADS, group), **dict.fromkeys(KEY_HEADS, 1), **dict.fromkeys(WIDTHS, size * group)}
    attributes = tuple(
        (name, key, amount) for key, amount in amounts.items() if getattr(module, key, None) == units * amount
    )
    members = (*parts[0], *parts[1], *parts[2], reads)
    return Coupling(name, units, members, "head", ((tuple(parts[2]), (reads,)),), attributes)


def _output(model: nn.Module, name: str, *, fused: bool) -> str | None:
    """The name of the layer that reads what the heads give."""
    if fused:
        places = [join(name, "c_proj")]
    else:
        places = [*(join(name, part) for part in OUTPUT), join(name.rpartition(".")[0], "output.dense")]
    return next((place for place in places if is_linear(child(model, place))), None)


def _head_size(module: nn.Module, width: int) -> int | None:
    """How many features a head has, as the attention says."""
    size = next((value for key in HEAD_SIZE if isinstance(value := getattr(module, key, None), int)), None)
    count = _head_count(module)
    return width // count if size is None and count and width % count == 0 else size


def _head_count(module: nn.Module) -> int | None:
    return next((value for key in HEADS if isinstance(value := getattr(module, key, None), int)), None)


def _follows(module: nn.Module, size: int, widths: list[int], consumer: nn.Module) -> bool:
    """Whether the shapes of the layers are those of whole heads."""
    query, key, value = widths
    count = _head_count(module)
    return (
        size > 0
        and key == value
        and not (query % size or key % size or query % key)
        and count in {None, query // size}
        and features(consumer)[1] == query
    )


def _unknown_attention(module: nn.Module) -> str | None:
    """A sentence if it looks like an attention with layers of its own."""
    named = any("attention" in base.__name__.lower() for base in type(module).__mro__)
    layers_of_it = [key for key, layer in module.named_children() if layer._parameters.get("weight") is not None]
    several = [key for key in layers_of_it if cast(Tensor, module.get_submodule(key).weight).dim() == 2]
    if named and (len(several) > 1 or "in_proj_weight" in module._parameters):
        return f"the layers of its {type(module).__name__} are laid out in a way that is not known"
    return None


# ---------------------------------------------------------------------------------------------------- channels


def channels(model: nn.Module) -> Found:
    """The channels inside the feed-forward layers of transformers; those between all layers of what can be traced."""
    from transformers import PreTrainedModel

    from sparsehooks.tracing import traced

    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        found, notes = traced(model)
        if not notes:
            return found, []
        named, unknown = _feed_forwards(model)
        return (named, unknown) if named else (found, notes)
    found, notes = _feed_forwards(model)
    return (found, notes) if found or notes else traced(model)


def _feed_forwards(model: nn.Module) -> Found:
    found: list[Coupling] = []
    notes: list[tuple[str, str]] = []
    taken: set[str] = set()
    for name, module in model.named_modules():
        producers, consumer = _pair(module)
        if not consumer or join(name, consumer) in taken:
            continue
        result = _feed_forward(name, module, producers, consumer)
        taken |= {join(name, part) for part in (*producers, consumer)}
        if isinstance(result, str):
            first = join(name, producers[0])
            notes.append((first, f"the channels of '{first}' stay whole: {result}"))
        else:
            found.append(result)
    for name, module in model.named_modules():
        kind = type(module).__name__
        named = any(part in kind for part in ("MLP", "FeedForward", "FFN", "Experts"))
        if named and not any(used.startswith(f"{name}.") for used in taken):
            why = f"its {kind} is laid out in a way that is not known"
            notes.append((name, f"the channels of '{name}' stay whole: {why}"))
    return found, notes


def _pair(module: nn.Module) -> tuple[tuple[str, ...], str]:
    """The names of the first and the last layer of a feed-forward layer, if it is one."""
    for producers, consumer in FEED_FORWARD:
        if all(is_linear(child(module, part)) for part in (*producers, consumer)):
            return producers, consumer
    return (), ""


def _feed_forward(name: str, module: nn.Module, producers: tuple[str, ...], consumer: str) -> Coupling | str:
    layers_of_it = [child(module, part) for part in producers]
    last = child(module, consumer)
    width = features(last)[1]
    outputs = [features(layer)[0] for layer in layers_of_it]
    halves = outputs == [2 * width]  # both factors in one layer
    if not halves and any(count != width for count in outputs):
        return f"'{consumer}' reads {width} features, which the layers before it do not have"
    inside = {id(part) for layer in (*layers_of_it, last) for part in layer.parameters()}
    if any(part.dim() == 1 and len(part) == width and id(part) not in inside for part in module.parameters()):
        return "a norm or scale of as many features may lie between its layers"
    groups = [rows(join(name, part), layer) for part, layer in zip(producers, layers_of_it, strict=True)]
    if halves:
        groups.append(rows(join(name, producers[0]), layers_of_it[0], offset=width))
    reads = columns(join(name, consumer))
    activation = next((act for key in ACTIVATIONS if callable(act := child(module, key))), None)
    if activation is None:
        return "it is not known what lies between its layers"
    alternatives: list[tuple[Member, ...]] = [(reads,)]
    plain = elementwise(activation)
    if plain and keeps_zero(activation):
        alternatives += [tuple(group) for group in groups]
    elif len(groups) > 1 and not halves:
        alternatives.append(tuple(groups[-1]))  # the last is a factor of the others, whatever these are
    fold = None
    if plain and len(groups) == 1 and last._parameters.get("bias") is not None:
        fold = Fold(join(name, producers[0]), join(name, consumer), activation)
    members = tuple(member for group in groups for member in group)
    return Coupling(join(name, producers[0]), width, (*members, reads), "channel", (tuple(alternatives),), fold=fold)


@torch.no_grad()
def elementwise(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function treats every element alike and on its own."""
    sample = torch.tensor([-2.0, -0.3, 0.0, 0.4, 1.5])
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return False
    try:
        whole = activation(sample.clone())
        single = torch.cat([activation(part.clone()) for part in sample.split(1)])
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError):
        return False
    return isinstance(whole, Tensor) and whole.shape == sample.shape and torch.allclose(whole, single, atol=1e-6)


@torch.no_grad()
def keeps_zero(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function makes nothing of nothing."""
    return bool((activation(torch.zeros(2)) == 0).all())


# ------------------------------------------------------------------------------------------------------ layers


def _containers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of like blocks that hold an attention each."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if all(any("attention" in type(part).__name__.lower() for part in block.modules()) for block in module):
            lists[name] = module
    return {name: blocks for name, blocks in lists.items() if len(blocks)}


def layers(model: nn.Module) -> Found:
    """The blocks of a transformer; of an encoder and a decoder, each has its own."""
    found = []
    notes = []
    for name, blocks in _containers(model).items():
        if why := _uneven(model, name):
            notes.append((name, f"the layers of '{name}' stay whole: {why}"))
            continue
        members: list[Member] = []
        for index, block in enumerate(blocks):
            prefix = join(name, str(index))
            matrices = {f"{part}.weight" for part, layer in block.named_modules() if is_linear(layer)}
            for parameter, value in block.named_parameters():
                shared_bias = "relative_attention_bias" in parameter  # of all blocks, wherever it is kept
                role: Role = "weight" if parameter in matrices else "follower" if shared_bias else "vector"
                members.append(Member(f"{prefix}.{parameter}", 0, value.shape[0], role=role, unit=index))
        found.append(Coupling(name, len(blocks), tuple(members), "layer"))
    if not found and not notes:
        notes.append(("", f"{type(model).__name__} has no list of blocks with an attention each"))
    return found, notes


def _uneven(model: nn.Module, container: str) -> str | None:
    """Why blocks cannot be taken out, asked of models that have no memory."""
    from transformers import PreTrainedModel

    if not depth_keys(model, container):
        return "the config does not say how many there are"
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            whole = type(model)(copy.deepcopy(model.config))
            count = len(cast(nn.ModuleList, whole.get_submodule(container)))
            for config, key in depth_keys(whole, container):
                set_depth(config, key, list(range(1, count)), count)
            less = type(model)(type(model.config).from_dict(whole.config.to_dict()))
        shapes = [
            {name: value.shape for name, value in block.named_parameters() if "relative_attention_bias" not in name}
            for one in (whole, less)
            for block in cast(nn.ModuleList, one.get_submodule(container))
        ]
    except Exception as error:  # noqa: BLE001 - whatever a config or a model checks
        why = str(error).strip().split("\n", maxsplit=1)[0]
        return f"{type(model).__name__} cannot have one less ({why})"
    if len(shapes) != 2 * count - 1:
        return "the config does not say how many there are"
    return None if all(one == shapes[0] for one in shapes) else "they are not alike"


def set_depth(config: Any, key: str, kept: list[int], count: int) -> None:
    """Tell a config which blocks stay: their number, and what it says about each."""
    for other, value in list(vars(config).items()):
        if "layer" in other and isinstance(value, (list, tuple)) and len(value) == count:  # of each its type
            setattr(config, other, type(value)(value[index] for index in kept))
    setattr(config, key, len(kept))


def depth_keys(model: nn.Module, container: str) -> list[tuple[Any, str]]:
    """The configs, and their keys, that say how many blocks there are."""
    count = len(cast(nn.ModuleList, model.get_submodule(container)))
    root = getattr(model, "config", None)
    keys = ["num_hidden_layers"]
    if is_encoder_decoder(model):
        decoder = any("decoder" in part for part in container.split("."))
        keys = ["num_decoder_layers", "decoder_layers"] if decoder else ["num_layers", "encoder_layers"]
    found = [(root, key) for key in keys if getattr(root, key, None) == count]
    steps = container.split(".")[:-1]
    for depth in range(1, len(steps) + 1):
        config = getattr(model.get_submodule(".".join(steps[:depth])), "config", None)
        if config is None or any(config is other for other, _ in found):
            continue
        if config is not root and getattr(config, "num_hidden_layers", None) == count:
            found.append((config, "num_hidden_layers"))
    return found
