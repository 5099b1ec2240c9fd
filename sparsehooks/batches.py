"""Calibration batches, and how a model runs on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsehooks.errors import PlanError, SessionError
from sparsehooks.padding import Padding


class Batches:
    """The calibration batches, and how a model runs on them.

    Args:
        model: on its device.
        batches: mappings (keyword arguments of the forward), sequences (positional ones) or tensors.
        what: they are, for messages.

    Raises:
        PlanError: for what is no batches, in a sentence.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], what: str = "calibration") -> None:
        self.model, self._what = model, what
        device = next(model.parameters()).device
        if isinstance(batches, (str, bytes, Path, Mapping, Tensor)) or not isinstance(batches, Iterable):
            raise PlanError([f"{what}: got a {type(batches).__name__}; give a list of batches, dicts of tensors"])
        self._batches = [_moved(batch, device) for batch in batches]
        if not self._batches:
            raise PlanError([f"{what}: there is no batch in it; give an iterable of dicts of tensors"])
        for index, batch in enumerate(self._batches):
            if (why := _unfit(batch)) is not None:
                raise PlanError([f"{what}: batch {index} {why}"])

    def __len__(self) -> int:
        return len(self._batches)

    def forward(self, index: int) -> Any:
        """Run the model on a batch."""
        batch = self._batches[index]
        try:
            if isinstance(batch, Mapping):
                return self.model(**batch)
            return self.model(*batch) if isinstance(batch, (list, tuple)) else self.model(batch)
        except TypeError as error:
            raise SessionError(f"{self._what}: batch {index} does not fit the model's forward: {error}") from error

    def run(self) -> None:
        """Run the model on all, in evaluation mode and without gradients."""
        with measuring(self.model), torch.no_grad():
            for index in range(len(self)):
                self.forward(index)

    def order(self, names: Iterable[str]) -> dict[str, int]:
        """The place of each module in the order in which a forward first calls them; without those it does not call."""
        order: dict[str, int] = {}

        def noting(name: str) -> Callable[..., None]:
            def note(*_: Any) -> None:
                order.setdefault(name, len(order))

            return note

        handles = [self.model.get_submodule(name).register_forward_pre_hook(noting(name)) for name in names]
        try:
            self.forward(0)
        finally:
            for handle in handles:
                handle.remove()
        return order

    def padding(self, index: int) -> Padding:
        """Which tokens of a batch are real."""
        batch = self._batches[index]
        if isinstance(batch, Mapping):
            return Padding.of_call(self.model, (), batch)
        return Padding.of_call(self.model, batch if isinstance(batch, (list, tuple)) else (batch,), {})


def _unfit(batch: Any) -> str | None:
    """Why a model cannot run on a batch, as the end of a sentence."""
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, Mapping):
        if not any(isinstance(value, Tensor) for value in batch.values()):
            kinds = ", ".join(f"'{key}' as {type(value).__name__}" for key, value in batch.items())
            return f'holds no tensor ({kinds}); tokenize with return_tensors="pt"'
        return None
    if isinstance(batch, (list, tuple)) and any(isinstance(value, Tensor) for value in batch):
        return None
    return f'is a {type(batch).__name__}; give dicts of tensors, such as tokenizer(texts, return_tensors="pt")'


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (list, tuple) else value


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and without caches of keys and values."""
    training = [module for module in model.modules() if module.training]
    configs = (getattr(module, "config", None) for module in model.modules())  # a decoder has one of its own
    caching: list[Any] = [config for config in configs if getattr(config, "use_cache", None) is True]
    model.eval()
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
        for module in training:
            module.training = True
