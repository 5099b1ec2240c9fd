"""Class swaps: layers that compute with their effective weight while their parameters stay as they are.

Swapping ``module.__class__`` for a subclass made on the fly keeps the parameter objects, the state-dict keys and
``deepcopy`` intact; parametrizations and buffers would each change the keys, and ``from_pretrained`` would then
re-initialise the layer without an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from sparsehooks.sharding import whole

if TYPE_CHECKING:
    from sparsehooks.targets import Target


def _linear(module: Any, inputs: Tensor, weight: Tensor) -> Tensor:
    return F.linear(inputs, weight, module.bias)


def _embedding(module: Any, inputs: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(
        inputs, weight, module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse
    )


def _conv(module: Any, inputs: Tensor, weight: Tensor) -> Tensor:
    return module._conv_forward(inputs, weight, module.bias)  # type: ignore[no-any-return]


def _conv1d(module: Any, inputs: Tensor, weight: Tensor) -> Tensor:
    # transformers' Conv1D: the weight lies as (inputs, outputs)
    return F.linear(inputs, weight.t(), module.bias)


FORWARDS: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    Conv1D: _conv1d,
}
"""How each supported layer computes with another weight than its own."""


Step = Literal["mask", "quantize"]
"""What can happen to a weight on its way into a layer's computation, in this order."""
Transform = Callable[[Tensor, bool], Tensor]
"""A matrix, and whether its layer is in training mode, to the matrix that counts; differentiable."""
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What takes the place of ``F.linear(inputs, matrix, bias)``."""


class EffectiveWeight:
    """The mixin of a swapped layer: masks and fake-quantizes its weight on the way into the layer's own computation."""

    _sparsehooks_transforms: dict[Step, Transform]
    _sparsehooks_target: Target
    _sparsehooks_product: Product | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """The layer's forward with the effective weight."""
        target = self._sparsehooks_target
        if hasattr(self, "_sparsehooks_incoming"):  # of activations.SparseInput
            input = self._sparsehooks_incoming(input)  # noqa: A001
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        matrix = target.matrix(weight)
        for step in get_args(Step):
            if step in self._sparsehooks_transforms:
                matrix = self._sparsehooks_transforms[step](matrix, self.training)  # type: ignore[attr-defined]
        if self._sparsehooks_product is not None:
            return self._sparsehooks_product(input, matrix, self.bias)  # type: ignore[attr-defined]
        weight = target.restore(matrix)
        base = _base(type(self))  # type: ignore[arg-type]
        assert base is not None
        return FORWARDS[base](self, input, weight)


def unsupported(model: nn.Module, targets: Iterable[Target]) -> list[str]:
    """The modules among the targets that cannot be swapped, and why, in one sentence each."""
    problems = []
    for target in targets:
        for name in target.modules:
            cls = type(model.get_submodule(name))
            base = _base(cls)
            if issubclass(cls, EffectiveWeight):
                problems.append(
                    f"'{name}' belongs to a run that has not ended; call detach() on its callback, or put all stages "
                    "into one recipe"
                )
            elif base is None:
                known = ", ".join(known.__name__ for known in FORWARDS)
                problems.append(f"'{name}' is a {cls.__name__}, only weights of {known} can be replaced; exclude it")
            elif "forward" in vars(model.get_submodule(name)):
                problems.append(f"'{name}' has a forward of its own on the instance (offloading does this); exclude it")
            elif cls.forward is not base.forward and not hasattr(cls, "_sparsehooks_incoming"):
                problems.append(f"'{name}' is a {cls.__name__} with a forward of its own; exclude it")
            elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
                problems.append(f"'{name}' is never called: nn.MultiheadAttention reads its weight; exclude it")
    return problems


def no_product(model: nn.Module, targets: Iterable[Target]) -> list[str]:
    """The modules among the targets in whose place no backend can multiply, in one sentence each."""
    return [
        f"no backend runs '{name}', which is a {type(model.get_submodule(name)).__name__}; exclude it"
        for target in targets
        for name in target.modules
        if not isinstance(model.get_submodule(name), (nn.Linear, Conv1D))
    ]


def swap(model: nn.Module, target: Target, step: Step, transform: Transform, product: Product | None = None) -> None:
    """Let the target's modules compute with the weight that the transform makes of theirs.

    Args:
        model: whose modules they are.
        target: the weight.
        step: which of the steps on its way the transform is.
        transform: see ``Transform``.
        product: what multiplies then, for layers in which ``no_product`` sees no problem; torch if it is left out.
    """
    for name in target.modules:
        module: Any = model.get_submodule(name)
        if not isinstance(module, EffectiveWeight):
            module.__class__ = effective_class(type(module))  # type: ignore[arg-type]
            module._sparsehooks_transforms = {}
            module._sparsehooks_target = target
        module._sparsehooks_transforms[step] = transform
        if product is not None:
            module._sparsehooks_product = product


def entering(model: nn.Module, target: Target, step: Step) -> Tensor:
    """The target's matrix as it enters a step: after the steps before it."""
    module: Any = model.get_submodule(target.modules[0])
    matrix: Tensor = target.matrix(whole(module.weight.detach()))
    transforms = module._sparsehooks_transforms if isinstance(module, EffectiveWeight) else {}
    for earlier in get_args(Step)[: get_args(Step).index(step)]:
        if earlier in transforms:
            matrix = transforms[earlier](matrix, False)
    return matrix


def unswap(model: nn.Module, target: Target) -> None:
    """Undo ``swap``."""
    for name in target.modules:
        module: Any = model.get_submodule(name)
        if isinstance(module, EffectiveWeight):
            module.__class__ = inner(type(module))
            del module._sparsehooks_transforms, module._sparsehooks_target
            vars(module).pop("_sparsehooks_product", None)


@functools.cache
def effective_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class that computes with effective weights."""
    return type(f"Effective{cls.__name__}", (EffectiveWeight, cls), {})


def inner(cls: type[Any]) -> type[Any]:
    """The class that a swap made another of: the last base, behind the mixin."""
    return cls.__bases__[-1]


def _base(cls: type[nn.Module]) -> type[nn.Module] | None:
    return next((base for base in cls.__mro__ if base in FORWARDS), None)
