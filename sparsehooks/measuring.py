"""Measurements on models: how sparse what enters their layers is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sparsehooks.batches import Batches
from sparsehooks.padding import Padding, without_padding
from sparsehooks.sampling import Recorder
from sparsehooks.targets import find


def activation_sparsity(
    model: nn.Module, batches: Iterable[Any], targets: Sequence[str] = ("Linear",)
) -> list[dict[str, Any]]:
    """How sparse the inputs of layers are, without padding.

    Args:
        model: runs in evaluation mode.
        batches: mappings of inputs, tensors, or tuples of them.
        targets: which layers, as in a recipe.

    Returns:
        for each layer ``module``, ``values`` (how many were seen), ``zeros`` (the share of exact zeros) and
        ``near_zeros`` (the share of magnitudes below 1 % of the root mean square; zeros among them).
    """
    runs = Batches(model, batches)
    chosen = {id(model.get_submodule(name)) for target in find(model, targets, ())[0] for name in target.modules}
    layers = {name: module for name, module in model.named_modules() if id(module) in chosen}
    recorder = Recorder()
    squares, counts, zeros, near = (dict.fromkeys(layers, 0.0) for _ in range(4))

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.padding = Padding.of_call(module, args, kwargs)

    def first(name: str, values: Tensor) -> None:
        squares[name] += float(values.double().square().sum())
        counts[name] += values.numel()
        zeros[name] += int((values == 0).sum())

    def second(name: str, values: Tensor) -> None:
        rms = math.sqrt(squares[name] / max(counts[name], 1))
        near[name] += int(((values.double().abs() < rms / 100) | (values == 0)).sum())

    for measure in (first, second):

        def look(module: nn.Module, args: tuple[Any, ...], measure: Any = measure) -> None:
            incoming = getattr(module, "_sparsehooks_incoming", lambda values: values)
            name = next(name for name, layer in layers.items() if layer is module)
            measure(name, without_padding(incoming(args[0]), recorder.padding.of(name)))

        handles = [layer.register_forward_pre_hook(look) for layer in layers.values()]
        handles.append(model.register_forward_pre_hook(see, with_kwargs=True))
        try:
            runs.run()
        finally:
            for handle in handles:
                handle.remove()
    return [
        {
            "module": name,
            "values": int(counts[name]),
            "zeros": zeros[name] / max(counts[name], 1),
            "near_zeros": near[name] / max(counts[name], 1),
        }
        for name in layers
    ]
