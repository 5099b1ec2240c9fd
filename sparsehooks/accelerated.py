"""The layer that a backend runs: a class swap, as in ``swapping``, that leaves the dense weight where it is.

State dicts, saving, PEFT and turning back see an ordinary layer. The packed form lies beside the weight in a plain
attribute; it is made anew when the layer is copied or moved, or its weight has changed.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparsehooks.components import Backend, Support
from sparsehooks.errors import SessionError
from sparsehooks.sites import Sparse, SparseInput
from sparsehooks.swapping import inner


class Lane(NamedTuple):
    """Who runs inputs of some size.

    Attributes:
        most: up to how many tokens, the rows of the flattened input.
        backend: its name; None: torch.
    """

    most: float
    backend: str | None


def choose(lanes: Iterable[Lane], tokens: int) -> str | None:
    """The backend for so many tokens; None: torch."""
    for most, backend in lanes:
        if tokens <= most:
            return backend
    return None


@dataclass
class Group:
    """What the layers of one model share.

    Attributes:
        named: whether a backend may round what the model does not, as it was named.
        layers: how many layers each backend runs.
        left: the backends of which it was said that they no longer run a layer.
    """

    named: bool
    layers: Counter[str] = field(default_factory=Counter)
    left: set[str] = field(default_factory=set)

    def supports(self, backend: Backend, layer: nn.Module) -> Support:
        """Whether a backend may run a layer as it is now."""
        support = backend.supports(bare(layer), cast(Tensor, layer.weight).device)
        site = vars(layer).get("_sparsehooks_site")
        if not support.ok or support.exact or self.named or (site is not None and site.component.rounds):
            return support
        return Support(ok=False, reason="it rounds what the model does not round; name it to use it all the same")


class Engine:
    """What runs one layer.

    Args:
        layer: a Linear of the swapped class.
        name: of the layer, for messages.
        backends: by name.
        lanes: in ascending order; what has more tokens than the last one runs dense.
        group: of the layers of its model.
    """

    def __init__(
        self, layer: nn.Module, name: str, backends: Mapping[str, Backend], lanes: Iterable[Lane], group: Group
    ) -> None:
        self.name, self.backends, self.lanes, self.group = name, dict(backends), tuple(lanes), group
        self.key = next(_KEYS)
        self._layer = weakref.ref(layer)
        self._packed: dict[str, Any] = {}
        self._weight = self._bias = _Stamp(None)
        _ENGINES[self.key] = self

    def settle(self, lanes: Iterable[Lane]) -> None:
        """Keep these lanes, and only what they need."""
        self.lanes = tuple(lanes)
        used = {lane.backend for lane in self.lanes}
        self.backends = {name: backend for name, backend in self.backends.items() if name in used}
        self._packed = {name: packed for name, packed in self._packed.items() if name in used}
        self.group.layers.update(self.backends.keys())

    def drop(self) -> None:
        """Forget what is packed."""
        self._packed = {}

    def takes(self, backend: str, inputs: Tensor) -> bool:
        """Whether the backend may run these inputs; torch's layer runs all others, or says what is wrong with them."""
        layer: Any = self._layer()
        weight = layer._parameters.get("weight")  # torch finds it by name alone ten times as slowly
        return (
            weight is not None
            and "bias" in layer._parameters  # neither is made anew in each forward, as torch.nn.utils.prune does
            and inputs.dim() > 0
            and inputs.shape[-1] == layer.in_features
            and (inputs.dtype == weight.dtype or (self.backends[backend].rounds_inputs and inputs.is_floating_point()))
            and inputs.device == weight.device
            and not torch.is_autocast_enabled("cpu" if weight.is_cpu else weight.device.type)
            and _is_plain(inputs)
        )

    def run(self, backend: str, inputs: Tensor) -> Tensor:
        """The layer's outputs; to be called without gradients."""
        layer: Any = self._layer()
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if not (self._weight.fits(weight) and self._bias.fits(bias)):
            self._packed, self._weight, self._bias = {}, _Stamp(weight), _Stamp(bias)
        if backend not in self._packed:
            self._packed[backend] = self._pack(layer, backend)
        packed, runner = self._packed[backend], self.backends[backend]
        if packed is None:
            return cast(Tensor, original(layer).forward(layer, inputs))
        if not runner.rounds_inputs and isinstance(layer, SparseInput):
            inputs = layer._sparsehooks_incoming(inputs)
        return runner.run(packed, inputs)

    def _pack(self, layer: Any, backend: str) -> Any:
        """What the backend needs; None where it does not take what the layer has become."""
        runner, group = self.backends[backend], self.group
        support = group.supports(runner, layer)
        if support.ok:
            return runner.pack(bare(layer))
        if backend not in group.left:
            group.left.add(backend)
            others = group.layers[backend] - 1
            also = f"; so may {others} more of the layers that it ran" if others > 0 else ""
            warnings.warn(f"'{self.name}' runs dense, no longer by '{backend}': {support.reason}{also}", stacklevel=2)
        return None


_KEYS = itertools.count()
_ENGINES: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
"""How the operation in a compiled graph, which takes tensors, numbers and strings, finds them."""


class Accelerated:
    """The mixin of a layer that a backend runs."""

    _sparsehooks_engine: Engine

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """The layer's forward, by the backend that so many tokens get."""
        # traces and exported programs have no place for a backend and, like nested tensors, no number of tokens
        if torch._C._get_tracing_state() or torch.compiler.is_exporting() or input.is_nested:
            return super().forward(input)  # type: ignore[misc,no-any-return]
        layer: Any = self
        engine = self._sparsehooks_engine
        backend = choose(engine.lanes, input.numel() // layer.in_features)
        if backend is None or not engine.takes(backend, input):
            return super().forward(input)  # type: ignore[misc,no-any-return]
        found: Tensor
        if torch.compiler.is_compiling():  # to the compiler, every backend is one operation
            found = _run(input.detach(), engine.key, backend, layer.out_features)
        elif not torch.is_grad_enabled():
            return engine.run(backend, input)
        else:
            with torch.no_grad():
                found = engine.run(backend, input)
        if torch.is_grad_enabled():
            asking = [t for t in (input, layer.weight, layer.bias) if t is not None and t.requires_grad]
            if asking:
                found = _NoGradient.apply(found, engine.name, *asking)  # type: ignore[no-untyped-call]
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._sparsehooks_engine.drop()
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        engine = self._sparsehooks_engine
        layer = _shell(cast(nn.Module, self), original(cast(nn.Module, self)), {"_sparsehooks_engine"})
        return swap, (layer, engine.name, engine.backends, engine.lanes, engine.group)


def _is_plain(inputs: Tensor) -> bool:
    """Whether a kernel may read the numbers of these inputs: no view that changes them, no transformation."""
    if torch.compiler.is_compiling():
        return True
    if type(inputs) is not Tensor or inputs.layout is not torch.strided or inputs.is_neg():
        return False
    return not torch._C._functorch.peek_interpreter_stack() and forward_ad._current_level < 0


def swap(layer: Any, name: str, backends: Mapping[str, Backend], lanes: Iterable[Lane], group: Group) -> nn.Module:
    """Have backends run a layer, in place.

    Args:
        layer: a Linear, perhaps with a site on its input.
        name: for messages.
        backends: by name.
        lanes: see ``Engine``.
        group: likewise.
    """
    layer.__class__ = _made(type(layer))  # type: ignore[arg-type]
    layer._sparsehooks_engine = Engine(layer, name, backends, lanes, group)
    return cast(nn.Module, layer)


def unswap(layer: Any) -> None:
    """Undo ``swap``."""
    if issubclass(type(layer), Accelerated):
        del layer._sparsehooks_engine
        layer.__class__ = original(layer)
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _nothing]:
            del layer._forward_pre_hooks[key]


def be_called(layer: nn.Module) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from reading the layer's weight: it calls layers that have a hook."""
    if isinstance(layer, Accelerated):
        cast(nn.Module, layer).register_forward_pre_hook(_nothing)


def _nothing(*_: Any) -> None:
    pass


def original(layer: nn.Module) -> type[nn.Module]:
    """The class of an accelerated layer before it was swapped."""
    return inner(type(layer))


def bare(layer: nn.Module) -> Any:
    """The same layer, all it holds shared, in its author's class: without what was swapped in."""
    cls = original(layer) if isinstance(layer, Accelerated) else type(layer)
    cls = inner(cls) if issubclass(cls, Sparse) else cls
    return _shell(layer, cls, {"_sparsehooks_engine", "_sparsehooks_site"})


def _shell(layer: nn.Module, cls: type[nn.Module], without: set[str]) -> nn.Module:
    made = cls.__new__(cls)
    vars(made).update({key: value for key, value in vars(layer).items() if key not in without})
    return made


@functools.cache
def _made(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Accelerated{cls.__name__}", (Accelerated, cls), {})


class _Stamp:
    """What changes with a parameter, but for what is written into its ``data``."""

    def __init__(self, tensor: Tensor | None) -> None:
        self._tensor = _nothing if tensor is None else weakref.ref(tensor)  # the next one may lie at its address
        self._state = None if tensor is None else _state(tensor)

    def fits(self, tensor: Tensor | None) -> bool:
        """Whether it is the same, and unchanged."""
        return tensor is self._tensor() and (None if tensor is None else _state(tensor)) == self._state


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@torch.library.custom_op("sparsehooks::run", mutates_args=())
def _run(inputs: Tensor, key: int, backend: str, features: int) -> Tensor:  # noqa: ARG001 - the fake one needs it
    return _ENGINES[key].run(backend, inputs).contiguous()  # as the fake one says


@_run.register_fake
def _(inputs: Tensor, key: int, backend: str, features: int) -> Tensor:  # noqa: ARG001
    return inputs.new_empty(*inputs.shape[:-1], features)


@torch.library.custom_op("sparsehooks::refuse", mutates_args=())
def _refuse(wanted: Tensor, name: str) -> Tensor:  # noqa: ARG001 - whose shape the fake one gives
    raise SessionError(
        f"a backend runs '{name}' for inference only, it gives no gradient; call sparsehooks.restore_model(model) first"
    )


@_refuse.register_fake
def _(wanted: Tensor, name: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(wanted)


class _NoGradient(torch.autograd.Function):
    """Outputs that refuse their gradient."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, name: str, *asking: Tensor) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(*asking)
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # an operation, so that compiling it does not raise yet
        return None, None, *(_refuse(tensor, ctx.name) for tensor in ctx.saved_tensors)
