"""What goes into layers: second moments of their inputs, without padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsehooks.components import Need
from sparsehooks.errors import SessionError
from sparsehooks.masks import check_finite
from sparsehooks.padding import Padding, without_padding
from sparsehooks.targets import Target

STRIP = 256
"""Inputs that are squared at once: in the cache, 20 times faster on a CPU than through memory."""


class Moments:
    """The running second moments of what goes into one layer, or into several that share their input."""

    def __init__(self, needs: Collection[Need]) -> None:
        self._wants_gram = Need.GRAM in needs
        self._wants_range = Need.INPUT_RANGE in needs
        self._sum: Tensor | None = None
        self._mean = self._peak = torch.zeros(())
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """See inputs, shape (tokens, columns)."""
        rows = rows.float()
        self.tokens += len(rows)
        if self._wants_range:
            size = rows.abs()
            self._mean = self._mean.to(rows.device) + size.sum(dim=0)
            self._peak = torch.maximum(self._peak.to(rows.device), size.amax(dim=0))
        if self._wants_gram:
            if self._sum is None:
                self._sum = rows.t() @ rows
            else:
                self._sum.addmm_(rows.t(), rows)
        else:
            if self._sum is None:
                self._sum = rows.new_zeros(rows.shape[1])
            for strip in rows.split(STRIP):
                self._sum += strip.square().sum(dim=0)

    def evidence(self, name: str) -> dict[str, Tensor]:
        """The fields of a ``WeightView``.

        Raises:
            SessionError: nothing was seen, or values that are not finite.
        """
        if self._sum is None:
            raise SessionError(f"no calibration batch reaches '{name}'; exclude it")
        if not self.tokens:
            raise SessionError(f"the calibration batches bring nothing but padding to '{name}'; give texts")
        check_finite(f"activations that enter '{name}', squared and summed,", self._sum, "look at the calibration data")
        mean = self._sum / self.tokens
        found = {"input_norm": (mean.diagonal().clamp(min=0) if self._wants_gram else mean).sqrt()}
        if self._wants_gram:
            found["gram"] = mean
        if self._wants_range:
            found |= {"input_mean": self._mean / self.tokens, "input_peak": self._peak}
        return found


def tokens_of(module: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs of a layer as (tokens, columns), without padding."""
    if isinstance(module, nn.Conv2d):
        unfolded = nn.functional.unfold(
            _padded(module, inputs), module.kernel_size, module.dilation, 0, cast(Any, module.stride)
        )
        return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
    return without_padding(inputs, mask).reshape(-1, inputs.shape[-1])


def _padded(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    edges = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(inputs, edges, mode=mode)


def unsupported(model: nn.Module, targets: Iterable[Target]) -> list[str]:
    """Why the inputs of some targets cannot be had as a matrix, a sentence each."""
    problems = []
    for target in targets:
        for name in target.modules:
            module = model.get_submodule(name)
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                continue
            if isinstance(module, nn.Conv2d):
                problems.append(f"'{name}' is a convolution of {module.groups} groups, which calibration does not see")
            elif not isinstance(module, nn.Linear) and not target.transposed:
                problems.append(f"'{name}' is a {type(module).__name__}; calibration sees Linear, Conv1D and Conv2d")
    return [f"{problem}; exclude it" for problem in problems]


class Collector:
    """Hooks on the modules of some targets that collect what goes into them.

    Args:
        model: in which they are.
        targets: whose inputs.
        needs: what of them; their norms at least.
    """

    def __init__(self, model: nn.Module, targets: Iterable[Target], needs: Collection[Need] = ()) -> None:
        self._modules = {name: model.get_submodule(name) for target in targets for name in target.modules}
        self._names = {target.parameter: target.modules for target in targets}
        self._needs = needs
        self._moments: dict[str, Moments] = {}
        self._leads: dict[str, bool] = {}
        self._padding = Padding()
        self._seen: list[tuple[Tensor, str]] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Collect inside."""
        handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            self._seen.clear()
            for handle in handles:
                handle.remove()

    def batch(self, padding: Padding) -> None:
        """The next batch begins."""
        self._padding = padding
        self._seen.clear()

    def evidence(self, target: Target) -> dict[str, Tensor]:
        """The fields of the target's view."""
        names = [name for name in target.modules if name in self._moments]
        moments = self._moments[names[0]] if names else Moments(self._needs)
        return moments.evidence(names[0] if names else target.modules[0])

    def _hook(self, name: str) -> Callable[..., None]:
        tied = next((names for names in self._names.values() if name in names), (name,))

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if name not in self._moments:
                # layers that receive the very same tensor (query, key, value) share what is collected
                leader = next((other for tensor, other in self._seen if tensor is inputs), None)
                shared = next((self._moments[other] for other in tied if other in self._moments), None)
                self._leads[name] = leader is None or shared is not None
                self._moments[name] = shared or (self._moments[leader] if leader else Moments(self._needs))
            if self._leads[name]:
                self._seen.append((inputs, name))
                self._moments[name].add(tokens_of(module, inputs.detach(), self._padding.of(name)))

        return hook
