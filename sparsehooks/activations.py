"""Activation stages at work: functions that turn into ReLU, and thresholds below which values become zero.

A module's class is swapped for a subclass, as in ``swapping``: parameters, state-dict keys and ``deepcopy`` stay as
they are. Thresholds stay in place on the finished model; config.json carries them, and opening applies them again.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparsehooks import distributed, swapping
from sparsehooks.components import Activation
from sparsehooks.decoding import decode
from sparsehooks.errors import PluginError, RecipeError, SessionError
from sparsehooks.plugins import installed_catalog
from sparsehooks.targets import Target, find

if TYPE_CHECKING:
    from sparsehooks.plan import PlannedStage

SMOOTH = ("GELU", "SiLU", "Mish", "Swish")
"""What the class of a smooth activation function has in its name."""
KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
"""Under which keys the configs of transformers name their activation function."""
LIMIT = 1 << 20
"""How many values of a layer a threshold is fitted to; of more, a random part counts."""
GRID = 1024
"""In how many steps the schedule's share is told apart."""


# ---------------------------------------------------------------------------------------------------------- calibration


@dataclass
class Recorder:
    """What the layers have to know of the batch that runs.

    Attributes:
        on: whether values are collected.
        mask: the attention mask of the batch, if it has one.
    """

    on: bool = False
    mask: Tensor | None = None


class Sample:
    """The magnitudes that have passed a layer.

    Args:
        name: of the module, for messages.
        recorder: tells what to collect.
    """

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name = name
        self._recorder = recorder
        self._parts: list[Tensor] = []
        self._rate = 1.0
        self._generator = torch.Generator().manual_seed(distributed.seed_of(name))

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Collect the magnitudes of a batch, without padding.

        Raises:
            SessionError: if they are not finite.
        """
        if not self._recorder.on:
            return
        magnitudes = without_padding(values.detach(), self._recorder.mask).abs().flatten()
        if not bool(magnitudes.isfinite().all()):
            raise SessionError(f"the activations of '{self.name}' are not finite; look at the data, or exclude it")
        self._parts.append(self._thin(magnitudes, self._rate))
        while self._rate > 2**-40 and sum(part.numel() for part in self._parts) > LIMIT:
            self._rate /= 2
            self._parts = [self._thin(torch.cat(self._parts), 0.5)]

    def table(self, sparsity: float) -> Tensor:
        """The thresholds at the shares 0, 1/GRID, ..., 1 of the sparsity: order statistics, -1 where nothing goes.

        Raises:
            SessionError: if nothing was collected.
        """
        ordered = torch.cat(self._parts).sort().values if self._parts else torch.empty(0)
        if not ordered.numel():
            raise SessionError(f"nothing has passed '{self.name}' yet; give calibration batches, or exclude it")
        counts = [round(sparsity * share / GRID * ordered.numel()) for share in range(GRID + 1)]
        picked = ordered[torch.tensor([max(count - 1, 0) for count in counts], device=ordered.device)].double()
        table = torch.where(torch.tensor(counts, device=picked.device) > 0, picked, -1.0)
        distributed.average(table)
        return table.cpu()

    def _thin(self, values: Tensor, rate: float) -> Tensor:
        if rate == 1.0:
            return values
        return values[(torch.rand(values.numel(), generator=self._generator) < rate).to(values.device)]


def without_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values of real tokens, (tokens, features), where the mask fits; else all."""
    if mask is None or mask.dim() != 2:
        return values
    if values.dim() > 2 and values.shape[:2] == mask.shape:
        return values[mask.to(values.device).bool()]
    if values.dim() == 2 and values.shape[0] == mask.numel() != mask.shape[0]:
        return values[mask.to(values.device).bool().flatten()]
    return values


# ------------------------------------------------------------------------------------------------------ swapped modules


@dataclass
class Site:
    """What a swapped module does to its values.

    Attributes:
        use: the component's name.
        options: its options.
        component: itself.
        amount: the threshold, or the share of a function; None: nothing yet.
        sample: collects the values, during calibration.
    """

    use: str
    options: Mapping[str, Any]
    component: Activation
    amount: float | None = None
    sample: Sample | None = None

    def threshold(self, values: Tensor) -> Tensor:
        """The values with zeros."""
        if self.sample is not None:
            self.sample.add(values)
        return values if self.amount is None else self.component.apply(values, self.amount)

    def to_plain(self) -> dict[str, Any]:
        """For config.json."""
        return {**self.options, "use": self.use, "amount": self.amount}


class Sparse:
    """The mixin of all swapped modules."""

    _sparsehooks_site: Site


class SparseInput(Sparse):
    """A layer that zeroes inputs."""

    def _sparsehooks_incoming(self, values: Tensor) -> Tensor:
        return self._sparsehooks_site.threshold(values)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """The layer's forward of the sparse input."""
        return super().forward(self._sparsehooks_site.threshold(input))  # type: ignore[misc,no-any-return]


class SparseOutput(Sparse):
    """An activation function that zeroes outputs."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The function's forward, made sparse."""
        return self._sparsehooks_site.threshold(super().forward(input))  # type: ignore[misc]


class MixedFunction(Sparse):
    """An activation function that turns into another one."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The mix of both."""
        site, before = self._sparsehooks_site, super().forward(input)  # type: ignore[misc]
        return before if site.amount is None else site.component.apply(input, site.amount, before)


MIXINS: Mapping[str, type[Sparse]] = {"input": SparseInput, "output": SparseOutput, "function": MixedFunction}


@functools.cache
def _made(mixin: type[Sparse], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Sparse{cls.__name__}", (mixin, cls), {})


def _put(module: Any, site: Site) -> None:
    """Swap the class of a module, below that of an effective weight."""
    _take(module)
    cls, effective = _own(module)
    made: Any = _made(MIXINS[site.component.place], cls)  # type: ignore[arg-type]
    module.__class__ = swapping._swapped(made) if effective else made
    module._sparsehooks_site = site


def _take(module: nn.Module) -> Site | None:
    """Undo ``_put``, and give what it had put."""
    if not isinstance(module, Sparse):
        return None
    swapped: Any = module
    cls, effective = _own(swapped)
    inner: Any = _inner(cls)
    site = module._sparsehooks_site
    swapped.__class__ = swapping._swapped(inner) if effective else inner
    del swapped._sparsehooks_site
    return site


def _own(module: nn.Module) -> tuple[type[nn.Module], bool]:
    """The module's class without an effective weight, and whether it has one."""
    cls = type(module)
    effective = issubclass(cls, swapping.EffectiveWeight)
    return (cls.__mro__[2] if effective else cls), effective


def _inner(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that was swapped: what follows the two mixins."""
    return cls.__mro__[3]


def _replace(model: nn.Module, module: nn.Module, site: Site) -> bool:
    """Put the function that the component ends in under every name of the module."""
    made: Any = site.component.replacement()
    if made is None:
        return False
    made.train(module.training)
    made._sparsehooks_site = site
    for name in [name for name, other in model.named_modules(remove_duplicate=False) if other is module]:
        model.set_submodule(name, made)
    return True


# --------------------------------------------------------------------------------------------------------------- stages


def sites(model: nn.Module, component: Activation, targets: Iterable[Target | str]) -> list[str]:
    """The modules that a component acts on: the target layers, or the activation functions beside them."""
    names = [name for item in targets for name in ((item,) if isinstance(item, str) else item.modules)]
    chosen = {id(model.get_submodule(name)) for name in names}
    if component.place == "input":
        layers = ((name, module) for name, module in model.named_modules() if id(module) in chosen)
        return [name for name, module in layers if not isinstance(module, nn.Embedding)]
    found = []
    for name, module in model.named_modules():
        known = SMOOTH if component.place == "function" else (*SMOOTH, "ReLU")
        cls = type(module).__name__
        beside = name.rpartition(".")[0]
        prefix = f"{beside}." if beside else ""
        is_function = any(word in cls for word in known) and not list(module.parameters())
        if is_function and not list(module.children()) and any(other.startswith(prefix) for other in names):
            found.append(name)
    return found


def problems(planned: PlannedStage, component: Activation, model: nn.Module) -> list[str]:
    """Why an activation stage cannot run on the model, one sentence each."""
    use, sparsity = planned.stage.component.use, getattr(planned.stage, "sparsity", None)
    found = []
    if component.calibrated and sparsity is None:
        found.append(f"{planned.path}: 'sparsity' is missing, such as 0.5: '{use}' has a threshold")
    if not component.calibrated and sparsity is not None:
        found.append(f"{planned.path}: 'sparsity' does not apply to '{use}', which has no threshold; leave it out")
    names = sites(model, component, planned.targets)
    if planned.targets and not names:
        found.append(f"{planned.path}: '{use}' finds nothing to act on at the targets; choose others")
    for name in names:
        if "forward" in vars(model.get_submodule(name)):
            found.append(f"{planned.path}: '{name}' has a forward of its own (offloading does this); exclude it")
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            found.append(f"{planned.path}: '{name}' is never called by nn.MultiheadAttention; exclude it")
    return found


@dataclass
class _Run:
    """A stage that has started."""

    sites: dict[str, Site]
    component: Activation
    sparsity: float
    share: float = 0.0
    seen: int = 0
    tables: dict[str, Tensor] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        return self.component.calibrated and not self.tables


class Activations:
    """The activation stages of a session.

    Args:
        stages: each planned stage, its component, and its targets (or names of modules).
        model: the unwrapped model.
    """

    def __init__(
        self, stages: Sequence[tuple[PlannedStage, Activation, Sequence[Target | str]]], model: nn.Module
    ) -> None:
        self._stages = {planned.index: (planned, component, targets) for planned, component, targets in stages}
        self._model = model
        self._runs: dict[int, _Run] = {}
        self._before: dict[str, tuple[nn.Module, Site | None]] = {}
        self._recorder = Recorder()
        self._calibrating = False
        self._hook: Any = None

    def start(self, stage: PlannedStage | int) -> None:
        """Swap the modules of a stage; from now on it collects what it needs. A stage starts once.

        Raises:
            SessionError: if another stage has one of the modules, or the sparsity is missing.
        """
        index = stage if isinstance(stage, int) else stage.index
        if index in self._runs:
            return
        planned, component, targets = self._stages[index]
        sparsity = getattr(planned.stage, "sparsity", None)
        if component.calibrated and sparsity is None:
            raise SessionError(f"{planned.label}: 'sparsity' is missing, such as 0.5")
        use = planned.stage.component
        made: dict[str, Site] = {}
        names = sites(self._model, component, targets)
        if taken := next((name for name in names if name in self._before), None):
            raise SessionError(f"{planned.label}: another stage has '{taken}' already; exclude it from one of them")
        for name in names:
            module: Any = self._model.get_submodule(name)
            if not isinstance(module, Sparse) and hasattr(module, "_sparsehooks_site"):
                raise SessionError(f"{planned.label}: an earlier run has replaced '{name}'; exclude it")
            self._before[name] = module, _take(module)
            made[name] = Site(use.use, dict(use.options), component)
            if component.calibrated:
                made[name].sample = Sample(name, self._recorder)
            _put(module, made[name])
        self._runs[index] = _Run(made, component, sparsity or 0.0)
        if component.calibrated and self._hook is None:
            self._hook = self._model.register_forward_pre_hook(self._see, with_kwargs=True)

    def advance(self, stage: PlannedStage | int, share: float) -> None:
        """Let a stage be at a share of its schedule; it starts if it has not."""
        index = stage if isinstance(stage, int) else stage.index
        self.start(index)
        self._runs[index].share = share
        self._set(self._runs[index])

    def calibrate(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Fit the thresholds of the stages that have started on batches, in evaluation mode.

        Functions that turn into others count as what they turn into.

        Raises:
            SessionError: if there are no batches, or values are not finite.
        """
        for run in self._runs.values():
            if not run.component.calibrated:
                run.share = 1.0
                self._set(run)
        self._calibrating = True
        try:
            _forward(model, batches)
        finally:
            self._calibrating = False
            self._recorder.on = False
        for run in self._runs.values():
            if run.waits:
                self._fit(run)

    def finish(self) -> dict[str, Any]:
        """Make the model what it stays: for ``SparseHooksConfig(activations=...)``.

        Raises:
            SessionError: if a threshold has seen no data.
        """
        for run in self._runs.values():
            if run.waits:
                self._fit(run)
            self._set(run)
        self._unhook()
        replaced = set()
        for run in self._runs.values():
            for name, site in run.sites.items():
                module = self._model.get_submodule(name)
                if site.component.place == "function" and site.amount == 1.0:
                    cls = _inner(_own(module)[0])
                    if _replace(self._model, module, site):
                        _take(module)
                        replaced.add((cls, site.component.hidden_act))
        _rename(self._model, replaced)
        self._runs, self._before = {}, {}
        return recorded(self._model)

    def abort(self) -> None:
        """Undo everything."""
        self._unhook()
        for module, site in self._before.values():
            _take(module)
            if site is not None:
                _put(module, site)
        self._runs, self._before = {}, {}

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """What a resumed run needs, as plain values and tensors."""
        return {index: {"share": run.share, "tables": dict(run.tables)} for index, run in self._runs.items()}

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Take back what ``state_dict`` gave; stages that had started start."""
        for index, saved in state.items():
            self.start(index)
            run = self._runs[index]
            run.share, run.tables = saved["share"], dict(saved["tables"])
            if run.tables:
                self._fitted(run)
            self._set(run)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward of the model: is it one to collect from?"""
        for run in self._runs.values():
            if run.waits and not self._calibrating and run.seen >= run.component.batches():
                self._fit(run)
                self._set(run)
        self._recorder.on = self._calibrating or module.training
        self._recorder.mask = _mask(module, args, kwargs)
        if self._recorder.on:
            for run in self._runs.values():
                run.seen += 1

    def _fit(self, run: _Run) -> None:
        for name, site in run.sites.items():
            assert site.sample is not None
            run.tables[name] = site.sample.table(run.sparsity)
        self._fitted(run)

    def _fitted(self, run: _Run) -> None:
        for site in run.sites.values():
            site.sample = None
        if not any(other.waits for other in self._runs.values()):
            self._unhook()

    def _set(self, run: _Run) -> None:
        for name, site in run.sites.items():
            if not run.component.calibrated:
                site.amount = float(run.share)
            elif run.tables:
                threshold = float(run.tables[name][round(run.share * GRID)])
                site.amount = threshold if threshold >= 0 else None

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def recorded(model: nn.Module) -> dict[str, Any]:
    """What acts on the activations of a finished model: for ``SparseHooksConfig(activations=...)``."""
    found = {}
    for name, module in model.named_modules():
        site = vars(module).get("_sparsehooks_site")
        if site is not None and site.amount is not None:
            found[name] = site.to_plain()
    return found


def check(entries: Any) -> str | None:
    """Why this is not what ``recorded`` gives, or None."""
    if not isinstance(entries, Mapping):
        return "'activations' must be a table"
    for name, entry in entries.items():
        if not (isinstance(entry, Mapping) and isinstance(entry.get("use"), str)):
            return f"'activations' needs 'use' for '{name}'"
        amount = entry.get("amount")
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < math.inf:
            return f"'activations' gives '{name}' the amount {amount!r}"
    return None


def apply_activations(model: nn.Module, entries: Mapping[str, Any]) -> None:
    """Put on a model what ``recorded`` gave of another.

    Raises:
        ValueError: if a component or a module is missing, or an option is wrong.
    """
    made: dict[str, Activation] = {}
    catalog = installed_catalog() if entries else None
    for name, entry in entries.items():
        options = {key: value for key, value in entry.items() if key not in ("use", "amount")}
        key = repr((entry["use"], sorted(options.items(), key=str)))
        try:
            if key not in made:
                assert catalog is not None
                record, given = catalog.resolve("activation", entry["use"])
                cls = record.load()
                config: Any = decode(cls.Config, {**given, **options}, f"activations '{name}'")
                made[key] = cast(Activation, cls(config))
            module = model.get_submodule(name)
        except (RecipeError, PluginError, AttributeError) as error:
            raise ValueError(str(error)) from error
        site = Site(entry["use"], options, made[key], float(entry["amount"]))
        if "forward" in vars(module):
            raise ValueError(f"'{name}' has a forward of its own (offloading does this); load it on one device")
        if not (site.component.place == "function" and site.amount == 1.0 and _replace(model, module, site)):
            _put(module, site)


def _rename(model: nn.Module, replaced: Iterable[tuple[type[nn.Module], str | None]]) -> None:
    """Have the configs name the new function where no module of the old one is left."""
    from transformers.activations import ACT2FN

    for cls, new in replaced:
        if new is None or any(isinstance(module, cls) for module in model.modules()):
            continue
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            for key in KEYS:
                old = getattr(config, key, None)
                if isinstance(old, str) and old in ACT2FN and type(ACT2FN[old]) is cls:
                    setattr(config, key, new)


# -------------------------------------------------------------------------------------------------------------- reports


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
    batches = list(batches)
    chosen = {id(model.get_submodule(name)) for target in find(model, targets, ())[0] for name in target.modules}
    layers = {name: module for name, module in model.named_modules() if id(module) in chosen}
    recorder = Recorder()
    squares, counts, zeros, near = (dict.fromkeys(layers, 0.0) for _ in range(4))

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.mask = _mask(module, args, kwargs)

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
            measure(name, without_padding(incoming(args[0]), recorder.mask))

        handles = [layer.register_forward_pre_hook(look) for layer in layers.values()]
        handles.append(model.register_forward_pre_hook(see, with_kwargs=True))
        try:
            _forward(model, batches)
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


def _mask(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        mask = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)).get("attention_mask")
    return mask if isinstance(mask, Tensor) else None


@torch.no_grad()
def _forward(model: nn.Module, batches: Iterable[Any]) -> None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    with _evaluating(model):
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**{key: move(value) for key, value in batch.items()})
            else:
                model(*(move(value) for value in (batch if isinstance(batch, (tuple, list)) else (batch,))))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
