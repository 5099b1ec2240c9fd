"""What cannot be of a plan, told before the model is touched: each check returns its problems, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from sparsehooks.components import (
    Activation,
    Allocation,
    Backend,
    Criterion,
    Need,
    Pattern,
    Quantizer,
    Schedule,
    Solver,
)
from sparsehooks.plugins import attributed
from sparsehooks.recipe import (
    ActivationStage,
    DistillStage,
    PruneStage,
    QuantizeStage,
    RegularizeStage,
    ShrinkStage,
    TeacherUse,
    Use,
)
from sparsehooks.stages import PlannedStage, crosses_targets
from sparsehooks.targets import Target, first_match

if TYPE_CHECKING:
    from torch import nn

FREE = (RegularizeStage, ActivationStage, ShrinkStage)
"""Stages of which several may share a layer."""
NEAR = 0.005
"""How far the sparsity of a stage may lie from what the rounds of its schedule reach."""
NEEDS_CALIBRATION = frozenset({Need.INPUT_NORM, Need.GRAM, Need.INFLUENCE})
"""What only calibration batches give."""


def check_model(model: nn.Module | None) -> list[str]:
    """What keeps a run from starting on the model, whatever the recipe."""
    return _foreign(model) + _accelerated(model)


def check_components(planned: PlannedStage) -> list[str]:
    """What the components of a stage cannot do together; those that could not be had are not looked at."""
    return _sparsity(planned) + _misused(planned) + _without_gradients(planned) + _ungrowable(planned)


def check_fit(planned: PlannedStage, model: nn.Module) -> list[str]:
    """What of a stage, with its targets, does not fit the model."""
    stage, components, targets = planned.stage, planned.components, list(planned.targets)
    if isinstance(stage, DistillStage):
        return _teachers(planned, stage)
    problems: list[str] = []
    if isinstance(stage, PruneStage):
        problems += _overrides(planned, stage, model)
    if isinstance(stage, (PruneStage, RegularizeStage)) and "pattern" in components:
        problems += _pattern_problems(planned, stage, model)
    if isinstance(stage, ActivationStage) and "activation" in components:
        problems += _activation_problems(planned, model)
    if isinstance(stage, QuantizeStage) and "quantize" in components:
        problems += _misfits(planned, "quantize", stage.quantize)
    if (
        isinstance(stage, QuantizeStage)
        or "backend" in components
        or ("prune" in components and _acts_forward(planned))
    ):
        from sparsehooks.swapping import no_product, unsupported

        problems += [f"{planned.path}: {problem}" for problem in unsupported(model, targets)]
        if "backend" in components:
            problems += [f"{planned.path}.backend: {problem}" for problem in no_product(model, targets)]
    return problems


def check_training(planned: PlannedStage, model: nn.Module | None) -> list[str]:
    """What a stage asks for that a training loop does not have, or that the model does not train."""
    return _untrainable(planned) + ([] if model is None else _frozen(planned, model))


def check_stages(stages: Sequence[PlannedStage], total_steps: int | None) -> list[str]:
    """Where stages are in each other's way, or do not fit into the steps of the run."""
    return _overlaps(stages) + _caches(stages) + ([] if total_steps is None else _moments(stages, total_steps))


def _foreign(model: nn.Module | None) -> list[str]:
    """Whether another library has quantized the model already: its weights are not what they seem."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    name = getattr(method, "value", method)
    if config is None or name == "sparsehooks":
        return []
    return [f"the model is already quantized by '{name}'; start from the one it was made of"]


def _accelerated(model: nn.Module | None) -> list[str]:
    """Whether a backend runs one of its layers, for inference only."""
    from sparsehooks.accelerated import Accelerated

    layers = () if model is None else model.named_modules()
    name = next((name for name, layer in layers if isinstance(layer, Accelerated)), None)
    return [] if name is None else [f"a backend runs '{name}'; call sparsehooks.restore_model(model) first"]


def _sparsity(planned: PlannedStage) -> list[str]:
    """Whether a stage and its pattern agree on a sparsity."""
    stage = planned.stage
    if not isinstance(stage, PruneStage) or "pattern" not in planned.components:
        return []
    fixed = _pattern(planned).share()
    if stage.sparsity is None and fixed == 1.0:
        return [f"{planned.path}: 'sparsity' is missing, such as 0.8"]
    if fixed < 1.0 and stage.sparsity is not None and stage.sparsity != fixed:
        what = f"the pattern '{stage.pattern.use}' fixes the sparsity at {fixed:g}, not {stage.sparsity:g}"
        return [f"{planned.path}: {what}; leave 'sparsity' out"]
    return []


def _misused(planned: PlannedStage) -> list[str]:
    """What a schedule or what grows cannot do in this stage."""
    stage, components = planned.stage, planned.components
    problems: list[str] = []
    if "grow" in components and cast(Criterion, components["grow"].create()).samples:
        name = components["grow"].record.component.name
        problems.append(f"{planned.path}.grow: '{name}' collects gradients before it decides; use 'gradient'")
    if "solver" in components and stage.action not in (serves := cast(type[Solver], components["solver"].cls).serves):
        name = components["solver"].record.component.name
        problems.append(f"{planned.path}.solver: '{name}' does nothing here; it serves {' and '.join(sorted(serves))}")
    if "schedule" not in components:
        return problems
    schedule = cast(Schedule, components["schedule"].create())
    where = f"{planned.path}.schedule: '{components['schedule'].record.component.name}'"
    if isinstance(stage, QuantizeStage) and hasattr(schedule.config, "end"):
        problems.append(f'{where} is gradual, and a grid begins at once; use {{ use = "oneshot", start = 0.5 }}')
    if not isinstance(stage, PruneStage):
        if schedule.adaptive:
            problems.append(f"{where} follows what pruning does to a metric; use another")
        return problems
    samples = cast(Criterion, components["prune"].create()).samples if "prune" in components else 0
    if schedule.adaptive and samples > 1:
        problems.append(f"{where} decides at once, and '{stage.prune.use}' collects {samples} gradients; use another")
    rate, rounds = getattr(schedule.config, "rate", None), getattr(schedule.config, "rounds", None)
    if rate is not None and rounds is not None and "pattern" in components:
        sparsity = _pattern(planned).share() if stage.sparsity is None else stage.sparsity
        reached = 1 - (1 - rate) ** rounds
        if abs(reached - sparsity) > NEAR and 0 < sparsity < 1:
            problems.append(
                f"{where} reaches the sparsity {reached:.4g} in {rounds} rounds at 'rate' = {rate:g}, not "
                f"{sparsity:g}; use rate = {1 - (1 - sparsity) ** (1 / rounds):.4g}"
            )
    return problems


def _without_gradients(planned: PlannedStage) -> list[str]:
    """Whether a stage trains by a backend that cannot."""
    bound = planned.components.get("backend")
    if bound is None or cast(type[Backend], bound.cls).trains:
        return []
    advice = "leave 'backend' out, and call accelerate_model on the finished model"
    return [f"{planned.path}.backend: '{bound.record.component.name}' gives no gradients; {advice}"]


def _ungrowable(planned: PlannedStage) -> list[str]:
    """Whether nothing may grow in a stage, or something does already."""
    stage, components = planned.stage, planned.components
    if not isinstance(stage, PruneStage) or stage.grow is None:
        return []
    if "pattern" in components and _pattern(planned).share() < 1.0:
        return [f"{planned.path}.grow: the pattern '{stage.pattern.use}' fixes what stays; leave 'grow' out"]
    if "prune" in components and _acts_forward(planned):
        other = stage.prune.use
    elif "schedule" in components and cast(Schedule, components["schedule"].cls).adaptive:
        other = stage.schedule.use
    else:
        return []
    return [f"{planned.path}.grow: '{other}' brings weights back by itself; leave 'grow' out"]


def _teachers(planned: PlannedStage, stage: DistillStage) -> list[str]:
    """The teachers that cannot be had."""
    problems = []
    for teacher in stage.teacher:
        if (problem := _missing(teacher.use)) is not None:
            problems.append(f"{planned.path}.teacher: {problem}")
    return problems


def _missing(name: str) -> str | None:
    if name == "self":
        return None
    if Path(name).exists():
        if not (Path(name) / "config.json").is_file():
            return f"'{name}' is no model folder: it has no config.json"
        return None
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return f"'{name}' is neither 'self', nor a folder, nor a model on the Hub that can be had"
    return None


def _overrides(planned: PlannedStage, stage: PruneStage, model: nn.Module) -> list[str]:
    """The overrides that name no target, or ask for more than the pattern takes."""
    problems = [
        f"{planned.path}.overrides: '{name}' matches no target"
        for name in stage.overrides
        if not any(first_match(model, target, [name]) for target in planned.targets)
    ]
    most = _pattern(planned).share() if "pattern" in planned.components else 1.0
    problems += [
        f"{planned.path}.overrides: '{name}' = {sparsity:g}, and '{stage.pattern.use}' takes at most {most:g}; lower it"
        for name, sparsity in stage.overrides.items()
        if sparsity > most
    ]
    return problems


def _pattern_problems(planned: PlannedStage, stage: PruneStage | RegularizeStage, model: nn.Module) -> list[str]:
    pattern, targets = _pattern(planned), list(planned.targets)
    with attributed(planned.components["pattern"].record):
        problems = [f"{planned.path}.pattern: {problem}" for problem in pattern.couple(model, targets)]
    problems += _misfits(planned, "pattern", stage.pattern)
    if problems:
        return problems
    if isinstance(stage, PruneStage):
        if (stage.solver is not None or stage.overrides) and crosses_targets(planned, pattern):
            slices = f"the pattern '{stage.pattern.use}' takes slices of several layers, which"
            if stage.solver is not None:
                problems.append(f"{planned.path}.solver: {slices} leaves nothing to solve; leave 'solver' out")
            if stage.overrides:
                problems.append(f"{planned.path}.overrides: {slices} have one sparsity; leave 'overrides' out")
            return problems
        return _emptied(planned, pattern, stage, targets, planned.overrides)
    if not _spreads(pattern, targets):
        problems.append(
            f"{planned.path}.pattern: '{stage.pattern.use}' has no groups that vanish together; use another"
        )
    return problems


def _spreads(pattern: Pattern, targets: list[Target]) -> bool:
    """Whether a pattern can say for each weight what its group is worth."""
    import torch

    shapes = {target.parameter: torch.empty(target.matrix_shape, device="meta") for target in targets}
    try:
        pattern.spread(pattern.units(shapes), shapes)
    except NotImplementedError:
        return False
    return True


def _emptied(
    planned: PlannedStage, pattern: Pattern, stage: PruneStage, targets: list[Target], overrides: Mapping[str, float]
) -> list[str]:
    """The layers of which nothing would be left, where the shapes alone tell; an update sees the others."""
    if stage.sparsity is None or pattern.share() < 1.0 or "allocation" not in planned.components:
        return []
    import torch

    allocation = cast(Allocation, planned.components["allocation"].create())
    shapes = {target.parameter: torch.empty(target.matrix_shape, device="meta") for target in targets}
    try:
        with attributed(planned.components["pattern"].record):
            units = pattern.units(shapes)
    except (RuntimeError, TypeError):  # it reads the scores, and meta tensors have none
        return []
    own: dict[float, list[str]] = {}
    for name, sparsity in overrides.items():
        if round(sparsity * units[name].numel()) == units[name].numel():
            own.setdefault(sparsity, []).append(name)
    advice = "would be left; lower it or exclude the layer"
    problems = [f"{planned.path}.overrides: at {at:g} nothing of {_some(names)} {advice}" for at, names in own.items()]
    rest = {key: unit for key, unit in units.items() if key not in overrides}
    if not rest:
        return problems
    try:
        with attributed(planned.components["allocation"].record):
            counts = allocation.keep(rest, {key: tuple(u.shape) for key, u in rest.items()}, stage.sparsity)
    except (RuntimeError, TypeError):  # likewise
        return problems
    if names := [name for name, count in counts.items() if count == 0]:
        problems.append(f"{planned.path}.sparsity: at {stage.sparsity:g} nothing of {_some(names)} {advice}")
    return problems


def _activation_problems(planned: PlannedStage, model: nn.Module) -> list[str]:
    from sparsehooks.activations import problems

    return problems(planned, cast(Activation, planned.components["activation"].create()), model)


def _misfits(planned: PlannedStage, key: Literal["pattern", "quantize"], use: Use) -> list[str]:
    """The targets whose shape a pattern or a quantizer cannot handle."""
    component = cast(Pattern | Quantizer, planned.components[key].create())
    reasons: dict[str, list[str]] = {}
    for target in planned.targets:
        with attributed(planned.components[key].record):
            reason = component.check(target.matrix_shape)
        if reason is not None:
            reasons.setdefault(reason, []).append(target.parameter)
    return [
        f"{planned.path}.{key}: '{use.use}' does not fit {_some(names)}: {reason}; exclude it"
        for reason, names in reasons.items()
    ]


def _untrainable(planned: PlannedStage) -> list[str]:
    """What a stage asks for that a training loop does not have."""
    stage = planned.stage
    if isinstance(stage, (PruneStage, QuantizeStage)) and stage.solver is not None:
        return [f"{planned.path}.solver: '{stage.solver.use}' repairs without training; use sparsehooks.compress"]
    if not isinstance(stage, PruneStage):
        return []
    return [
        f"{planned.path}.{key}: '{use.use}' needs calibration batches; use sparsehooks.compress"
        for key, use in (("prune", stage.prune), ("grow", stage.grow.use if stage.grow else None))
        if use is not None and key in planned.components and planned.components[key].cls.needs & NEEDS_CALIBRATION
    ]


def _frozen(planned: PlannedStage, model: nn.Module) -> list[str]:
    """Whether a stage decides by gradients that never come."""
    for key in ("prune", "grow"):
        bound = planned.components.get(key)
        if bound is None or not cast(type[Criterion], bound.cls).needs & {Need.GRADIENT, Need.MOMENTUM}:
            continue
        for target in planned.targets:
            if not model.get_parameter(target.parameter).requires_grad:
                who = f"{planned.path}.{key}: '{bound.record.component.name}' decides by gradients"
                what = f"and none reaches '{target.parameter}', which is frozen"
                return [f"{who}, {what}; unfreeze it, exclude it, or use 'magnitude'"]
    return []


def _overlaps(stages: Sequence[PlannedStage]) -> list[str]:
    """Weights that two stages claim."""
    claimed: dict[tuple[str, str], PlannedStage] = {}
    clashes: dict[tuple[int, int, str], list[str]] = {}
    for planned in stages:
        for target in () if isinstance(planned.stage, FREE) else planned.targets:
            key = planned.stage.action, target.parameter
            first = claimed.setdefault(key, planned)
            if first is not planned:
                clashes.setdefault((first.index, planned.index, key[0]), []).append(target.parameter)
    return [
        f"recipe.stage[{first}] and recipe.stage[{second}] both {action} {_some(names)}; exclude it from one of them"
        for (first, second, action), names in clashes.items()
    ]


def _caches(stages: Sequence[PlannedStage]) -> list[str]:
    """Teachers of which two stages want the answers in different places."""
    problems = []
    first: dict[TeacherUse, tuple[PlannedStage, str]] = {}
    for planned in stages:
        if isinstance(planned.stage, DistillStage) and planned.stage.cache is not None:
            for use in planned.stage.teacher:
                other, cache = first.setdefault(use, (planned, planned.stage.cache))
                if cache != planned.stage.cache:
                    problems.append(
                        f"{planned.path}.cache: {other.path} keeps the answers of '{use.use}' in '{cache}'; name the "
                        "same folder"
                    )
    return problems


def _moments(stages: Sequence[PlannedStage], total: int) -> list[str]:
    """Schedules that do not fit a run of ``total`` steps."""
    problems: list[str] = []
    for planned in stages:
        if "schedule" not in planned.components:
            continue
        schedule = cast(Schedule, planned.components["schedule"].create())
        first, last = schedule.window(total)
        if isinstance(planned.stage, QuantizeStage) and "quantize" in planned.components:
            problems += _freezing(stages, planned, first, total)
        if last > total:
            problems.append(f"{planned.path}.schedule: acts until step {last}, but the run has {total} steps")
        elif hasattr(schedule.config, "end") and last <= first:
            problems.append(f"{planned.path}.schedule: ends at step {last} before it starts at step {first}")
        elif (back := schedule.rewind(total)) is not None:
            ends = next((step for step in range(first + 1, last) if schedule.due(step, total)), last)
            if back >= ends:
                problems.append(
                    f"{planned.path}.schedule: 'rewind' is step {back}, and the first round ends at step {ends}; "
                    "name an earlier step"
                )
    return problems


def _freezing(stages: Sequence[PlannedStage], planned: PlannedStage, first: int, total: int) -> list[str]:
    """What cannot be, of a grid that begins after ``first`` steps."""
    stage, quantizer = cast(QuantizeStage, planned.stage), cast(Quantizer, planned.components["quantize"].cls)
    problems = []
    if stage.freeze is not None and total:
        step = stage.freezes(total)
        if step > total:
            problems.append(f"{planned.path}.freeze: is step {step}, but the run has {total} steps")
        elif step < first or (quantizer.learned and step <= first):
            problems.append(
                f"{planned.path}.freeze: is step {step}, and '{stage.quantize.use}' begins at step {first}; "
                "name a later one"
            )
    if quantizer.trains_weights:
        return problems
    weights = {target.parameter for target in planned.targets}
    for other in stages:
        if not isinstance(other.stage, PruneStage) or not weights & {target.parameter for target in other.targets}:
            continue
        if {"prune", "schedule"} <= other.components.keys() and _needs_weights_to_train(other):
            last = cast(Schedule, other.components["schedule"].create()).window(total)[1]
            if last > first:
                problems.append(
                    f"{planned.path}.schedule: from step {first} on '{stage.quantize.use}' trains its values alone, "
                    f"and {other.path} follows the weights until step {last}; let it start later"
                )
    return problems


def _needs_weights_to_train(planned: PlannedStage) -> bool:
    criterion = cast(Criterion, planned.components["prune"].cls)
    return criterion.acts == "forward" or "grow" in planned.components or bool(criterion.needs & {Need.GRADIENT})


def _acts_forward(planned: PlannedStage) -> bool:
    return cast(Criterion, planned.components["prune"].cls).acts == "forward"


def _pattern(planned: PlannedStage) -> Pattern:
    return cast(Pattern, planned.components["pattern"].create())


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
