"""Layers that multiply by a backend while they train.

The weight is packed as it is in each forward, and its transpose in each backward, where the backend takes that too: it
gives the gradient of the inputs. The gradient of the weight is a dense product, and goes the way that it goes without a
backend, so the numbers are the same but for the order of sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsehooks.components import Backend
from sparsehooks.plugins import attributed

if TYPE_CHECKING:
    from sparsehooks.stages import PlannedStage
    from sparsehooks.swapping import Product
    from sparsehooks.targets import Target


class Products:
    """The products of a stage's layers.

    Args:
        stage: that names the backend.
        backend: one that trains.
    """

    def __init__(self, stage: PlannedStage, backend: Backend) -> None:
        self._label = stage.label
        self._record = stage.components["backend"].record
        self._backend = backend
        self._warned: dict[str, str] = {}
        """The layers that a warning named, and the reasons that it gave."""

    def of(self, target: Target, mask: Callable[[], Tensor | None]) -> Product:
        """The product of a target's layers: dense, with a warning, where the backend does not take them.

        Args:
            target: the weight.
            mask: gives its mask, always the same tensor until it changes; None while more shall be masked.
        """
        return torch.compiler.disable(_Multiply(self, target, mask))  # type: ignore[no-any-return]

    def ask(self, target: Target, mask: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool]:
        """Whether the backend multiplies by every weight that has this mask, and by its transpose."""
        full = torch.where(mask, 1, weight)  # a weight that is zero now need not stay so
        with attributed(self._record):
            support = self._backend.supports(_layer(full, bias), weight.device)
            backward = support.ok and self._backend.supports(_layer(full.t(), None), weight.device).ok
        layer, reason = target.modules[0], support.reason
        if not support.ok and layer not in self._warned and reason not in self._warned.values():
            self._warned[layer] = reason
            message = f"{self._label}: '{layer}', and others likewise, multiply densely: {reason}"
            warnings.warn(message, stacklevel=2)
        return support.ok, backward

    def run(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` by the backend."""
        with attributed(self._record):
            return self._backend.run(self._backend.pack(_layer(weight, bias)), inputs)


class _Multiply:
    """The product of one target's layers, and what the backend takes of it under the last mask."""

    def __init__(self, products: Products, target: Target, mask: Callable[[], Tensor | None]) -> None:
        self._products = products
        self._target = target
        self._mask = mask
        self._asked: tuple[Tensor, torch.dtype] | None = None
        self._forward = self._backward = False

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = inputs.device.type
        if not torch.is_autocast_enabled(device):
            return self._multiply(inputs, weight, bias)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            bias = None if bias is None else _cast(bias, dtype)
            return self._multiply(_cast(inputs, dtype), _cast(weight, dtype), bias)

    def _multiply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mask = self._mask()
        if mask is None or inputs.dtype != weight.dtype:
            return F.linear(inputs, weight, bias)
        if self._asked is None or self._asked[0] is not mask or self._asked[1] != weight.dtype:
            self._asked = mask, weight.dtype
            self._forward, self._backward = self._products.ask(
                self._target, self._target.matrix(mask), weight.detach(), bias
            )
        if not self._forward:
            return F.linear(inputs, weight, bias)
        return _Product.apply(inputs, weight, bias, self._products.run, self._backward)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        backward: bool,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.run, ctx.backward = run, backward
        return run(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_inputs = ctx.run(gradient, weight.t(), None) if ctx.backward else gradient @ weight
        if ctx.needs_input_grad[1]:
            of_weight = rows.t() @ inputs.reshape(-1, inputs.shape[-1])
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0)
        return of_inputs, of_weight, of_bias, None, None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """What a backend is asked about: a layer with these parameters."""
    layer = nn.Linear.__new__(nn.Linear)  # in each forward: without parameters to initialize
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return layer
