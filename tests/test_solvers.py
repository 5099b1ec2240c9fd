"""Solvers: identities that hold exactly, and a short specification in float64."""

import warnings

import pytest
import torch

from sparsehooks import LayerProblem, PluginManager, SessionError
from sparsehooks.builtin.solvers.least_squares import LeastSquares
from sparsehooks.builtin.solvers.sparsegpt import SparseGPT
from sparsehooks.testing import check_component

SOLVERS = [SparseGPT, LeastSquares]


def problem(rows=24, columns=200, *, tokens=600, seed=0, group=None):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs = inputs @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5)
    inputs[:, ::17] *= 5
    weight = torch.randn(rows, columns, generator=generator)
    return LayerProblem("layer", weight, inputs.t() @ inputs / tokens, group)


def by_loss(share):
    """The OBS score, an exact count over all blocks."""
    taken = 0

    def choose(_, stop, weights, inverse):
        nonlocal taken
        due = round((1 - share) * len(weights) * stop)
        count, taken = due - taken, due
        scores = (weights.square() / inverse).flatten()
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[scores.argsort(descending=True, stable=True)[:count]] = True
        return mask.view(weights.shape)

    return choose


def two_of_four(_, __, weights, inverse):
    scores = (weights.square() / inverse).reshape(len(weights), -1, 4)
    return (
        torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2).indices, value=True).view(weights.shape)
    )


def everything(_, __, weights, ___):
    return torch.ones_like(weights, dtype=torch.bool)


def damped(gram, part=0.01):
    return gram + part * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def lost(change, gram):
    return ((change @ gram) * change).sum()


def specification(layer, choose, group=128, quantize=None):
    """SparseGPT without lazy updates, in float64: the new weight, the mask and sum(err^2)."""
    weight, gram = layer.weight.double(), layer.gram.double()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped(gram))), upper=True)
    mask, total = torch.ones_like(weight, dtype=torch.bool), 0.0
    for column in range(weight.shape[1]):
        if column % group == 0:
            here = slice(column, min(column + group, weight.shape[1]))
            mask[:, here] = choose(here.start, here.stop, weight[:, here], upper.diagonal()[here].square())
        new = weight[:, column] * mask[:, column]
        if quantize is not None:
            new = quantize(new[:, None], slice(column, column + 1))[:, 0]
        error = (weight[:, column] - new) / upper[column, column]
        total += error.square().sum()
        weight[:, column:] -= error[:, None] * upper[column, column:]
        weight[:, column] = new
    return weight, mask, total


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_sparsegpt_equals_the_specification(share):
    layer = problem()
    weight, mask, total = specification(layer, by_loss(share))
    solved, chosen = SparseGPT().solve(layer, by_loss(share))
    assert torch.equal(chosen, mask)
    assert torch.allclose(solved.double(), weight, atol=2e-5)
    assert int(chosen.sum()) == round((1 - share) * mask.numel())
    # what is moved along is what is lost: sum(err^2) = tr(dW H dW^T)
    change = (solved - layer.weight).double()
    assert lost(change, damped(layer.gram.double())) == pytest.approx(float(total), rel=1e-4)


def test_groups_are_chosen_when_they_are_reached():
    layer = problem(columns=72, group=4)
    weight, mask, _ = specification(layer, two_of_four, group=4)
    solved, chosen = SparseGPT().solve(layer, two_of_four)
    assert torch.equal(chosen, mask)
    assert torch.allclose(solved.double(), weight, atol=2e-5)
    assert (chosen.view(len(chosen), -1, 4).sum(dim=2) == 2).all()


@pytest.mark.parametrize("group", [3, 50, 100])
def test_groups_of_any_size_fit_into_blocks(group):
    layer = problem(columns=300, group=group)
    starts = []

    def choose(start, stop, weights, _):
        starts.append((start, stop))
        return torch.ones_like(weights, dtype=torch.bool)

    SparseGPT().solve(layer, choose)
    assert starts == [(start, start + group) for start in range(0, 300, group)]


def test_quantization_joins_in():
    layer = problem()

    def quantize(weights, columns):
        assert weights.shape[1] == columns.stop - columns.start
        return (weights * 8).round() / 8

    weight, _, total = specification(layer, by_loss(0.5), quantize=quantize)
    solved, mask = SparseGPT().solve(layer, by_loss(0.5), quantize)
    assert torch.equal(solved, quantize(solved, slice(0, 200)))
    assert not solved[~mask].any()
    # a value between two steps may fall either way in float32, and moves what follows
    assert (solved.double() - weight).abs().gt(1e-3).float().mean() < 0.1
    joint = lost((solved - layer.weight).double(), damped(layer.gram.double()))
    assert joint == pytest.approx(float(total), rel=0.02)
    alone, _ = SparseGPT().solve(layer, by_loss(0.5))
    later = quantize(alone, slice(0, 200))
    assert joint < lost((later - layer.weight).double(), damped(layer.gram.double()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_where_nothing_goes_nothing_changes(solver):
    layer = problem()
    solved, mask = solver().solve(layer, everything)
    assert mask.all()
    assert torch.allclose(solved, layer.weight, atol=2e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("group", [None, 4])
def test_inputs_that_do_not_vary_together_leave_the_survivors(solver, group):
    layer = problem()
    layer = LayerProblem("layer", layer.weight, torch.eye(200), group)
    choose = by_loss(0.5) if group is None else two_of_four
    solved, mask = solver().solve(layer, choose)
    assert torch.allclose(solved, layer.weight * mask, atol=1e-6)
    magnitude = by_loss(0.5) if group is None else two_of_four
    if solver is LeastSquares:
        expected = magnitude(0, 200, layer.weight, torch.ones(200))
    else:
        steps = range(0, 200, group or 128)
        expected = torch.cat(
            [
                magnitude(start, (stop := min(start + (group or 128), 200)), layer.weight[:, start:stop], torch.ones(1))
                for start in steps
            ],
            dim=1,
        )
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_least_squares_gives_the_best_values_of_each_row(share):
    layer = problem(columns=60)
    solved, mask = LeastSquares().solve(layer, by_loss(share))
    gram = damped(layer.gram.double())
    for row, kept, new in zip(layer.weight.double(), mask, solved, strict=True):
        expected = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ row)
        assert torch.allclose(new[kept].double(), expected, atol=1e-4)
    change, rough = solved - layer.weight, layer.weight * ~mask
    assert lost(change, layer.gram) < lost(rough, layer.gram)


def test_least_squares_takes_rows_that_keep_different_counts_and_few_at_once(monkeypatch):
    monkeypatch.setattr("sparsehooks.builtin.solvers.least_squares.BYTES", 1)
    layer = problem(columns=20)

    def choose(_, stop, weights, __):
        return torch.arange(stop) < torch.arange(len(weights))[:, None]

    solved, mask = LeastSquares().solve(layer, choose)
    assert not solved[0].any()
    assert torch.allclose(solved[20:], layer.weight[20:], atol=1e-4)
    assert not solved[~mask].any()
    nothing, _ = LeastSquares().solve(layer, lambda *a: torch.zeros_like(a[2], dtype=torch.bool))
    assert not nothing.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_never_active_counts_nothing(solver):
    layer = problem(columns=40)
    gram = layer.gram.clone()
    gram[7], gram[:, 7] = 0.0, 0.0
    layer = LayerProblem("layer", layer.weight, gram)
    solved, _ = solver().solve(layer, everything)
    assert not solved[:, 7].any()
    assert torch.allclose(solved[:, :7], layer.weight[:, :7], atol=2e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_damping_grows_where_the_factorization_fails(solver):
    layer = problem(columns=16)
    gram = layer.gram.clone()
    gram -= 1.05 * torch.linalg.eigvalsh(gram)[0] * torch.eye(16) + 0.05 * gram.diagonal().mean() * torch.eye(16)
    gram.diagonal().clamp_(min=1e-3)
    with pytest.warns(UserWarning, match="'layer': its inputs are nearly dependent; the damping was raised to") as seen:
        solved, _ = solver().solve(LayerProblem("layer", layer.weight, gram), by_loss(0.5))
    assert len(seen) == 1
    assert solved.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SessionError, match="'layer': the Gram matrix of its inputs cannot be factored"):
            solver().solve(LayerProblem("layer", layer.weight, torch.full((16, 16), torch.nan)), by_loss(0.5))


@pytest.mark.parametrize("name", ["sparsegpt", "least_squares"])
def test_they_keep_their_contract(name):
    check_component(PluginManager(autoload=False).catalog, "solver", name)
