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
        self._told: set[str] = set()

    def of(self, target: Target, mask: Callable[[], Tensor | None]) -> Product:
        """The product of a target's layers: dense, with a warning, where the backend does not take them.

        Args:
            target: the weight.
            mask: gives its mask, always the same tensor until it changes; None while more shall be masked.
        """
        asked: tuple[Tensor, torch.dtype] | None = None
        forward = backward = False

        def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            nonlocal asked, forward, backward
            device = inputs.device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                with torch.autocast(device, enabled=False):
                    return multiply(
                        _cast(inputs, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
                    )
            kept = mask()
            if kept is None or inputs.dtype != weight.dtype:
                return F.linear(inputs, weight, bias)
            if asked is None or asked[0] is not kept or asked[1] != weight.dtype:
                asked = kept, weight.dtype
                forward, backward = self._ask(target, target.matrix(kept), weight.detach(), bias)
            if not forward:
                return F.linear(inputs, weight, bias)
            return _Product.apply(inputs, weight, bias, self._run, backward)  # type: ignore[no-any-return, no-untyped-call]

        return torch.compiler.disable(multiply)  # type: ignore[no-any-return]

    def _ask(self, target: Target, mask: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool]:
        """Whether the backend multiplies by every weight that has this mask, and by its transpose."""
        full = torch.where(mask, 1, weight)  # a weight that is zero now need not stay so
        with attributed(self._record):
            support = self._backend.supports(_layer(full, bias), weight.device)
            backward = support.ok and self._backend.supports(_layer(full.t(), None), weight.device).ok
        layer, reason = target.modules[0], support.reason
        if not support.ok and not self._told & {layer, reason}:
            self._told |= {layer, reason}
            message = f"{self._label}: '{layer}', and others likewise, multiply densely: {reason}"
            warnings.warn(message, stacklevel=2)
        return support.ok, backward

    def _run(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with attributed(self._record):
            return self._backend.run(self._backend.pack(_layer(weight, bias)), inputs)


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
