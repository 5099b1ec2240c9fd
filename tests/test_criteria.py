"""Criteria, allocations, regularizers and per-row comparison against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch

from sparsehooks import WeightView
from sparsehooks.builtin.allocations.erk import Erk
from sparsehooks.builtin.allocations.over_all import Global, Options as Floor
from sparsehooks.builtin.allocations.owl import Owl
from sparsehooks.builtin.criteria.calibrated import SparseGpt, Wanda
from sparsehooks.builtin.criteria.l0 import L0, Options as GateOptions, open_probability
from sparsehooks.builtin.criteria.lamp import Lamp
from sparsehooks.builtin.criteria.movement import Movement, Options as MovementOptions, SoftMovement
from sparsehooks.builtin.criteria.obs import Obs, Options as FisherOptions
from sparsehooks.builtin.criteria.sr_ste import Options as DecayOptions, SrSte
from sparsehooks.builtin.patterns.tiles import Row
from sparsehooks.builtin.patterns.unstructured import Options as PerOptions, Unstructured
from sparsehooks.builtin.regularizers.lasso import L1, GroupLasso, Options as LassoOptions
from sparsehooks.builtin.schedules.rounds import Iterative, Rounds


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LENET_300_100 = {"a": (300, 784), "b": (100, 300), "c": (10, 100)}
LENET_5 = {"a": (20, 1, 5, 5), "b": (50, 20, 5, 5), "c": (500, 800), "d": (10, 500)}


@pytest.mark.parametrize(
    ("shapes", "sparsity", "expected"),
    [
        (LENET_300_100, 0.9, (0.92043, 0.76981, 0)),
        (LENET_300_100, 0.95, (0.96152, 0.88867, 0.08149)),
        (LENET_300_100, 0.98, (0.98461, 0.95547, 0.6326)),
        (LENET_300_100, 0.99, (0.9923, 0.97773, 0.8163)),
        (LENET_5, 0.95, (0.27388, 0.96252, 0.96194, 0)),
        (LENET_5, 0.98, (0.72211, 0.98566, 0.98543, 0.54283)),
        (LENET_5, 0.99, (0.86106, 0.99283, 0.99272, 0.77142)),
    ],
)
def test_erk_gives_the_published_sparsities(shapes, sparsity, expected):
    units = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    counts = Erk().keep(units, shapes, sparsity)
    for (name, count), wanted in zip(counts.items(), expected, strict=True):
        size = math.prod(shapes[name])
        assert abs(count - (1 - wanted) * size) <= 1 + 1e-5 * size
    total = sum(map(math.prod, shapes.values()))
    assert abs(sum(counts.values()) - (1 - sparsity) * total) <= len(shapes)


def test_lamp_equals_its_definition():
    weight = normal(6, 7)
    weight[0, :3] = 0.25  # equal weights
    expected = torch.empty_like(weight, dtype=torch.float64)
    for index, value in enumerate(weight.flatten().tolist()):
        larger = [w * w for w in weight.flatten().tolist() if abs(w) >= abs(value)]
        expected.view(-1)[index] = value * value / sum(larger)
    score = Lamp().score(WeightView("w", weight, 0))
    torch.testing.assert_close(score, expected.float())
    assert score.max() == 1


def test_obs_keeps_the_inverse_of_the_blocks_of_the_fisher_matrix():
    options = FisherOptions(samples=20, block=8, damping=1e-3)
    criterion, weight = Obs(options), normal(4, 6, seed=9)
    gradients = [normal(4, 6, seed=seed) for seed in range(20)]
    for gradient in gradients:
        criterion.collect(WeightView("w", weight, 0, gradient=gradient))
    score = criterion.score(WeightView("w", weight, 0))
    for block in range(3):
        rows = torch.stack([g.flatten()[8 * block : 8 * block + 8].double() for g in gradients])
        fisher = rows.T @ rows / 20 + 1e-3 * torch.eye(8, dtype=torch.float64)
        cost = weight.flatten()[8 * block : 8 * block + 8].double().square() / (2 * torch.linalg.inv(fisher).diagonal())
        torch.testing.assert_close(score.flatten()[8 * block : 8 * block + 8].double(), cost, rtol=1e-4, atol=1e-6)


def test_obs_is_exact_on_a_quadratic():
    """With a diagonal Fisher matrix, what a weight's removal costs is w^2 h / 2."""
    criterion = Obs(FisherOptions(samples=4, block=4, damping=1e-6))
    weight, curvature = normal(1, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    for index in range(4):
        gradient = torch.zeros(1, 4)
        gradient[0, index] = (4 * curvature[index]).sqrt()
        criterion.collect(WeightView("w", weight, 0, gradient=gradient))
    torch.testing.assert_close(
        criterion.score(WeightView("w", weight, 0))[0], weight[0].square() * curvature / 2, rtol=1e-4, atol=1e-6
    )


def test_a_hard_concrete_gate_opens_as_often_as_its_closed_form():
    for value, closed in ((-2.0, 0.4010), (-0.5, 0.7500), (0.0, 0.8318), (1.5, 0.9568)):
        assert open_probability(torch.tensor(value)).item() == pytest.approx(closed, abs=6e-5)
    torch.manual_seed(0)
    gates = torch.full((1, 200_000), -0.5)
    view = WeightView("w", torch.ones(1, 200_000), 0, learned={"gates": gates}, training=True)
    drawn = L0().effective(view, torch.ones(1, 200_000, dtype=torch.bool))
    assert (drawn > 0).float().mean().item() == pytest.approx(0.75, abs=0.005)


def test_the_lagrangian_brings_the_gates_to_the_sparsity():
    criterion = L0(GateOptions(learning_rate=0.1))
    view = WeightView("w", normal(20, 30), 3)
    learned = {name: tensor.requires_grad_() for name, tensor in criterion.prepare(view).items()}
    optimizer = torch.optim.AdamW(learned.values(), lr=0.1, weight_decay=0.0)
    for _ in range(400):
        optimizer.zero_grad()
        criterion.penalty({"w": learned}, 0.7).backward()
        optimizer.step()
    assert 1 - open_probability(learned["gates"]).mean().item() == pytest.approx(0.7, abs=0.05)


def test_movement_gives_its_scores_the_gradient_of_the_weight_times_the_weight():
    weight = normal(3, 4, dtype=torch.float64).requires_grad_()
    scores = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    mask, inputs = normal(3, 4, seed=2) > 0, normal(5, 4, seed=3, dtype=torch.float64)
    effective = Movement().effective(WeightView("w", weight, 0, learned={"scores": scores}), mask)
    assert torch.equal(effective, weight * mask)
    upstream = normal(5, 3, seed=4, dtype=torch.float64)
    (inputs @ effective.T * upstream).sum().backward()
    dense = upstream.T @ inputs
    assert torch.equal(scores.grad, dense * weight)
    assert torch.equal(weight.grad, dense * mask)


def test_movement_may_start_at_the_magnitudes():
    criterion = Movement(MovementOptions(start="magnitude"))
    for weight in (normal(3, 4), torch.zeros(3, 4)):
        scores = criterion.prepare(WeightView("w", weight, 0))["scores"]
        mean = weight.abs().mean()
        assert torch.equal(scores, weight.abs() / mean if mean else weight)
    assert not Movement().prepare(WeightView("w", normal(3, 4), 0))["scores"].any()


def test_soft_movement_pays_for_the_mean_of_its_scores():
    learned = {"a": {"scores": normal(3, 4)}, "b": {"scores": normal(5, seed=1)}}
    every = torch.cat([tensors["scores"].flatten() for tensors in learned.values()])
    torch.testing.assert_close(SoftMovement().penalty(learned, 0.5), 0.5 * every.sigmoid().mean())


def test_sr_ste_pulls_masked_weights_to_zero():
    weight = normal(3, 8).requires_grad_()
    mask = normal(3, 8, seed=1) > 0
    effective = SrSte(DecayOptions(decay=0.1)).effective(WeightView("w", weight, 0), mask)
    upstream = normal(3, 8, seed=2)
    effective.backward(upstream)
    assert torch.equal(effective, weight * mask)
    torch.testing.assert_close(weight.grad, upstream + 0.1 * ~mask * weight.detach())


def test_wanda_and_sparsegpt_equal_their_formulas():
    inputs, weight = normal(50, 6, seed=1), normal(4, 6)
    gram = inputs.T @ inputs / 50
    view = WeightView("w", weight, 0, input_norm=gram.diagonal().sqrt(), gram=gram)
    torch.testing.assert_close(Wanda().score(view), weight.abs() * inputs.square().mean(0).sqrt())
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(
        SparseGpt().score(view), (weight.double().square() / torch.linalg.inv(damped).diagonal()).float()
    )


def test_comparison_per_row_keeps_the_same_number_of_each():
    scores = {"w": normal(5, 12).abs()}
    pattern = Unstructured(PerOptions(per="row"))
    mask = pattern.select(scores, {"w": 5 * 4})["w"]
    expected = torch.zeros(5, 12, dtype=torch.bool).scatter_(1, scores["w"].topk(4).indices, value=True)
    assert torch.equal(mask, expected)
    gone = {"w": scores["w"].masked_fill(~mask, float("-inf"))}
    again = pattern.select(gone, {"w": 5 * 2})["w"]
    assert (again.sum(1) == 2).all()
    assert not (again & ~mask).any()


def test_a_floor_keeps_something_of_every_layer_within_the_budget():
    units = {"a": 10 + normal(100).abs(), "b": normal(60, seed=1).abs(), "c": normal(40, seed=2).abs()}
    assert Global().keep(units, {}, 0.9) == {"a": 18, "b": 1, "c": 1}
    assert Global(Floor(floor=0.05)).keep(units, {}, 0.9) == {"a": 15, "b": 3, "c": 2}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.95])
def test_owl_moves_the_budget_and_keeps_it(sparsity):
    units = {"a": normal(50, 40).abs() ** 4, "b": normal(30, 40, seed=1).abs(), "c": 1 + normal(20, 40, seed=2).abs()}
    counts = Owl().keep(units, {}, sparsity)
    total = sum(unit.numel() for unit in units.values())
    assert sum(counts.values()) == total - round(sparsity * total)
    density = {name: count / units[name].numel() for name, count in counts.items()}
    assert density["a"] > density["b"]
    assert max(density.values()) - min(density.values()) <= 2 * 0.08 + 0.01


def test_the_proximal_lasso_solves_orthonormal_least_squares():
    """The minimum of |y - Xw|^2 / 2 + strength |w|_1 with orthonormal X is the soft threshold of X^T y."""
    design = torch.linalg.qr(normal(30, 10, dtype=torch.float64)).Q
    answer = normal(30, seed=1, dtype=torch.float64)
    weight = torch.zeros(1, 10, dtype=torch.float64)
    lasso = L1(LassoOptions(strength=0.3))
    for _ in range(300):
        weight = weight - 0.5 * (weight @ design.T - answer) @ design
        weight = lasso.proximal({"w": weight}, Unstructured(), {"w": 0.5})["w"]
    solution = design.T @ answer
    expected = solution.sign() * (solution.abs() - 0.3).clamp(min=0)
    torch.testing.assert_close(weight[0], expected, rtol=1e-6, atol=1e-7)
    assert (weight == 0).any()


def test_the_group_lasso_shrinks_the_norms_of_rows():
    weight = normal(5, 9)
    weight[2] *= 1e-3
    moved = GroupLasso(LassoOptions(strength=0.1)).proximal({"w": weight}, Row(), {"w": 0.5})["w"]
    norms, size = weight.norm(dim=1, keepdim=True), 9**0.5
    torch.testing.assert_close(moved, weight * (1 - 0.5 * 0.1 * size / norms).clamp(min=0))
    assert not moved[2].any()


def test_the_subgradient_is_the_gradient_of_the_penalty():
    weight = normal(5, 9).requires_grad_()
    options = LassoOptions(strength=0.1, method="subgradient")
    (0.1 * 9**0.5 * weight.norm(dim=1).sum()).backward()
    added = GroupLasso(options).gradient({"w": weight.detach()}, Row(), 1.0)["w"]
    torch.testing.assert_close(added, weight.grad)
    single = L1(options).gradient({"w": weight.detach()}, Unstructured(), 0.5)["w"]
    torch.testing.assert_close(single, 0.05 * weight.detach().sign())


def test_rounds_take_an_equal_share_of_what_is_left():
    schedule = Iterative(Rounds(start=0, end=100, rounds=4, rate=0.2))
    final = 1 - 0.8**4
    densities = [1 - final * schedule.at(step, 100) for step in (0, 24, 25, 50, 75, 100)]
    assert densities == pytest.approx([1, 1, 0.8, 0.64, 0.512, 0.4096])
    assert [step for step in range(101) if schedule.due(step, 100)] == [25, 50, 75, 100]
