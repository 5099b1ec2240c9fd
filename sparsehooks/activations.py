"""Activation stages at work: functions that turn into ReLU, thresholds below which values become zero, and grids.

A module's class is swapped for a subclass, as in ``swapping``: parameters, state-dict keys and ``deepcopy`` stay as
they are. Thresholds and ranges stay in place on the finished model; config.json carries them, and opening applies them
again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsehooks import distributed
from sparsehooks.batches import Batches
from sparsehooks.components import Activation
from sparsehooks.errors import SessionError
from sparsehooks.learned import Learned
from sparsehooks.padding import Padding
from sparsehooks.sampling import GRID, Recorder, Sample
from sparsehooks.sites import Site, Sparse, own, put, recorded, replace, take
from sparsehooks.swapping import inner
from sparsehooks.targets import Target

if TYPE_CHECKING:
    from sparsehooks.stages import PlannedStage

SMOOTH = ("GELU", "SiLU", "Mish", "Swish")
"""What the class of a smooth activation function has in its name."""
KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
"""Under which keys the configs of transformers name their activation function."""

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
    if component.calibrated == "sparsity" and sparsity is None:
        found.append(f"{planned.path}: 'sparsity' is missing, such as 0.5: '{use}' has a threshold")
    if component.calibrated != "sparsity" and sparsity is not None:
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
        return self.component.calibrated is not None and not self.tables


class Activations:
    """The activation stages of a session.

    Args:
        stages: each planned stage, its component, and its targets (or names of modules).
        model: the unwrapped model.
        learned: takes the amounts that train; without it they stay as they are.
    """

    def __init__(
        self,
        stages: Sequence[tuple[PlannedStage, Activation, Sequence[Target | str]]],
        model: nn.Module,
        learned: Learned | None = None,
    ) -> None:
        self._learned = learned
        self._stages = {planned.index: (planned, component, targets) for planned, component, targets in stages}
        self._model = model
        self._runs: dict[int, _Run] = {}
        self._before: dict[str, tuple[nn.Module, Site | None]] = {}
        self._recorder = Recorder()
        self._calibrating = False
        self._hooks: list[Any] = []

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
        if component.calibrated == "sparsity" and sparsity is None:
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
            self._before[name] = module, take(module)
            made[name] = Site(use.use, dict(use.options), component)
            if component.calibrated:
                made[name].sample = Sample(name, self._recorder)
            put(module, made[name])
        self._runs[index] = _Run(made, component, sparsity or 0.0)
        if component.calibrated and not self._hooks:
            self._hooks = [
                self._model.register_forward_pre_hook(self._see, with_kwargs=True),
                # what gradient checkpointing runs again, in the backward, was seen already
                self._model.register_forward_hook(self._rest, always_call=True),
            ]

    def advance(self, stage: PlannedStage | int, share: float) -> None:
        """Let a stage be at a share of its schedule; it starts if it has not."""
        index = stage if isinstance(stage, int) else stage.index
        self.start(index)
        self._runs[index].share = share
        self._set(self._runs[index])

    def calibrate(self, batches: Batches) -> None:
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
            batches.run()
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
            for site in run.sites.values():
                site.learned = None
        self._unhook()
        replaced = set()
        for run in self._runs.values():
            for name, site in run.sites.items():
                module = self._model.get_submodule(name)
                if site.component.place == "function" and site.amount == 1.0:
                    cls = inner(own(module)[0])
                    if replace(self._model, module, site):
                        take(module)
                        replaced.add((cls, site.component.hidden_act))
        _rename(self._model, replaced)
        self._runs, self._before = {}, {}
        return recorded(self._model)

    def abort(self) -> None:
        """Undo everything."""
        self._unhook()
        self._stop(list(self._before))
        self._runs = {}

    def _stop(self, names: Iterable[str]) -> None:
        for name in names:
            module, site = self._before.pop(name)
            take(module)
            if site is not None:
                put(module, site)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """What a resumed run needs, as plain values and tensors."""
        return {index: {"share": run.share, "tables": dict(run.tables)} for index, run in self._runs.items()}

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Take back what ``state_dict`` gave; stages that had started start, the others stop."""
        for index in self._runs.keys() - state.keys():
            self._stop(self._runs.pop(index).sites)
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
        self._recorder.padding = Padding.of_call(module, args, kwargs)
        if self._recorder.on:
            for run in self._runs.values():
                run.seen += 1

    def _rest(self, *_: Any) -> None:
        self._recorder.on = False

    def _fit(self, run: _Run) -> None:
        for name, site in run.sites.items():
            assert site.sample is not None
            if run.component.calibrated == "sparsity":
                run.tables[name] = site.sample.table(run.sparsity)
            else:
                run.tables[name] = torch.full((GRID + 1,), _reach(run.component, site.sample), dtype=torch.float64)
        self._fitted(run)

    def _fitted(self, run: _Run) -> None:
        for name, site in run.sites.items():
            site.sample = None
            if run.component.learned and self._learned is not None:
                device = next(self._model.get_submodule(name).parameters()).device
                made = {"amount": run.tables[name][-1].to(torch.float32)}
                self._learned.add(f"activation.{name}", made, device, run.component.learning_rate())
                site.learned = self._learned.of(f"activation.{name}")["amount"]
        if not any(other.waits for other in self._runs.values()):
            self._unhook()

    def _set(self, run: _Run) -> None:
        for name, site in run.sites.items():
            if not run.component.calibrated:
                site.amount = float(run.share)
            elif site.learned is not None:
                site.amount = max(0.0, float(site.learned.detach()))
            elif run.tables:
                threshold = float(run.tables[name][round(run.share * GRID)])
                site.amount = threshold if threshold >= 0 else None

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _reach(component: Activation, sample: Sample) -> float:
    """The mean over the ranks."""
    magnitudes, peaks = sample.seen()
    reach = peaks.new_tensor([component.reach(magnitudes, peaks)], dtype=torch.float64)
    distributed.average(reach)
    return float(reach)


@contextmanager
def exact_inputs(model: nn.Module, batches: Batches) -> Iterator[None]:
    """Inside, inputs of layers lie on no grids; those that were fitted once are fitted anew at the end."""
    found = {name: site for name, module in model.named_modules() if (site := vars(module).get("_sparsehooks_site"))}
    grids = {n: site for n, site in found.items() if site.component.rounds or site.component.calibrated == "range"}
    amounts = {name: site.amount for name, site in grids.items()}
    recorder = Recorder(on=True)

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.padding = Padding.of_call(module, args, kwargs)

    for site in grids.values():
        site.amount = None
    yield
    fitted = {name: site for name, site in grids.items() if site.component.calibrated == "range"}
    for name, site in fitted.items():
        site.sample = Sample(name, recorder)
    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        if fitted:
            batches.run()
    finally:
        hook.remove()
    for name, site in grids.items():
        site.amount = amounts[name] if site.sample is None else _reach(site.component, site.sample)
        site.sample = None


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
