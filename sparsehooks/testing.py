"""Conformance: does a component keep the contract of its kind?

For the tests of a plugin: ``check_component(PluginManager([my_plugin]).catalog, "criterion", "mine")``. Each check is
one small concrete case on the CPU, and an ``AssertionError`` says what the contract asks for.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparsehooks.components import (
    KINDS,
    LEVELS,
    Activation,
    Allocation,
    Backend,
    Codec,
    ComponentBase,
    Criterion,
    Distiller,
    Exporter,
    Kernels,
    Pattern,
    Quantizer,
    Regularizer,
    Schedule,
    Solver,
    Support,
)
from sparsehooks.decoding import decode
from sparsehooks.errors import ArtifactError, SparseHooksError
from sparsehooks.views import Batch, Layout, WeightView

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from sparsehooks.catalog import Catalog


def check_component(catalog: Catalog, kind: str, name: str) -> None:
    """Check that a component keeps the contract of its kind, with its default options.

    Args:
        catalog: of the plugin manager that knows the component.
        kind: such as ``"criterion"``.
        name: as a recipe would write it; a shorthand such as ``"2:4"`` carries its options.

    Raises:
        PluginError: if there is no such component, or it cannot be loaded.
        AssertionError: the first point of the contract that it does not keep.
    """
    record, options = catalog.resolve(kind, name)
    cls = record.load()
    config: Any = decode(cls.Config, options, f"{kind} '{name}'")
    assert config == decode(cls.Config, options, ""), "two configs with the same options must be equal"
    assert cls.Config.__dataclass_params__.frozen, "Config must be a frozen dataclass"  # type: ignore[attr-defined]
    component = cls(config)
    assert component.config == config, "__init__() must keep its config"
    _CHECKS[kind](component)
    state = component.state_dict()
    assert all(_is_tensor(value) for value in state.values()), "state_dict() must hold tensors only"
    fresh = cls(config)
    fresh.load_state_dict(state)
    assert _equal(fresh.state_dict(), state), "load_state_dict() must take back what state_dict() gave"


# ---------------------------------------------------------------------------------------------------- pruning


def _check_criterion(component: ComponentBase) -> None:
    import torch

    criterion = cast(Criterion, component)
    assert criterion.acts in ("weight", "forward"), f"acts must be 'weight' or 'forward', got {criterion.acts!r}"
    for dtype in (torch.float32, torch.bfloat16):
        weight = _normal(6, 8, dtype=dtype)
        made = criterion.prepare(WeightView("layer.weight", weight, 3))
        again = criterion.prepare(WeightView("layer.weight", weight, 3))
        assert all(tensor.dtype == torch.float32 for tensor in made.values()), "prepare() must make float32 tensors"
        assert _equal(made, again), "prepare() must draw from view.generator()"
        view, before = _full_view(weight, made), _full_view(weight.clone(), again)
        for sample in range(criterion.samples):
            criterion.collect(dataclasses.replace(view, gradient=_normal(6, 8, seed=10 + sample, dtype=dtype)))
        score = criterion.score(view)
        assert score.shape == weight.shape, f"score() must have the weight's shape {tuple(weight.shape)}"
        assert score.is_floating_point(), f"score() must be floating point, got {score.dtype}"
        assert not score.requires_grad, "score() must be detached"
        assert bool(score.isfinite().all()), "score() of finite weights must be finite"
        assert _same(weight, before.weight), "score() must leave the weight as it is"
        for name in ("gradient", "momentum", "input_norm", "gram"):
            assert _same(getattr(view, name), getattr(before, name)), f"score() must leave view.{name} as it is"
        assert _equal(view.learned, before.learned), "score() must leave what is learned as it is"
        again_score = criterion.score(before)
        assert _same(score, again_score), "score() must be the same for the same view: draw from view.generator()"
        if criterion.acts == "forward":
            _check_forward(criterion, before)


def _check_forward(criterion: Criterion, view: WeightView) -> None:
    """Of a criterion whose masks act on the way into the layer: what the layer computes with, and what learns."""
    import torch

    mask = torch.arange(view.weight.numel()).reshape(view.weight.shape) % 3 != 0
    for training in (False, True):
        weight = view.weight.clone().requires_grad_()
        learned = {name: tensor.clone().requires_grad_() for name, tensor in view.learned.items()}
        given = dataclasses.replace(view, weight=weight, learned=learned, training=training)
        effective = criterion.effective(given, mask)
        assert effective.shape == weight.shape, "effective() must keep the weight's shape"
        assert effective.dtype == weight.dtype, f"effective() must keep the dtype {weight.dtype}, got {effective.dtype}"
        assert bool(effective.isfinite().all()), "effective() of finite weights must be finite"
        assert training or not bool(effective[~mask].any()), "effective() must be zero where masked, in evaluation"
        assert _same(weight, view.weight), "effective() must leave the weight as it is"
        assert effective.requires_grad, "effective() must pass a gradient to the weight"
        (effective.float() * _normal(*weight.shape, seed=5)).sum().backward()
        assert weight.grad is not None, "effective() must pass a gradient to the weight"
        assert bool(weight.grad.isfinite().all()), "effective() must pass a finite gradient"
        assert bool(weight.grad.any()), "effective() must pass a gradient that is not zero"
    penalty = criterion.penalty({"layer.weight": learned}, 0.5)
    if penalty is not None:
        assert penalty.dim() == 0, f"penalty() must be a scalar, got the shape {tuple(penalty.shape)}"
        assert bool(penalty.isfinite()), "penalty() must be finite"
        penalty.backward()
    for name, tensor in learned.items():
        assert tensor.grad is not None, f"'{name}' of prepare() must learn from effective() or penalty()"
        assert bool(tensor.grad.isfinite().all()), f"the gradient of '{name}' must be finite"


def _full_view(weight: Tensor, learned: Mapping[str, Tensor]) -> WeightView:
    """A view with all that a criterion may need."""
    inputs = _normal(40, weight.shape[1], seed=2)
    return WeightView(
        "layer.weight",
        weight,
        3,
        gradient=_normal(*weight.shape, seed=3, dtype=weight.dtype),
        momentum=_normal(*weight.shape, seed=4, dtype=weight.dtype),
        input_norm=inputs.square().mean(dim=0).sqrt(),
        gram=inputs.T @ inputs / len(inputs),
        influence=0.25,
        learned=learned,
    )


def _check_pattern(component: ComponentBase) -> None:
    import torch

    pattern = cast(Pattern, component)
    share = pattern.share()
    assert 0 < share <= 1, f"share() must lie in (0, 1], got {share}"
    shapes = [(12, 24), (8, 16), (48, 96), (64, 64), (7, 13)]
    reasons = {shape: pattern.check(shape) for shape in shapes}
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values()), (
        "check() must return None or the reason in words"
    )
    fitting = [shape for shape, reason in reasons.items() if reason is None]
    assert fitting, f"check() must accept one of the shapes {shapes}"
    scores = {f"layer{index}.weight": _normal(*shape, seed=index).abs() for index, shape in enumerate(fitting)}
    before = {name: score.clone() for name, score in scores.items()}
    units = pattern.units(scores)
    assert units.keys() == scores.keys(), "units() must answer for every matrix"
    for name, unit in units.items():
        assert unit.is_floating_point(), f"units() must be floating point, got {unit.dtype}"
        assert 0 < unit.numel() <= scores[name].numel(), "a matrix has at least one unit and no more than weights"
    whole = pattern.expand({name: torch.ones_like(unit, dtype=torch.bool) for name, unit in units.items()}, scores)
    empty = pattern.expand({name: torch.zeros_like(unit, dtype=torch.bool) for name, unit in units.items()}, scores)
    half = {name: torch.arange(unit.numel()).reshape(unit.shape) % 2 == 0 for name, unit in units.items()}
    some = pattern.expand(half, scores)
    counts = {name: unit.numel() // 3 for name, unit in units.items()}
    chosen = pattern.select(units, counts)
    for name, score in scores.items():
        assert chosen[name].shape == units[name].shape, "select() must give masks of the shape of the units"
        assert chosen[name].dtype == torch.bool, f"select() must give bool masks, got {chosen[name].dtype}"
        assert int(chosen[name].sum()) == counts[name], f"select() must keep exactly {counts[name]} units"
        for mask in (whole[name], empty[name], some[name]):
            assert mask.shape == score.shape, "expand() must give masks of the shape of the scores"
            assert mask.dtype == torch.bool, f"expand() must give bool masks, got {mask.dtype}"
        assert bool(whole[name].all()), "where all units stay, all weights stay"
        gone = int((~empty[name]).sum())
        assert gone == round(share * score.numel()), f"where all units go, share() = {share} of the weights goes"
        assert bool((empty[name] <= some[name]).all()), "a unit more that stays must not take weights away"
        pruned = score.masked_fill(~some[name], float("-inf"))
        again = pattern.units({name: pruned})[name]
        assert not bool(again.isnan().any()), "units() must not make NaN of scores of minus infinity (pruned weights)"
    assert _equal(scores, before), "units(), select() and expand() must leave the scores as they are"


def _check_allocation(component: ComponentBase) -> None:
    allocation = cast(Allocation, component)
    units = {"a": _normal(6, 8).abs(), "b": _normal(40, seed=1).abs(), "c": _normal(3, 4, 5, seed=2).abs()}
    before = {name: unit.clone() for name, unit in units.items()}
    total = sum(unit.numel() for unit in units.values())
    for sparsity in (0.0, 0.3, 0.5, 0.9):
        counts = allocation.keep(units, {name: tuple(unit.shape) for name, unit in units.items()}, sparsity)
        assert counts.keys() == units.keys(), "keep() must answer for every matrix"
        for name, count in counts.items():
            assert type(count) is int, f"keep() must give whole numbers, got {count!r}"
            assert 0 <= count <= units[name].numel(), f"keep() gives {count} of {units[name].numel()} units"
        missed = abs(sum(counts.values()) - (1 - sparsity) * total)
        assert missed <= len(units), f"keep() misses the budget at sparsity {sparsity} by {missed:g} units"
        if sparsity == 0:
            assert sum(counts.values()) == total, "at sparsity 0 everything stays"
    assert _equal(units, before), "keep() must leave the scores as they are"


def _check_schedule(component: ComponentBase) -> None:
    schedule = cast(Schedule, component)
    if schedule.adaptive:
        _check_adaptive(schedule)
        return
    for index in range(101):
        value = schedule.sparsity(index / 100)
        assert 0 <= value <= 1, f"sparsity({index / 100}) = {value} is outside [0, 1]"
    assert schedule.sparsity(1.0) == 1, f"sparsity(1.0) must be exactly 1, got {schedule.sparsity(1.0)}"
    for total in (1, 7, 100):
        last = schedule.window(total)[1]
        assert schedule.due(last, total), f"the masks must change at the window's last step {last}"
        assert schedule.at(last, total) == 1, "the target must hold exactly at the window's last step"


def _check_adaptive(schedule: Schedule) -> None:
    first, last = schedule.window(100)
    for value in (1.0, 1.0, 0.0, 2.0, 1.0, 0.5):
        schedule.observe(_Metrics(value))
        share = schedule.at(first, 100)
        assert 0 <= share <= 1, f"at() = {share} is outside [0, 1]"
        due = [schedule.due(step, 100) for step in (first, last)]
        assert [schedule.due(step, 100) for step in (first, last)] == due, "due() must only say, and change nothing"
        assert schedule.at(first, 100) == share, "at() must change with observe() only"
        schedule.acted()
        assert not schedule.due(last, 100), "after acted() nothing must be due until the next observe()"


class _Metrics(dict[str, float]):
    """Every metric has the same value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> float:
        return self._value


def _check_regularizer(component: ComponentBase) -> None:
    from sparsehooks.builtin.patterns.tiles import Row

    regularizer = cast(Regularizer, component)
    weights = {"a": _normal(6, 8), "b": _normal(5, 4, seed=1)}
    before = {name: weight.clone() for name, weight in weights.items()}
    gradients = regularizer.gradient(weights, Row(), 1.0)
    moved = regularizer.proximal(weights, Row(), {"a": 0.01, "b": weights["b"].new_full((5, 4), 0.01)})
    assert gradients is not None or moved is not None, "gradient() or proximal() must do something"
    for what, answer in (("gradient()", gradients), ("proximal()", moved)):
        if answer is None:
            continue
        assert answer.keys() == weights.keys(), f"{what} must answer for every weight"
        for name, tensor in answer.items():
            assert tensor.shape == weights[name].shape, f"{what} must have the weight's shape"
            assert bool(tensor.isfinite().all()), f"{what} of finite weights must be finite"
    if moved is not None:
        assert all(bool(moved[n].norm() <= weights[n].norm()) for n in moved), "proximal() must not make weights larger"
    nothing = regularizer.gradient(weights, Row(), 0.0)
    assert nothing is None or not any(bool(tensor.any()) for tensor in nothing.values()), "strength 0 must do nothing"
    assert _equal(weights, before), "gradient() and proximal() must leave the weights as they are"


def _check_solver(component: ComponentBase) -> None:
    import torch

    from sparsehooks.problems import LayerProblem

    solver = cast(Solver, component)
    inputs = _normal(64, 16, seed=1) @ _normal(16, 16, seed=2)
    weight, gram = _normal(6, 16), inputs.t() @ inputs / 64
    before = weight.clone(), gram.clone()
    for group, asked in ((None, 0.5), (4, 0.5), (None, 0.0)):
        seen: list[tuple[int, int]] = []

        def choose(
            start: int,
            stop: int,
            weights: Tensor,
            diagonal: Tensor,
            group: int | None = group,
            asked: float = asked,
            seen: list[tuple[int, int]] = seen,
        ) -> Tensor:
            assert weights.shape == (6, stop - start), "choose() takes the weights of the columns, of all rows"
            assert diagonal.shape == (stop - start,), "choose() takes the diagonal of the inverse at the columns"
            assert start % (group or 1) == 0 == stop % (group or 1), "choose() takes whole groups"
            seen.append((start, stop))
            return (torch.arange(start, stop) % 2 == 0).expand(6, -1) | (asked == 0.0)

        solved, mask = solver.solve(LayerProblem("layer", weight, gram, group), choose)
        assert [start for start, _ in seen] == [0, *(stop for _, stop in seen[:-1])], "columns come from left to right"
        assert seen[-1][1] == 16, "choose() is called for every column"
        assert solved.shape == mask.shape == weight.shape, "solve() must give weight and mask of the weight's shape"
        assert solved.dtype == torch.float32 and mask.dtype == torch.bool, "solve() must give float32 and bool"  # noqa: PT018
        assert bool(solved.isfinite().all()), "solve() of finite weights must be finite"
        assert not bool(solved[~mask].any()), "solve() must leave zero what the mask takes"
        assert torch.equal(mask, (torch.arange(16) % 2 == 0).expand(6, -1) | (asked == 0.0)), "choose() decides"
        if asked == 0.0:
            assert torch.allclose(solved, weight, atol=1e-4), "where nothing goes, solve() must change nothing"
        rough = torch.where(mask, weight, 0.0) - weight
        change = solved - weight
        lost, without = (change @ gram * change).sum(), (rough @ gram * rough).sum()
        assert lost <= without * 1.001 + 1e-4, "solve() must not make the outputs worse than the mask alone does"
        assert _same(weight, before[0]), "solve() must leave the layer as it is"
        assert _same(gram, before[1]), "solve() must leave the Gram matrix as it is"


# ------------------------------------------------------------------------------------------------ activations


def _check_activation(component: ComponentBase) -> None:
    import torch

    activation = cast(Activation, component)
    assert activation.place in ("input", "output", "function"), f"place = {activation.place!r} is none of the places"
    assert type(activation.batches()) is int, "batches() must give a whole number"
    assert activation.batches() > 0, f"batches() must be positive, got {activation.batches()}"
    function = activation.place == "function"
    assert not (function and activation.calibrated), "what replaces a function has no threshold"
    for dtype in (torch.float32, torch.bfloat16):
        values = _normal(4, 5, 16, dtype=dtype)
        kept, zeros = values.clone(), []
        makes_zeros = function or activation.calibrated == "sparsity"
        before = torch.nn.functional.silu(values) if function else None
        for amount in (0.0, 0.25, 0.5, 1.0):
            sparse = activation.apply(values, amount, before)
            assert sparse.shape == values.shape, "apply() must keep the shape"
            assert sparse.dtype == dtype, f"apply() must keep the dtype {dtype}, got {sparse.dtype}"
            zeros.append(int((sparse == 0).sum()))
            if activation.calibrated == "sparsity":
                assert bool((sparse[values.abs() <= amount] == 0).all()), "apply() must make zeros up to the threshold"
            if not makes_zeros:
                again = activation.apply(sparse, amount)
                assert _same(again, sparse), "apply() must put values on a grid, where they stay"
        assert _same(values, kept), "apply() must leave the values as they are"
        if makes_zeros:
            assert zeros[-1] == max(zeros), "apply() must not make fewer zeros for a larger amount"
            assert zeros[-1] > 0, "apply() must make zeros"
        if activation.calibrated == "range":
            magnitudes = values.float().abs()
            reach = activation.reach(magnitudes.flatten().sort().values, magnitudes.amax(dim=(1, 2)))
            assert 0 <= reach < float("inf"), f"reach() must not be negative, got {reach}"
        if function:
            assert _same(activation.apply(values, 0.0, before), cast(Any, before)), "share 0 must change nothing"
            module = activation.replacement()
            if module is not None:
                final = activation.apply(values, 1.0, before)
                assert _same(module(values), final), "replacement() must compute what apply() does at share 1"


# ----------------------------------------------------------------------------------------------- quantization


def _check_quantizer(component: ComponentBase) -> None:
    import torch

    quantizer = cast(Quantizer, component)
    shapes = [(6, 16), (6, 128), (4, 256), (5, 7)]
    reasons = {shape: quantizer.check(shape) for shape in shapes}
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values()), (
        "check() must return None or the reason in words"
    )
    fitting = [shape for shape, reason in reasons.items() if reason is None]
    assert fitting, f"check() must accept one of the shapes {shapes}"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = _normal(*fitting[0], dtype=dtype)
        weight[0], weight[1, ::2] = 0, 0
        before = weight.clone()
        grid = quantizer.grid(weight)
        assert all(_is_tensor(part) and not part.requires_grad for part in grid.values()), (
            "grid() must give tensors without gradients"
        )
        assert set(quantizer.learned) <= grid.keys(), f"'learned' names {quantizer.learned}, the grid has {list(grid)}"
        codes = quantizer.quantize(weight, grid)
        assert codes.shape == weight.shape, "quantize() must keep the shape"
        assert not codes.is_floating_point(), f"quantize() must give integers, got {codes.dtype}"
        quantized = quantizer.dequantize(codes, grid, dtype)
        assert quantized.dtype == dtype, f"dequantize() must give {dtype}, got {quantized.dtype}"
        assert bool(quantized.isfinite().all()), "finite weights must stay finite"
        assert bool((quantized[weight == 0] == 0).all()), "zero must stay zero"
        assert not bool(quantized[quantized == 0].signbit().any()), "a zero must be +0.0"
        again = quantizer.dequantize(quantizer.quantize(quantized, grid), grid, dtype)
        assert _same(again, quantized), "quantizing twice with one grid must change nothing"
        faked = quantizer.fake_quantize(weight, grid)
        assert _same(faked, quantized), "fake_quantize() must equal dequantize(quantize()) bit for bit"
        assert _same(quantizer.fake_quantize(weight), faked), "without a grid, that of the matrix itself counts"
        assert _same(weight, before), "quantizing must leave the weight as it is"
        half = weight.shape[1] // 2
        if quantizer.check((weight.shape[0], half)) is None:
            part = quantizer.columns(grid, half, 2 * half)
            found = quantizer.dequantize(quantizer.quantize(weight[:, half : 2 * half], part), part, dtype)
            assert _same(found, quantized[:, half : 2 * half]), "columns() must give the grid of these columns"
        _check_gradients(quantizer, weight, grid)


def _check_gradients(quantizer: Quantizer, weight: Tensor, grid: Mapping[str, Tensor]) -> None:
    learning = weight.clone().requires_grad_()
    quantizer.fake_quantize(learning).float().sum().backward()
    gradient = learning.grad
    assert gradient is not None, "fake_quantize() must pass a gradient"
    assert bool(gradient.isfinite().all()), "fake_quantize() must pass a finite gradient"
    assert bool((gradient != 0).any()), "fake_quantize() must pass a gradient that is not zero"
    parts = {name: part.clone().requires_grad_(name in quantizer.learned) for name, part in grid.items()}
    upstream = _normal(*weight.shape, seed=1).to(weight.dtype)
    if quantizer.learned:
        quantizer.fake_quantize(weight, parts).backward(upstream)
    for name in quantizer.learned:
        slope = parts[name].grad
        assert slope is not None, f"fake_quantize() must pass a gradient to '{name}'"
        assert bool(slope.isfinite().all()), f"fake_quantize() must pass a finite gradient to '{name}'"
        assert bool((slope != 0).any()), f"fake_quantize() must pass a gradient to '{name}' that is not zero"


# ----------------------------------------------------------------------------------------------- distillation


def _check_distiller(component: ComponentBase) -> None:
    import torch

    distiller = cast(Distiller, component)
    student, teacher = _tiny_model(), _tiny_model().requires_grad_(requires_grad=False)
    made = distiller.prepare(student, teacher, torch.Generator().manual_seed(0))
    again = distiller.prepare(student, teacher, torch.Generator().manual_seed(0))
    assert _equal(made, again), "prepare() must draw from its generator"
    for tensor in made.values():
        assert tensor.dtype == torch.float32, "prepare() must make float32 tensors"
        assert tensor.device.type == "cpu", "prepare() must make tensors on the CPU"
    learned = {name: tensor.requires_grad_() for name, tensor in made.items()}
    for inputs, ours, theirs, items in (_sample_batch(), _token_batch()):
        before = copy.deepcopy(theirs)
        values = distiller.loss(ours, theirs, Batch(inputs), learned)
        assert values.shape == (items,), (
            f"loss() must be unreduced, one value for each of {items} items, got {tuple(values.shape)}"
        )
        assert bool(values.isfinite().all()), "loss() of finite outputs must be finite"
        assert values.requires_grad, "loss() must pass a gradient to the student"
        values.sum().backward()
        gradients = [tensor.grad for tensor in _tensors(ours) if tensor.grad is not None]
        assert any(bool((gradient != 0).any()) for gradient in gradients), "loss() must teach the student something"
        assert all(bool(gradient.isfinite().all()) for gradient in gradients), "gradients must be finite"
        assert all(tensor.grad is None for tensor in (*teacher.parameters(), *_tensors(theirs))), (
            "the teacher must receive no gradient"
        )
        pairs = zip(_tensors(theirs), _tensors(before), strict=True)
        assert all(_same(one, other) for one, other in pairs), "loss() must leave the teacher's outputs as they are"
        if distiller.contrasts:
            continue
        halves = []
        for part in (slice(0, 2), slice(2, None)):
            batch = Batch({name: tensor[part] for name, tensor in inputs.items()})
            halves.append(distiller.loss(_part(ours, part), _part(theirs, part), batch, learned))
        torch.testing.assert_close(
            torch.cat(halves), values, msg="the loss of an item must not depend on the other samples of its batch"
        )


def _tiny_model() -> nn.Module:
    from torch import nn

    model = nn.Linear(8, 5)
    model.config = types.SimpleNamespace(hidden_size=8)  # type: ignore[assignment]
    return model


def _sample_batch() -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], int]:
    """Sequence classification: four samples."""
    import torch

    mask = (torch.arange(6) < torch.tensor([[6], [4], [5], [3]])).long()
    return {"attention_mask": mask, "labels": torch.arange(4)}, _output(0, 4, 5), _output(1, 4, 5, teacher=True), 4


def _token_batch() -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], int]:
    """Token classification: four samples, of whose 24 tokens 18 have a label."""
    import torch

    mask = torch.arange(6) < torch.tensor([[6], [4], [5], [3]])
    labels = torch.where(mask, 1, -100)
    inputs = {"attention_mask": mask.long(), "labels": labels}
    return inputs, _output(2, 4, 6, 5), _output(3, 4, 6, 5, teacher=True), 18


def _output(seed: int, *shape: int, teacher: bool = False) -> dict[str, Any]:
    states = tuple(_normal(4, 6, 8, seed=10 * seed + layer) for layer in range(3))
    output = {"logits": _normal(*shape, seed=10 * seed + 9), "hidden_states": states}
    output["attentions"] = tuple(_normal(4, 2, 6, 6, seed=10 * seed + layer).softmax(-1) for layer in range(2))
    for shift, part in enumerate(("queries", "keys", "values"), 1):
        output[part] = tuple(_normal(4, 6, 16, seed=10 * seed + shift + layer) for layer in range(2))
    for tensor in _tensors(output):
        tensor.requires_grad_(not teacher)
    return output


def _part(output: Mapping[str, Any], part: slice) -> dict[str, Any]:
    return {
        name: tuple(tensor[part] for tensor in value) if isinstance(value, tuple) else value[part]
        for name, value in output.items()
    }


def _tensors(output: Mapping[str, Any]) -> list[Tensor]:
    return [tensor for value in output.values() for tensor in (value if isinstance(value, tuple) else (value,))]


# ---------------------------------------------------------------------------------------------------- storage


def _check_codec(component: ComponentBase) -> None:
    import numpy as np

    codec = cast(Codec, component)
    assert codec.role in ("positions", "values"), f"role must be 'positions' or 'values', got {codec.role!r}"
    assert codec.level in LEVELS, f"level must be one of {', '.join(LEVELS)}, got {codec.level!r}"
    held = 0
    for given, layout in _positions() if codec.role == "positions" else _values():
        before = given.copy()
        bound = codec.bound(given, layout)
        if bound is None:
            continue
        held += 1
        data = given
        if codec.role == "positions":
            data = codec.cover(given, layout)
            layout = dataclasses.replace(layout, count=data.size)  # noqa: PLW2901 - what the file would say
            _check_decoded("cover()", data, codec, layout)
            assert np.isin(given, data).all(), "cover() must keep every position that is not zero"
        part = codec.encode(data, layout)
        assert isinstance(part, bytes), f"encode() must give bytes, got {type(part).__name__}"
        assert bound <= len(part), f"bound() says that {bound} bytes are the fewest, encode() gives {len(part)}"
        assert (given == before).all(), "bound(), cover() and encode() must leave the data as they are"
        decoded = codec.decode(memoryview(part), layout)
        _check_decoded("decode()", decoded, codec, layout)
        assert (decoded == data).all(), "decode() must give back every bit"
        for lie in _lies(part):
            _check_lie(codec, lie, layout)
        if codec.role == "positions":
            for count in (0, data.size + 1, 2**32 - 1):
                _check_lie(codec, part, dataclasses.replace(layout, count=count))
    assert held, "bound() must accept one of the arrays of the check"


def _check_decoded(method: str, data: np.ndarray, codec: Codec, layout: Layout) -> None:
    """Whether an array is one of positions or values as the layout describes it."""
    import numpy as np

    dtype = np.dtype(np.intp) if codec.role == "positions" else layout.bits
    assert data.dtype == dtype, f"{method} must give {dtype}, got {data.dtype}"
    assert data.shape == (layout.count,), f"{method} must give the shape {(layout.count,)}, got {data.shape}"
    if codec.role == "positions" and data.size:
        assert (data[1:] > data[:-1]).all(), f"{method} must give ascending positions"
        assert 0 <= data[0] <= data[-1] < layout.size, f"{method} must give positions within the chunk"


def _check_lie(codec: Codec, part: bytes, layout: Layout) -> None:
    """Bytes that anybody wrote are refused, or are those of other data."""
    try:
        decoded = codec.decode(memoryview(part), layout)
    except ArtifactError:
        return
    except Exception as error:
        raise AssertionError(f"decode() must refuse bytes that lie with ArtifactError, not {error!r}") from error
    _check_decoded("decode() of bytes that lie", decoded, codec, layout)


def _lies(part: bytes) -> Iterator[bytes]:
    """A byte more, a byte less, and some that are others: the first ones most often, which say what the rest is."""
    import numpy as np

    yield part + b"\0"
    if not part:
        return
    yield part[:-1]
    random = np.random.default_rng(0)
    places = (random.random(64) ** 4 * len(part)).astype(int)
    values = random.integers(-64, 320, 64).clip(0, 255)  # 0 and 255 most often
    for place, value in zip(places.tolist(), values.tolist(), strict=True):
        lie = bytearray(part)
        lie[place] = value
        yield bytes(lie)


def _positions() -> Iterator[tuple[np.ndarray, Layout]]:
    import numpy as np

    random = np.random.default_rng(0)
    masks = [random.random(shape) < density for shape in ((12, 24), (7, 13)) for density in (0, 0.05, 0.5, 0.95, 1)]
    masks.append(np.argsort(random.random((12, 6, 4)), axis=-1) < 2)  # two of each four
    masks.append(np.outer(random.random(12) < 0.5, random.random(24) < 0.5))
    for mask in masks:
        data = np.flatnonzero(mask)
        yield data, Layout("F32", len(mask), mask.size // len(mask), data.size)


def _values() -> Iterator[tuple[np.ndarray, Layout]]:
    import numpy as np
    import torch

    from sparsehooks.artifact.header import DTYPES
    from sparsehooks.quantization import from_codes, row_scales, to_codes

    weight = _normal(6, 16) * (_normal(6, 16, seed=1) > 0)
    for name, (dtype, bits) in DTYPES.items():
        if not dtype.is_floating_point:
            matrices = [(3 * weight).abs().to(dtype)]
        else:
            matrices = [weight.to(dtype), ((2 * weight).round() / 2).to(dtype)]
        if name in ("F32", "BF16", "F16"):
            scales = row_scales(matrices[0])
            matrices.append(from_codes(to_codes(matrices[0], scales), scales, dtype))
        if name != "BOOL":
            random = np.random.default_rng(0).integers(0, 256, 96 * dtype.itemsize, dtype=np.uint8)
            matrices.append(torch.from_numpy(random).view(dtype).view(6, 16))
        for matrix in matrices:
            dense = matrix.view(bits).numpy().reshape(-1)
            positions = np.flatnonzero(dense)
            yield dense, Layout(name, 6, 16, dense.size)
            yield dense[positions], Layout(name, 6, 16, positions.size, positions)


def _check_kernels(component: ComponentBase) -> None:
    from sparsehooks.computing import calls, difference, large_calls

    kernels = cast(Kernels, component)
    problem = kernels.problem()
    assert problem is None or (isinstance(problem, str) and problem), "problem() must be None or the reason in words"
    if problem is None:
        sizes = (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 129, 513, 4096, 4099)  # around those of vectors and blocks
        wrong = difference(kernels, lambda: itertools.chain(calls(sizes), large_calls(), large_calls(1 << 20)))
        assert wrong is None, wrong


# ---------------------------------------------------------------------------------------------------- running


def _check_backend(component: ComponentBase) -> None:
    import torch
    from torch import nn

    backend = cast(Backend, component)
    for dtype, bias in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        layer = nn.Linear(64, 32, bias=bias, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(_normal(32, 64).mul_(40).round_().clamp_(-127, 127) / 64 * (torch.arange(64) % 4 < 2))
            layer.weight[5] = 0
            if bias:
                layer.bias.copy_(_normal(32, seed=1))
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        support = backend.supports(layer, torch.device("cpu"))
        assert isinstance(support, Support), f"supports() must return a Support, got {support!r}"
        assert support.ok or support.reason, "supports() must give the reason for a no"
        if support.ok:
            with torch.no_grad():
                packed = backend.pack(layer)
            _check_runs(backend, packed, layer, exact=support.exact)
        assert _equal(before, layer.state_dict()), "supports(), pack() and run() must leave the layer as it is"


def _check_runs(backend: Backend, packed: Any, layer: nn.Linear, *, exact: bool) -> None:
    import torch

    tokens = _normal(3, 8, 64, seed=2, dtype=layer.weight.dtype)
    given = {
        "tokens": tokens[0],
        "a batch": tokens,
        "a token": tokens[0, :1],
        "a vector": tokens[0, 0],
        "an empty batch": tokens[:0],
        "tokens that are not contiguous": tokens.transpose(0, 1),
        "features that are not contiguous": tokens[0, :, :1].expand(8, 64),
    }
    for what, inputs in given.items():
        before = inputs.clone()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                expected, found = layer(inputs), backend.run(packed, inputs)
            assert _same(before, inputs), "run() must leave its inputs as they are"
            assert found.shape == expected.shape, f"run() of {what} must have the shape {tuple(expected.shape)}"
            assert found.dtype == inputs.dtype, f"run() must keep the dtype of its inputs, got {found.dtype}"
            if not inputs.numel():
                continue
            if exact:
                bound = 4 * torch.finfo(found.dtype).eps * expected.abs().max()
            elif backend.rounds_inputs:
                step = (inputs.max().clamp(min=0) - inputs.min().clamp(max=0)) / 127
                bound = step * layer.weight.abs().sum(dim=1)  # a step of 7 bits, everywhere
            else:
                bound = inputs.abs() @ layer.weight.abs().t() / 128  # 8 bits of a mantissa, as bfloat16 has
            error, bound = (found - expected).abs(), bound.expand_as(expected)
            worst = (error - bound).nan_to_num(torch.inf, torch.inf).argmax()
            message = "run() of {} must compute what the layer does: it gives {:.4g} and not {:.4g}, {:.2g} is allowed"
            values = (tensor.flatten()[worst].item() for tensor in (found, expected, bound))
            assert bool((error <= bound).all()), message.format(what, *values)


# --------------------------------------------------------------------------------------------- other programs


def _check_exporter(component: ComponentBase) -> None:
    exporter = cast(Exporter, component)
    assert exporter.files, "files must name what export() writes"
    with tempfile.TemporaryDirectory() as home:
        folder, out, refused = (Path(home) / name for name in ("saved", "out", "refused"))
        _save_tiny_bert(folder)
        before = _contents(folder)
        out.mkdir()
        said = exporter.export(folder, out)
        assert said, "export() must say what it has written"
        assert len(said.splitlines()) == 1, f"export() must say it in one line, got {said!r}"
        assert _contents(folder) == before, "export() must leave the folder as it is"
        for pattern in exporter.files:
            found = [path for path in out.glob(pattern) if path.is_file() and path.stat().st_size]
            assert found, f"export() must write what 'files' names: there is no {pattern}"
        hidden = [path.name for path in out.rglob(".*")]
        assert not hidden, f"export() must clear up what it needed on its way, {hidden} is left"
        weights = folder / "model.safetensors"
        damaged = bytearray(weights.read_bytes())
        damaged[-100] ^= 1
        weights.write_bytes(damaged)
        refused.mkdir()
        message = ""
        try:
            exporter.export(folder, refused)
        except SparseHooksError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"export() must refuse a damaged folder with ArtifactError, not {error!r}") from error
        assert message, "export() must refuse a damaged folder: read it with safe_open() or from_pretrained()"
        assert len(message.splitlines()) == 1, f"an error must be one sentence, got {message!r}"


def _save_tiny_bert(folder: Path) -> None:
    """A classifier of texts whose encoder lies on a grid of 8-bit integers, one scale a row."""
    import torch
    import transformers

    from sparsehooks.artifact.write import save_pretrained
    from sparsehooks.grids import Steps

    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        for name, weight in model.bert.encoder.named_parameters():
            if name.endswith("dense.weight"):
                steps = Steps(8)
                grid = steps.fit(weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True))["scales"]
                weight.copy_(steps.values(steps.codes(weight, grid, None), grid, None, weight.dtype))
    save_pretrained(model, folder)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


_CHECKS = {
    "criterion": _check_criterion,
    "pattern": _check_pattern,
    "allocation": _check_allocation,
    "schedule": _check_schedule,
    "regularizer": _check_regularizer,
    "activation": _check_activation,
    "solver": _check_solver,
    "quantizer": _check_quantizer,
    "distiller": _check_distiller,
    "codec": _check_codec,
    "kernels": _check_kernels,
    "backend": _check_backend,
    "exporter": _check_exporter,
}
assert _CHECKS.keys() == KINDS.keys(), "every kind has its check"


# ---------------------------------------------------------------------------------------------------- helpers


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit."""
    import torch

    return one.dtype == other.dtype and torch.equal(
        one.detach().contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8)
    )


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
