"""Channels of plain models, followed from layer to layer through the graph of the computation.

A *space* is a set of channels that one layer gives and others read. Sums join the spaces of their terms. A space that
anything unknown touches (or the caller of the model sees) stays whole, as do those around grouped convolutions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparsehooks.coupling import (
    Coupling,
    Fold,
    Found,
    Member,
    columns,
    elementwise,
    features,
    is_linear,
    keeps_zero,
    rows,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
)
POOLING = (
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
    *(F.adaptive_max_pool2d, torch.max_pool2d, torch.adaptive_avg_pool1d),
)
SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
SUMS = (operator.add, operator.iadd, torch.add)
FUNCTIONS = (
    *(F.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.elu, F.hardswish, F.sigmoid, F.tanh, F.softplus, F.mish),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, F.selu, F.celu, F.hardtanh, F.logsigmoid),
)
METHODS = frozenset({"relu", "relu_", "sigmoid", "tanh", "contiguous"})


@dataclass(eq=False)
class Space:
    """Channels that go or stay together.

    Attributes:
        name: of the layer that gives them first.
        units: how many.
        open: whether something is not known about them.
        members: what they are made of.
        makers: of each layer that gives them, what has to be zero for nothing to come out.
        readers: what reads them.
        quiet: whether what lies between makes nothing of nothing.
    """

    name: str
    units: int
    open: bool = False
    members: list[Member] = field(default_factory=list)
    makers: dict[str, list[Member]] = field(default_factory=dict)
    readers: list[Member] = field(default_factory=list)
    quiet: bool = True
    layers: list[str] = field(default_factory=list)
    functions: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    into: Space | None = None

    def root(self) -> Space:
        """The space that this one has been joined into."""
        return self if self.into is None else self.into.root()


@dataclass(frozen=True)
class Flow:
    """A tensor in the graph: its channels lie along dimension 1 ("maps"), are spread out in it ("flat") or last."""

    space: Space
    form: str
    maker: str


def traced(model: nn.Module) -> Found:
    """The channels between convolutions, batch norms and linear layers."""
    kind = type(model).__name__
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # noqa: BLE001 - whatever the model does when it is traced
        why = str(error).strip().split("\n", maxsplit=1)[0]
        return [], [("", f"the channels of {kind} stay whole: torch.fx cannot trace it ({why})")]
    walk = _Walk(model)
    for node in graph.nodes:
        walk.visit(node)
    return [coupling for space in walk.spaces if (coupling := walk.coupling(space)) is not None], []


class _Tracer(fx.Tracer):
    """Enters whatever is not a layer of torch."""


class _Walk:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.flows: dict[fx.Node, Flow] = {}
        self.spaces: list[Space] = []
        self.seen: dict[str, list[Space]] = {}
        self.read: set[str] = set()

    def visit(self, node: fx.Node) -> None:
        """Follow the channels through one step."""
        flow = self._step(node)
        if flow is not None:
            self.flows[node] = flow

    def _step(self, node: fx.Node) -> Flow | None:
        if node.op == "get_attr":
            self.read.add(str(node.target))
            return None
        inputs = [self.flows.get(source) for source in node.all_input_nodes]
        first = inputs[0] if len(inputs) == 1 else None
        if node.op == "call_module":
            return self._layer(str(node.target), first)
        if node.target == "size" or node.target is getattr:
            return None
        if _is_flat(node):
            flow = self.flows.get(cast(fx.Node, node.args[0]))
            return Flow(flow.space, "flat", flow.maker) if flow and flow.form == "maps" else self._close(inputs)
        if first is not None and node.op in {"call_function", "call_method"}:
            return self._function(node, first)
        if node.op in {"call_function", "call_method"} and _is_sum(node) and len(inputs) == 2:
            return self._sum(inputs[0], inputs[1], node)
        return self._close(inputs)

    def _close(self, inputs: list[Flow | None]) -> Flow | None:
        """Give up on what enters a step; nothing is known about what leaves it."""
        for flow in inputs:
            if flow is not None:
                flow.space.root().open = True
        return None

    def _layer(self, name: str, flow: Flow | None) -> Flow | None:
        module = self.model.get_submodule(name)
        if name in self.seen and any(
            True for _ in module.parameters()
        ):  # used twice: its spaces would have to be the same ones
            for space in self.seen[name]:
                space.root().open = True
            return self._close([flow])
        self.seen[name] = [] if flow is None else [flow.space]
        if isinstance(module, CONVOLUTIONS) or is_linear(module):
            self._read(name, module, flow)
            return self._make(name, module)
        if flow is None:
            return None
        if isinstance(module, NORMS) and flow.form != "flat":
            return self._norm(name, module, flow)
        if isinstance(module, POOLS) and flow.form == "maps":
            flow.space.root().layers.append("pool")
            return flow
        if isinstance(module, SILENT):
            return flow
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim, flow.form) == (1, -1, "maps"):
            return Flow(flow.space, "flat", flow.maker)
        if not isinstance(module, nn.Flatten) and elementwise(module):
            return self._activate(flow, module)
        return self._close([flow])

    def _read(self, name: str, module: nn.Module, flow: Flow | None) -> None:
        if flow is None:
            return
        space, weight = flow.space.root(), cast(Tensor, module.weight)
        inputs = weight.flatten(1).shape[1] if isinstance(module, CONVOLUTIONS) else features(module)[1]
        forms = {"maps"} if isinstance(module, CONVOLUTIONS) else {"flat", "last"}
        if flow.form not in forms or inputs % space.units or getattr(module, "groups", 1) > 1:
            space.open = True
            return
        member = columns(name, inputs // space.units)
        space.readers.append(member)
        space.members.append(member)
        space.layers.append(f"reader:{name}")

    def _make(self, name: str, module: nn.Module) -> Flow | None:
        if getattr(module, "groups", 1) > 1:
            return None
        form = "maps" if isinstance(module, CONVOLUTIONS) else "last"
        space = Space(name, cast(Tensor, module.weight).shape[0])
        made = rows(name, module)
        space.members += made
        space.makers[name] = made
        self.spaces.append(space)
        self.seen[name].append(space)
        return Flow(space, form, name)

    def _norm(self, name: str, module: nn.Module, flow: Flow) -> Flow | None:
        space = flow.space.root()
        norm = cast(nn.BatchNorm2d, module)
        if not norm.affine or norm.num_features != space.units:
            return self._close([flow])
        vectors = [Member(f"{name}.{key}", 0, role="vector") for key in ("weight", "bias")]
        space.members += vectors
        space.members += [
            Member(f"{name}.{key}", 0, role="follower")
            for key in ("running_mean", "running_var")
            if module._buffers.get(key) is not None
        ]
        space.makers.pop(flow.maker, None)  # whatever the layer gives, the norm's factor and offset decide
        space.makers[name] = vectors
        space.layers.append("norm")
        return Flow(space, flow.form, name)

    def _activate(self, flow: Flow, function: Callable[[Tensor], Tensor]) -> Flow:
        space = flow.space.root()
        space.functions.append(function)
        space.quiet &= keeps_zero(function)
        return flow

    def _function(self, node: fx.Node, flow: Flow) -> Flow | None:
        target = node.target
        if target in POOLING and flow.form == "maps":
            flow.space.root().layers.append("pool")
            return flow
        if target is F.dropout or target is F.dropout2d or target == "contiguous":
            return flow
        if target in FUNCTIONS or (node.op == "call_method" and target in METHODS):
            return self._activate(flow, _call(node))
        if target in {torch.flatten, "flatten"} and flow.form == "maps" and _arguments(node) in {(1,), (1, -1)}:
            return Flow(flow.space, "flat", flow.maker)
        if target in {torch.mean, "mean"} and flow.form == "maps" and not node.kwargs:
            dims = _arguments(node)
            dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
            if sorted(dims) in ([2, 3], [-2, -1]):
                flow.space.root().layers.append("pool")
                return Flow(flow.space, "last", flow.maker)
        return self._close([flow])

    def _sum(self, one: Flow | None, two: Flow | None, node: fx.Node) -> Flow | None:
        if one is None or two is None or one.form != two.form or len(node.args) != 2 or node.kwargs:
            return self._close([one, two])
        first, second = sorted((one.space.root(), two.space.root()), key=self.spaces.index)
        if first.units != second.units:
            return self._close([one, two])
        if first is not second:
            second.into = first
            first.open |= second.open
            first.quiet &= second.quiet
            first.members += second.members
            first.makers |= second.makers
            first.readers += second.readers
            first.layers += second.layers
            first.functions += second.functions
        first.layers.append("sum")
        return Flow(first, one.form, "")

    def coupling(self, space: Space) -> Coupling | None:
        """What a space becomes."""
        if space.into is not None or space.open or not space.readers:
            return None
        if any(member.parameter in self.read for member in space.members):  # by more than its layer
            return None
        alternatives: list[tuple[Member, ...]] = [tuple(space.readers)]
        if space.quiet:
            alternatives.append(tuple(member for group in space.makers.values() for member in group))
        return Coupling(
            space.name, space.units, tuple(space.members), "channel", (tuple(alternatives),), fold=self._fold(space)
        )

    def _fold(self, space: Space) -> Fold | None:
        """Where the only thing between two layers is elementwise, and nothing is padded."""
        if len(space.readers) != 1 or len(space.layers) != 1 or len(space.functions) > 1:
            return None
        consumer = space.readers[0].parameter.removesuffix(".weight")
        module = self.model.get_submodule(consumer)
        padded = isinstance(module, CONVOLUTIONS) and (module.padding == "same" or any(map(bool, module.padding)))
        if padded or module._parameters.get("bias") is None:
            return None
        return Fold(space.name, consumer, space.functions[0] if space.functions else _same)


def _same(value: Tensor) -> Tensor:
    return value


def _is_sum(node: fx.Node) -> bool:
    return node.target in SUMS or (node.op == "call_method" and node.target in {"add", "add_"})


def _is_flat(node: fx.Node) -> bool:
    """Whether it is ``x.view(x.size(0), -1)``."""
    if node.target not in {"view", "reshape"} or len(node.args) != 3 or node.args[2] != -1:
        return False
    source, size = node.args[0], node.args[1]
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return bool(size.args == (source, 0))
    return size.target is operator.getitem and bool(size.args[1] == 0) and _is_shape(size.args[0], source)


def _is_shape(node: Any, source: Any) -> bool:
    return isinstance(node, fx.Node) and (
        node.args == (source, "shape") or (node.target, node.args) == ("size", (source,))
    )


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """What a function gets beside the tensor, given in order."""
    return (*node.args[1:], *node.kwargs.values())


def _call(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The function of a step that takes one tensor."""
    if node.op == "call_method":
        return lambda value: getattr(value, str(node.target))(*node.args[1:], **node.kwargs)
    function = cast(Callable[..., Tensor], node.target)
    options = {key: False if key == "inplace" else value for key, value in node.kwargs.items() if key != "input"}
    return lambda value: function(value, *node.args[1:], **options)
