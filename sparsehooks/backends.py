"""Models whose layers a backend runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from sparsehooks.components import Backend
from sparsehooks.errors import PlanError
from sparsehooks.plugins import PluginManager, as_manager, attributed
from sparsehooks.sites import put, take
from sparsehooks.swapping import EffectiveWeight
from sparsehooks.targets import find


def use_backend(
    model: nn.Module,
    backend: str,
    targets: Sequence[str] = ("Linear",),
    exclude: Sequence[str] = (),
    plugins: Sequence[Any] | PluginManager = (),
) -> dict[str, str]:
    """Let a backend run the layers of a finished model, in place and for inference only.

    Thresholds of activations stay. Where the backend rounds what enters a layer, a grid that the model has there
    (``activation = "int8"``) gives way.

    Args:
        model: opened, or after its run; on the device where it shall run.
        backend: such as ``"int8"``.
        targets: which layers, as in a recipe.
        exclude: which of them not.
        plugins: see ``PluginManager``.

    Returns:
        why a layer stays as it is, for each that does, by its name.

    Raises:
        PlanError: if no layer can change; then none has.
        PluginError: if there is no such backend.
    """
    record, options = as_manager(plugins).catalog.resolve("backend", backend)
    cls = record.load()
    runner = cast(Backend, cls(cls.Config(**options)))
    names = [name for target in find(model, targets, exclude)[0] for name in target.modules]
    stays: dict[str, str] = {}
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, EffectiveWeight):
            raise PlanError([f"'{name}' belongs to a run that has not ended; finish it first"])
        site = take(layer)
        with attributed(record):
            support = runner.supports(layer, next(layer.parameters()).device)
            converted = runner.convert(layer) if support.ok else layer
        if not support.ok:
            stays[name] = support.reason
        converted.train(layer.training)
        model.set_submodule(name, converted)
        if site is not None and not (support.ok and runner.rounds_inputs and site.component.rounds):
            put(converted, site)
    if len(stays) == len(names):
        first = next(iter(stays.items()), ("", "no layer matches"))
        raise PlanError([f"'{backend}' can run none of the {len(names)} layers; '{first[0]}': {first[1]}"])
    return stays
