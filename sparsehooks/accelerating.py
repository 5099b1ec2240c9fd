"""Models whose layers backends run, each layer the one that is fastest for it here."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from torch import nn

from sparsehooks.accelerated import Group, be_called, unswap
from sparsehooks.batches import Batches
from sparsehooks.catalog import Catalog
from sparsehooks.components import Backend
from sparsehooks.decoding import decode
from sparsehooks.errors import PlanError, PluginError, SessionError, SparseHooksError
from sparsehooks.plugins import PluginManager, as_manager
from sparsehooks.speed import Speeds
from sparsehooks.swapping import EffectiveWeight
from sparsehooks.targets import find, idle
from sparsehooks.trials import DENSE, Candidate, Trial, Verdict

AUTO = "auto"
TOKENS = (1, 16, 128, 512)
"""For how many tokens backends are timed where no example says."""


class Verdicts(dict[str, Verdict]):
    """The verdict of each layer, by its name; ``print`` shows a line for each kind of layer."""

    def __str__(self) -> str:
        return "\n".join(
            f"{count} layer{'s' * (count > 1)} of {kind}" for kind, count in Counter(map(str, self.values())).items()
        )

    @property
    def stays(self) -> dict[str, Mapping[str, str]]:
        """Why torch goes on to run a layer, by backend, for each layer where it does so for all numbers of tokens."""
        return {name: v.reasons for name, v in self.items() if not any(lane.backend for lane in v.lanes)}

    def to_dict(self) -> dict[str, Any]:
        """As plain values; a lane without end ends at None."""
        found = {name: asdict(verdict) for name, verdict in self.items()}
        for verdict in found.values():
            verdict["lanes"] = [[None if most == math.inf else most, backend] for most, backend in verdict["lanes"]]
        return found


def accelerate_model(
    model: nn.Module,
    backend: str = AUTO,
    example: Any = None,
    targets: Sequence[str] = ("Linear",),
    exclude: Sequence[str] = (),
    plugins: Sequence[Any] | PluginManager = (),
) -> Verdicts:
    """Let backends run the layers of a finished model, in place and for inference only.

    Weights stay dense in the model, which is saved, moved and copied like any other; what backends make of them lies
    beside them in memory. ``restore_model`` undoes this.
    Call ``model.eval()`` first: dropout and whatever else acts while a model trains acts as it does in torch.
    Each layer's outputs are compared with torch's before a backend may run it. Where a backend rounds what enters a
    layer, a grid that the model has there (``activation = "int8"``) gives way; thresholds stay. Change weights before
    this, not after: what is written through ``weight.data``, as merging an adapter does, goes unnoticed, and so does
    what is written into weights that were made in ``torch.inference_mode``. What ``torch.export`` and
    ``torch.jit.trace`` make of the model is torch's alone.

    Args:
        model: opened, or after its run; on the device where it shall run.
        backend: the name of one, which then runs every layer that it can, at any speed; or ``"auto"``: those of all
            plugins are timed against torch, and of them the fastest runs a layer, for each number of tokens, if it is
            3 % faster than torch. One that rounds is only tried where the model rounds the layer's input already.
            What was timed on this machine before is not timed again; ``sparsehooks/speeds.json`` in the user's cache
            folder remembers it ($XDG_CACHE_HOME or ~/.cache), delete that to measure anew. A layer so small that torch,
            at the fewest tokens that it would run, lost 3 % by being looked up stays as it is.
        example: a batch, as the model takes it. Only the numbers of tokens that it sends through a layer are timed,
            and fewer run dense; without it these are 1, 16, 128 and 512.
        targets: which layers, as in a recipe.
        exclude: which of them not.
        plugins: see ``PluginManager``.

    Returns:
        who runs each layer, how fast, and why not others. Whoever ran them before no longer does.

    Raises:
        PlanError: if a layer is in the middle of a run, the backend that was named can run none, or an argument is not
            what it has to be.
        PluginError: if there is no such backend.
        RecipeError: if a target matches nothing.
        SessionError: if the model cannot run on the example.
    """
    verdicts = judge(model, backend, Speeds.load(), example, targets, exclude, plugins)
    for note in idle(model, exclude):
        warnings.warn(note, stacklevel=2)
    return verdicts


def restore_model(model: nn.Module) -> None:
    """Let torch run all layers again, with the weights that they have."""
    for module in model.modules():
        unswap(module)


def judge(
    model: nn.Module,
    backend: str,
    speeds: Speeds,
    example: Any = None,
    targets: Sequence[str] = ("Linear",),
    exclude: Sequence[str] = (),
    plugins: Sequence[Any] | PluginManager = (),
) -> Verdicts:
    """``accelerate_model``, which takes those speeds as given that are known."""
    _check(model, backend, targets, exclude)
    candidates = _candidates(as_manager(plugins).catalog, backend)
    names = [name for target in find(model, targets, exclude)[0] for name in target.modules]
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if isinstance(layer, EffectiveWeight):
            raise PlanError([f"'{name}' belongs to a run that has not ended; finish it first"])
    counts = None if backend != AUTO else _counts(model, layers, example)
    for layer in layers.values():
        unswap(layer)
    group, verdicts = Group(named=counts is None), Verdicts()
    for name, layer in layers.items():
        parents = [model.get_submodule(".".join(name.split(".")[:depth])) for depth in range(name.count(".") + 1)]
        trial = Trial(name, layer, candidates, speeds, group, unfit=_nested(parents))
        verdicts[name] = trial.named() if counts is None else trial.timed(counts[name])
        if isinstance(parents[-1], nn.TransformerEncoderLayer):
            be_called(layer)
    speeds.save()
    if backend != AUTO and len(verdicts.stays) == len(layers):
        name, reasons = next(iter(verdicts.stays.items()))
        raise PlanError([f"'{backend}' can run none of the {len(layers)} layers; '{name}': {reasons[backend]}"])
    return verdicts


def _check(model: Any, backend: Any, targets: Any, exclude: Any) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError([f"accelerate_model takes a model, not a {type(model).__name__}; open the folder first"])
    if not isinstance(backend, str):
        raise PlanError([f"accelerate_model takes the name of a backend, or '{AUTO}', not {backend!r}"])
    for key, patterns in (("targets", targets), ("exclude", exclude)):
        if isinstance(patterns, str) or not isinstance(patterns, Collection):
            raise PlanError([f"accelerate_model takes a list of layers as '{key}', not {patterns!r}"])
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise PlanError([f"accelerate_model takes names of layers in '{key}', not {pattern!r}"])


def _nested(parents: Sequence[nn.Module]) -> str | None:
    """Why a layer of torch's own encoder stays: that makes nested tensors of padded inputs, and then reads weights."""
    if any(isinstance(parent, nn.TransformerEncoder) and parent.use_nested_tensor for parent in parents):
        return "nn.TransformerEncoder may read its weight and not call it; build it with enable_nested_tensor=False"
    return None


def _candidates(catalog: Catalog, backend: str) -> dict[str, Candidate]:
    """The backend of this name; or all but torch itself."""
    if backend != AUTO:
        return {backend: _candidate(catalog, backend)}
    found = {}
    for name in sorted({record.component.name for record in catalog.records("backend")} - {DENSE}):
        try:
            found[name] = _candidate(catalog, name)
        except PluginError as error:
            warnings.warn(f"the backend '{name}' is not tried: {error}", stacklevel=4)
    return found


def _candidate(catalog: Catalog, name: str) -> Candidate:
    record, options = catalog.resolve("backend", name)
    cls = record.load()
    config: Any = decode(cls.Config, options, f"backend '{name}'")
    return Candidate(record, cast(Backend, cls(config)))


def _counts(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> dict[str, list[int]]:
    """For how many tokens to time each layer."""
    if example is None:
        return {name: list(TOKENS) for name in layers}
    seen: dict[str, set[int]] = {name: set() for name in layers}

    def see(name: str, values: Any) -> None:
        seen[name].add(values.numel() // max(1, values.shape[-1]))

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, args[0] if args else kwargs["input"]), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        Batches(model, [example], "example").run()
    except SparseHooksError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SessionError(f"example: the model cannot run on it: {why}") from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: sorted(found - {0}) for name, found in seen.items()}
