"""Methods where two of them meet: budgets under floors, evidence that is degenerate, shares that follow a metric."""

import itertools
import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparsehooks import SessionError, WeightView
from sparsehooks.builtin.allocations.erk import Erk
from sparsehooks.builtin.allocations.over_all import Global, Options as Floor
from sparsehooks.builtin.allocations.owl import Options as OwlOptions, Owl
from sparsehooks.builtin.criteria.calibrated import Influence, SparseGpt
from sparsehooks.builtin.criteria.gradients import Gradient, Momentum, Snip, Taylor
from sparsehooks.builtin.criteria.l0 import L0, Options as GateOptions, open_probability
from sparsehooks.builtin.criteria.lamp import Lamp
from sparsehooks.builtin.criteria.movement import Movement, SoftMovement
from sparsehooks.builtin.criteria.obs import Obs, Options as FisherOptions
from sparsehooks.builtin.criteria.sr_ste import Options as DecayOptions
from sparsehooks.builtin.patterns.tiles import Block, Column, Row
from sparsehooks.builtin.patterns.unstructured import Options as PerOptions, Unstructured
from sparsehooks.builtin.regularizers.lasso import GroupLasso, Options as LassoOptions
from sparsehooks.builtin.schedules.feedback import Feedback
from sparsehooks.builtin.schedules.rounds import Constant, Iterative, Rounds
from sparsehooks.masks import select
from sparsehooks.plugins import installed_catalog


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------------- criteria


def test_criteria_of_the_gradient_equal_their_formulas():
    weight, gradient, momentum = normal(4, 6), normal(4, 6, seed=1), normal(4, 6, seed=2)
    view = WeightView("w", weight, 0, gradient=gradient, momentum=momentum, influence=0.25)
    assert torch.equal(Gradient().score(view), gradient.abs())
    assert torch.equal(Momentum().score(view), momentum.abs())
    assert torch.equal(Taylor().score(view), (weight * gradient).abs())
    assert torch.equal(Influence().score(view), torch.full((4, 6), 0.25))


def test_products_of_the_gradient_do_not_vanish_in_float16():
    weight, gradient = normal(4, 6, dtype=torch.float16) / 256, normal(4, 6, seed=1, dtype=torch.float16) / 4096
    for criterion in (Taylor(), Snip()):
        score = criterion.score(WeightView("w", weight, 0, gradient=gradient))
        assert torch.equal(score, (weight.float() * gradient.float()).abs())
        assert len(score.unique()) == 24


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (LassoOptions, "strength", math.nan),
        (FisherOptions, "damping", math.nan),
        (FisherOptions, "samples", 0),
        (Feedback.Config, "drop", math.nan),
        (Feedback.Config, "drop", -0.1),
        (DecayOptions, "decay", -1.0),
        (DecayOptions, "decay", math.nan),
        (GateOptions, "learning_rate", -0.1),
        (GateOptions, "learning_rate", math.nan),
        (Movement.Config, "learning_rate", math.nan),
        (SoftMovement.Config, "learning_rate", -1.0),
        (SoftMovement.Config, "strength", -5.0),
        (SoftMovement.Config, "strength", math.nan),
        (OwlOptions, "outlier", math.nan),
    ],
)
def test_options_that_are_no_numbers_or_negative_are_named(options, name, value):
    with pytest.raises(ValueError, match=f"'{name}' = {value} is not"):
        options(**{name: value})


def test_no_component_takes_an_option_that_is_not_a_number():
    found = []
    for record in installed_catalog().records():
        config = record.load().Config
        for name, hint in get_type_hints(config).items():
            if float not in (hint, *get_args(hint)):
                continue
            found.append((record.component.name, name))
            for value in (math.nan, -1.0):
                with pytest.raises(ValueError, match=f"'{name}' = {value} "):
                    config(**{name: value})
    assert len(found) > 20


def test_snip_is_the_gradient_of_the_mask():
    weight, inputs = normal(4, 6).requires_grad_(), normal(9, 6, seed=1)
    mask = torch.ones(4, 6, requires_grad=True)
    (inputs @ (weight * mask).T).tanh().square().sum().backward()
    score = Snip().score(WeightView("w", weight.detach(), 0, gradient=weight.grad))
    torch.testing.assert_close(score, mask.grad.abs())


def test_lamp_of_zeros_is_zero_and_the_largest_weight_of_each_layer_scores_one():
    assert not Lamp().score(WeightView("w", torch.zeros(3, 4), 0)).any()
    for scale in (1e-3, 1.0, 1e3):
        score = Lamp().score(WeightView("w", scale * normal(5, 7), 0))
        assert score.max() == 1
        assert score.flatten().argmax() == normal(5, 7).abs().flatten().argmax()


def test_lamp_keeps_the_order_within_a_layer():
    weight = normal(8, 9, seed=4)
    assert torch.equal(Lamp().score(WeightView("w", weight, 0)).flatten().argsort(), weight.abs().flatten().argsort())


def test_sparsegpt_keeps_no_weight_of_an_input_that_is_never_there():
    inputs = normal(30, 5, seed=1)
    inputs[:, 2] = 0
    score = SparseGpt().score(WeightView("w", 1 + normal(3, 5).abs(), 0, gram=inputs.T @ inputs / 30))
    assert not score[:, 2].any()
    assert (score[:, [0, 1, 3, 4]] > 0).all()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_obs_takes_fewer_gradients_than_a_block_has_weights(scale):
    criterion, weight = Obs(FisherOptions(samples=3, block=50)), 1 + normal(10, 13).abs()
    for seed in range(3):
        criterion.collect(WeightView("w", weight, 0, gradient=scale * normal(10, 13, seed=seed)))
    score = criterion.score(WeightView("w", weight, 0))
    assert score.isfinite().all()
    assert (score > 0).all()


def test_the_gradients_of_an_update_count_for_that_update_only():
    weight = normal(4, 6)

    def collect(criterion, seeds):
        for seed in seeds:
            criterion.collect(WeightView("w", weight, 0, gradient=normal(4, 6, seed=seed)))
        return criterion

    options = FisherOptions(samples=5, block=7, damping=1e-3)
    view = WeightView("w", weight, 0)
    used = collect(Obs(options), range(5))
    used.score(view)
    assert torch.equal(collect(used, range(5, 10)).score(view), collect(Obs(options), range(5, 10)).score(view))


def test_obs_goes_on_where_a_checkpoint_was_made():
    weight, options = normal(4, 6), FisherOptions(samples=6, block=7, damping=1e-3)
    whole, first, second = Obs(options), Obs(options), Obs(options)
    for seed in range(6):
        if seed == 3:
            second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
        view = WeightView("w", weight, 0, gradient=normal(4, 6, seed=seed))
        whole.collect(view)
        (first if seed < 3 else second).collect(view)
    view = WeightView("w", weight, 0)
    assert torch.equal(second.score(view), whole.score(view))
    assert not whole.state_dict()


def test_obs_goes_back_to_a_state_before_an_update():
    weight, options = normal(4, 6), FisherOptions(samples=6, block=7, damping=1e-3)
    whole, back, view = Obs(options), Obs(options), WeightView("w", weight, 0)
    for seed in range(3):
        for criterion in (whole, back):
            criterion.collect(WeightView("w", weight, 0, gradient=normal(4, 6, seed=seed)))
    early = back.state_dict()
    back.score(view)
    back.load_state_dict(early)
    for seed in range(3, 6):
        for criterion in (whole, back):
            criterion.collect(WeightView("w", weight, 0, gradient=normal(4, 6, seed=seed)))
    assert torch.equal(back.score(view), whole.score(view))


@pytest.mark.parametrize(("gates", "shape"), [("weight", (4, 6)), ("row", (4, 1)), ("column", (1, 6))])
def test_gates_cover_what_they_say_and_evaluation_draws_nothing(gates, shape):
    criterion, weight = L0(GateOptions(gates=gates)), normal(4, 6)
    learned = criterion.prepare(WeightView("w", weight, 3))
    assert learned["gates"].shape == shape
    learned["gates"] = 3 * normal(*shape, seed=1)
    view, mask = WeightView("w", weight, 3, learned=learned), normal(4, 6, seed=2) > 0
    assert torch.equal(criterion.score(view), learned["gates"].expand(4, 6))
    closed = (learned["gates"].sigmoid() * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(criterion.effective(view, mask), weight * closed * mask)
    assert torch.equal(criterion.effective(view, mask), criterion.effective(view, mask))


def test_gates_are_open_at_first_but_for_the_share_to_drop():
    learned = L0(GateOptions(drop=0.2)).prepare(WeightView("w", torch.zeros(300, 300), 3))
    assert learned["gates"].sigmoid().mean().item() == pytest.approx(0.8, abs=1e-3)


def test_the_multipliers_climb_where_the_gates_descend():
    learned = {"gates": normal(5, 6).requires_grad_(), "multipliers": torch.tensor([0.5, 2.0], requires_grad=True)}
    L0().penalty({"w": learned}, 0.7).backward()
    gates = learned["gates"].detach().double().requires_grad_()
    missed = 1 - open_probability(gates).mean() - 0.7
    (0.5 * missed + 2 * missed.square()).backward()
    torch.testing.assert_close(learned["gates"].grad, gates.grad.float())
    wanted = -torch.stack([missed, missed.square()]).detach().float()
    torch.testing.assert_close(learned["multipliers"].grad, wanted)


def test_scores_of_movement_pass_gradcheck_as_a_straight_through():
    """The forward with the mask of ones is W * S at S = 1 to the scores."""
    weight = normal(3, 4, dtype=torch.float64)
    stand_in = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    (weight * stand_in).tanh().sum().backward()
    scores = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    view = WeightView("w", weight.clone().requires_grad_(), 0, learned={"scores": scores})
    Movement().effective(view, torch.ones(3, 4, dtype=torch.bool)).tanh().sum().backward()
    torch.testing.assert_close(scores.grad, stand_in.grad, rtol=1e-15, atol=0)


def test_soft_movement_compares_by_sigmoids():
    scores = 3 * normal(4, 5)
    assert torch.equal(SoftMovement().score(WeightView("w", scores, 0, learned={"scores": scores})), scores.sigmoid())


# ------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("pattern", "height", "width"), [(Row(), 1, 24), (Column(), 6, 1), (Block(Block.Config(2, 3)), 2, 3)]
)
def test_spread_gives_each_weight_the_mean_of_its_tile(pattern, height, width):
    matrix = normal(6, 24)
    spread = pattern.spread(pattern.units({"w": matrix}), {"w": matrix})["w"]
    for top, left in itertools.product(range(0, 6, height), range(0, 24, width)):
        tile = slice(top, top + height), slice(left, left + width)
        torch.testing.assert_close(spread[tile], matrix[tile].mean().expand(height, width))


def test_spread_of_single_weights_is_themselves():
    matrix = {"w": normal(4, 6)}
    assert torch.equal(Unstructured().spread(Unstructured().units(matrix), matrix)["w"], matrix["w"])


def by_rows(scores, count):
    """The largest of each row in turn, of equal ones the first, the first row first, until ``count`` are taken."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    orders = [iter(sorted((-v, i) for i, v in enumerate(row) if v != -math.inf)) for row in scores.tolist()]
    while mask.sum() < count:
        for row, order in zip(mask, orders, strict=True):
            best = next(order, None)
            if best is not None and mask.sum() < count:
                row[best[1]] = True
    return mask


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 13, 24, 30])
@pytest.mark.parametrize("kind", ["different", "equal", "few"])
def test_each_row_keeps_the_same_number_and_what_does_not_divide_goes_to_the_first(count, kind):
    scores = {"different": normal(6, 8), "equal": normal(6, 8).round(), "few": torch.zeros(6, 8)}[kind]
    pattern = Unstructured(PerOptions(per="row"))
    assert torch.equal(pattern.select({"w": scores}, {"w": count})["w"], by_rows(scores, count))
    gone = scores.masked_fill(normal(6, 8, seed=1) > 0.3, -math.inf)  # an earlier run left the rows different numbers
    left = int((gone != -math.inf).sum())
    if count <= left:
        assert torch.equal(pattern.select({"w": gone}, {"w": count})["w"], by_rows(gone, count))


# ------------------------------------------------------------------------------------------------------- allocations

SIZES = {"a": (30, 78), "b": (10, 30), "c": (10, 10), "d": (1, 40)}
FLOORS = [0.0, 0.01, 0.05, 0.3]
SPARSITIES = [0.0, 0.3, 0.5, 0.8, 0.9, 0.97]


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("cls", [Global, Erk, Owl])
def test_a_floor_holds_and_the_budget_is_met_where_it_can_be(cls, floor, sparsity):
    units = {name: 10.0**-seed * normal(*shape, seed=seed).abs() for seed, (name, shape) in enumerate(SIZES.items())}
    options = OwlOptions if cls is Owl else Floor
    counts = cls(options(floor=floor)).keep(units, SIZES, sparsity)
    sizes = {name: unit.numel() for name, unit in units.items()}
    least = {name: max(1, math.ceil(floor * size)) for name, size in sizes.items()}
    assert all(least[name] <= count <= sizes[name] for name, count in counts.items())
    assert list(counts) == list(units)
    total = sum(sizes.values())
    assert sum(counts.values()) == max(total - round(sparsity * total), sum(least.values()))


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.83])
def test_global_equals_that_of_torch(amount):
    torch.manual_seed(0)
    layers = [nn.Linear(12, 20), nn.Linear(20, 7), nn.Linear(7, 3)]
    units = {str(index): layer.weight.detach().abs().clone() for index, layer in enumerate(layers)}
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=amount)
    masks = select(units, Global().keep(units, {}, amount))
    for index, layer in enumerate(layers):
        assert torch.equal(masks[str(index)], layer.weight_mask.bool())


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_clips_and_solves_again(sparsity):
    """The published way: what would be more than dense is dense, and epsilon is solved for the others."""
    raw = {name: sum(shape) / math.prod(shape) for name, shape in SIZES.items()}
    total, dense = sum(map(math.prod, SIZES.values())), set()
    while True:
        left = (1 - sparsity) * total - sum(math.prod(SIZES[name]) for name in dense)
        rest = [name for name in SIZES if name not in dense]
        epsilon = left / sum(raw[name] * math.prod(SIZES[name]) for name in rest) if rest else 0.0
        worst = max(rest, key=raw.get, default=None)
        if worst is None or epsilon * raw[worst] <= 1:
            break
        dense.add(worst)
    units = {name: torch.empty(shape, device="meta") for name, shape in SIZES.items()}
    for name, count in Erk().keep(units, SIZES, sparsity).items():
        size = math.prod(SIZES[name])
        assert abs(count - (size if name in dense else epsilon * raw[name] * size)) < 1 + 1e-6


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_owl_equals_its_formula(sparsity):
    shapes = {"a": (50, 40), "b": (30, 40), "c": (20, 40)}
    units = {name: normal(*shape, seed=seed).abs() ** (seed + 1) for seed, (name, shape) in enumerate(shapes.items())}
    shares = [
        sum(v > 5 * unit.mean().item() for v in unit.flatten().tolist()) / unit.numel() for unit in units.values()
    ]
    scaled = [0.16 * (share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    sizes = [unit.numel() for unit in units.values()]
    mean = sum(value * size for value, size in zip(scaled, sizes, strict=True)) / sum(sizes)
    for count, value, size in zip(Owl().keep(units, {}, sparsity).values(), scaled, sizes, strict=True):
        assert abs(count - (1 - sparsity + value - mean) * size) < 2


def test_owl_without_any_outlier_is_uniform():
    units = {"a": torch.ones(10, 10), "b": torch.ones(5, 8)}
    assert Owl().keep(units, {}, 0.5) == {"a": 50, "b": 20}


def test_owl_refuses_negative_scores():
    units = {"w": normal(4, 6)}
    with pytest.raises(SessionError, match="w: the allocation 'owl' compares scores with their mean"):
        Owl().keep(units, {}, 0.5)


# ------------------------------------------------------------------------------------------------------- schedules


def test_constant_holds_everything_from_its_start():
    schedule = Constant(Constant.Config(start=10, end=50, every=15))
    assert [step for step in range(101) if schedule.due(step, 100)] == [10, 25, 40, 50]
    assert [schedule.at(step, 100) for step in (0, 9, 10, 30, 50, 100)] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("total", "rounds"), [(100, 3), (7, 5), (1001, 20), (3, 5)])
def test_rounds_end_where_the_window_ends(total, rounds):
    schedule = Iterative(Rounds(rounds=rounds, rate=0.3))
    due = [step for step in range(total + 1) if schedule.due(step, total)]
    assert due[-1] == total
    shares = [schedule.at(step, total) for step in range(total + 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    changes = [step for step in range(1, total + 1) if shares[step] != shares[step - 1]]
    assert changes == [step for step in due if step > 0]


@pytest.mark.parametrize(("moment", "step"), [(None, None), (0.0, 0), (0.1, 20), (7, 7)])
def test_rewinding_has_a_step(moment, step):
    assert Iterative(Rounds(rewind=moment)).rewind(200) == step
    assert Constant().rewind(200) is None


def follow(schedule, values, metric):
    shares = []
    for value in values:
        schedule.observe({metric: value})
        if schedule.due(1, 100):
            schedule.acted()
        shares.append(schedule.at(1, 100))
    return shares


def test_feedback_raises_steps_back_and_halves():
    options = Feedback.Config(metric="accuracy", drop=0.05, raise_by=0.4)
    values = [0.9, 0.86, 0.84, 0.9, 0.84, 0.9]
    expected = [0.4, 0.8, 0.4, 0.6, 0.4, 0.5]
    assert follow(Feedback(options), values, "accuracy") == pytest.approx(expected)


@pytest.mark.parametrize(("metric", "mode"), [("eval_loss", None), ("perplexity", None), ("error", "min")])
def test_feedback_knows_what_should_be_small(metric, mode):
    options = Feedback.Config(metric=metric, mode=mode, drop=0.5, raise_by=0.4)
    assert follow(Feedback(options), [1.0, 1.4, 1.6], metric) == pytest.approx([0.4, 0.8, 0.4])


def test_feedback_holds_when_a_raise_is_too_small_to_try():
    options = Feedback.Config(metric="accuracy", drop=0.0, raise_by=0.016)
    shares = follow(Feedback(options), [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0], "accuracy")
    assert shares == pytest.approx([0.016, 0, 0.008, 0, 0, 0, 0])


def test_feedback_compares_with_no_metric_that_is_not_finite():
    schedule = Feedback(Feedback.Config(metric="accuracy", drop=0.05, raise_by=0.4))
    with pytest.raises(SessionError, match="'accuracy' is nan; look at the evaluation"):
        schedule.observe({"accuracy": float("nan")})
    assert follow(schedule, [0.9, 0.86], "accuracy") == pytest.approx([0.4, 0.8])


def test_feedback_goes_on_where_a_checkpoint_was_made():
    options = Feedback.Config(metric="accuracy", drop=0.05, raise_by=0.4)
    values = [0.9, 0.86, 0.84, 0.9, 0.84, 0.9]
    for cut in range(len(values)):
        first, second = Feedback(options), Feedback(options)
        shares = follow(first, values[:cut], "accuracy")
        second.load_state_dict(first.state_dict())
        assert shares + follow(second, values[cut:], "accuracy") == follow(Feedback(options), values, "accuracy")


def test_feedback_names_the_metrics_that_are_there():
    with pytest.raises(SessionError, match="follows 'accuracy', and the evaluation gives eval_loss, eval_f1"):
        Feedback(Feedback.Config(metric="accuracy")).observe({"eval_loss": 1.0, "eval_f1": 0.5})


# ------------------------------------------------------------------------------------------------------- regularizers


def test_a_group_moves_by_the_mean_of_its_steps_under_adam():
    weight, steps = normal(5, 9), normal(5, 9, seed=1).abs()
    moved = GroupLasso(LassoOptions(strength=0.1)).proximal({"w": weight}, Row(), {"w": steps})["w"]
    rms = weight.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(moved, weight * (1 - 0.1 * steps.mean(dim=1, keepdim=True) / rms).clamp(min=0))


def test_the_proximal_lasso_warns_once_of_weights_that_cannot_move():
    lasso, weights = GroupLasso(LassoOptions()), {"w": normal(3, 4, dtype=torch.bfloat16)}
    with pytest.warns(UserWarning, match=r"than torch.bfloat16 can tell; train float32 weights"):
        lasso.proximal(weights, Row(), {"w": 0.1})
    lasso.proximal(weights, Row(), {"w": 0.1})


@pytest.mark.parametrize("method", ["proximal", "subgradient"])
def test_the_lasso_of_zeros_is_zero(method):
    lasso, weights = GroupLasso(LassoOptions(strength=0.1, method=method)), {"w": torch.zeros(3, 4)}
    answer = lasso.proximal(weights, Row(), {"w": 0.1}) or lasso.gradient(weights, Row(), 1.0)
    assert torch.equal(answer["w"], torch.zeros(3, 4))
