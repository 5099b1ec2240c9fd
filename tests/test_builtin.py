"""The built-in components: closed forms, brute-force twins and properties that hold bit for bit."""

import copy
import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_bert, tiny_llama
from torch import nn
from torch.nn import functional
from transformers import Trainer

import sparsehooks
from sparsehooks import Batch, SessionError, WeightView, from_codes, row_scales, to_codes
from sparsehooks.builtin.allocations.over_all import Global
from sparsehooks.builtin.allocations.uniform import Uniform
from sparsehooks.builtin.criteria.magnitude import Magnitude
from sparsehooks.builtin.criteria.random import Random
from sparsehooks.builtin.distillers.hidden import Hidden
from sparsehooks.builtin.distillers.logits import KL
from sparsehooks.builtin.patterns import n_of_m
from sparsehooks.builtin.patterns.n_of_m import NOfM
from sparsehooks.builtin.patterns.tiles import Block, Column, Row
from sparsehooks.builtin.patterns.unstructured import Unstructured
from sparsehooks.builtin.quantizers.uniform import Uniform as Int
from sparsehooks.builtin.schedules.ramps import Cosine, Cubic, Linear, OneShot
from sparsehooks.masks import select

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def randn(*shape, seed=0, dtype=None):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor):
    return tensor.detach().view(BITS[tensor.dtype])


def masks_of(pattern, scores, keep):
    """The masks when ``keep[name]`` units of each matrix stay."""
    units = pattern.units(scores)
    return pattern.expand(select(units, keep), scores)


def mask_of(pattern, score, keep):
    return masks_of(pattern, {"w": score}, {"w": keep})["w"]


# ------------------------------------------------------------------------------------------------------- criteria


def test_magnitude_is_the_absolute_value():
    weight = randn(4, 6)
    assert torch.equal(Magnitude().score(WeightView("w", weight, 0)), weight.abs())


def test_random_depends_on_the_seed_alone():
    score = Random().score
    first = score(WeightView("a", torch.zeros(5, 7), 3))
    assert torch.equal(first, score(WeightView("b", torch.ones(5, 7, dtype=torch.bfloat16), 3)))
    assert not torch.equal(first, score(WeightView("a", torch.zeros(5, 7), 4)))
    assert first.unique().numel() == 35


# ------------------------------------------------------------------------------------------------------- n:m

RATIOS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 3), (2, 3), (5, 6)]


def groups(score, m):
    for row, start in itertools.product(range(score.shape[0]), range(0, score.shape[1], m)):
        yield row, start, score[row, start : start + m].tolist()


def largest(values, n):
    """The places of the n largest; of equal values the first ones."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:n]


@pytest.mark.parametrize(("n", "m"), RATIOS)
@pytest.mark.parametrize("kind", ["random", "tied", "equal", "pruned", "bf16"])
def test_n_of_m_keeps_the_n_largest_of_each_group(n, m, kind):
    score = randn(6, 24).abs()
    score = {
        "random": score,
        "tied": score.mul(2).round(),
        "equal": torch.ones_like(score),
        "pruned": score.masked_fill(score < 0.5, -math.inf),
        "bf16": score.bfloat16(),
    }[kind]
    expected = torch.zeros(6, 24, dtype=torch.bool)
    for row, start, values in groups(score, m):
        expected[row, [start + index for index in largest(values, n)]] = True
    assert torch.equal(mask_of(NOfM(NOfM.Config(n, m)), score, 0), expected)


@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_a_ramp_towards_n_of_m_takes_the_groups_that_lose_least_first(n, m):
    pattern, score = NOfM(NOfM.Config(n, m)), randn(6, 24).abs()
    losses = [math.fsum(sorted(values)[: m - n]) for _, _, values in groups(score, m)]
    order = sorted(range(len(losses)), key=lambda index: losses[index])
    for keep in range(len(losses) + 1):
        mask = mask_of(pattern, score, keep)
        thinned = [not all(values) for _, _, values in groups(mask, m)]
        assert [index for index, thin in enumerate(thinned) if thin] == sorted(order[: len(losses) - keep])
        for _, _, values in groups(mask, m):
            assert sum(values) in (n, m)


@functools.cache
def masks_both_ways(n, m):
    """In lexical order: the first keeps the first weights."""
    rows = [[place in kept for place in range(m)] for kept in itertools.combinations(range(m), n)]
    return [mask for mask in itertools.product(rows, repeat=m) if torch.tensor(mask).sum(dim=0).eq(n).all()]


def both_ways(tile, n):
    """Of all masks with N in each row and column the one that keeps most, by the definition; of equal ones the first.

    Minus infinity is what is gone: as little of it as can be comes back.
    """

    def worth(mask):
        kept = [value for row, values in zip(mask, tile, strict=True) for value in itertools.compress(values, row)]
        return -kept.count(-math.inf), math.fsum(value for value in kept if value != -math.inf)

    return torch.tensor(max(masks_both_ways(n, len(tile)), key=worth))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (2, 4), (1, 4), (3, 4)])
@pytest.mark.parametrize("kind", ["random", "tied", "equal", "pruned", "dead", "bf16", "fp64", "large"])
def test_transposable_masks_are_the_best_n_of_m_both_ways(monkeypatch, n, m, kind):
    monkeypatch.setattr(n_of_m, "TILES", 7)
    score = randn(12, 48).abs()
    score = {
        "random": score,
        "tied": score.mul(2).round(),
        "equal": torch.ones_like(score),
        "pruned": score.masked_fill(score < 0.5, -math.inf),
        "dead": torch.where(score < 0.5, -math.inf, 0.0),
        "bf16": score.bfloat16(),
        "fp64": 1 + score.mul(64).round().double() * 2**-40,  # their sums are exact
        "large": score * (torch.finfo(score.dtype).max / 8),
    }[kind]
    mask = mask_of(NOfM(NOfM.Config(n, m, transposable=True)), score, 0)
    for top, left in itertools.product(range(0, 12, m), range(0, 48, m)):
        tile = slice(top, top + m), slice(left, left + m)
        assert torch.equal(mask[tile], both_ways(score[tile].tolist(), n))


def test_an_infinite_score_does_not_hang():
    """Sessions refuse it."""
    mask = mask_of(NOfM(NOfM.Config(transposable=True)), torch.full((8, 12), math.inf), 0)
    assert torch.equal(mask.reshape(-1, 4).sum(dim=1), torch.full((24,), 2))


def test_a_ramp_towards_transposable_masks_takes_the_tiles_that_lose_least_first():
    pattern, score = NOfM(NOfM.Config(transposable=True)), randn(8, 24).abs()
    full = score.masked_fill(mask_of(pattern, score, 0), 0).reshape(2, 4, 6, 4).sum(dim=(1, 3)).flatten()
    order = full.argsort().tolist()
    for keep in range(13):
        tiles = mask_of(pattern, score, keep).reshape(2, 4, 6, 4).sum(dim=(1, 3)).flatten()
        assert [index for index, kept in enumerate(tiles) if kept == 8] == sorted(order[: 12 - keep])
        assert bool(((tiles == 8) | (tiles == 16)).all())


def test_transposable_masks_refuse_what_does_not_fit():
    pattern = NOfM(NOfM.Config(transposable=True))
    assert pattern.check((8, 12)) is None
    assert pattern.check((8, 10)) == "its 10 input features do not divide by 4"
    assert pattern.check((10, 8)) == "its 10 output features do not divide by 4"
    with pytest.raises(ValueError, match="'permute' looks for what keeps most along rows alone"):
        NOfM.Config(permute=True, transposable=True)
    with pytest.raises(ValueError, match="'transposable' tries all masks of 8 x 8 weights; it takes groups up to 4"):
        NOfM.Config(4, 8, transposable=True)


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("moving", [False, True])
def test_the_masks_of_a_ramp_are_nested(moving, transposable):
    """What went scores minus infinity from then on; the other weights go on training."""
    pattern, mask = NOfM(NOfM.Config(transposable=transposable)), torch.ones(8, 24, dtype=torch.bool)
    units, size = (12, 16) if transposable else (48, 4)
    for step in range(units + 1):
        score = randn(8, 24, seed=step if moving else 0).abs().masked_fill(~mask, -math.inf)
        after = mask_of(pattern, score, units - step)
        assert bool((after <= mask).all())
        assert int((~after).sum()) == step * size // 2
        mask = after
    assert torch.equal(mask.reshape(-1, 4).sum(dim=1), torch.full((48,), 2))
    assert torch.equal(mask.t().reshape(-1, 4).sum(dim=1), torch.full((48,), 2)) or not transposable


def test_sums_of_bfloat16_scores_are_not_rounded_to_it():
    score = torch.tensor([[256, 1, 512, 512, 512, 256, 512, 0]], dtype=torch.bfloat16)
    assert NOfM().units({"w": score})["w"].tolist() == [[257, 256]]


def test_a_trained_2_of_4_model_is_2_of_4_after_every_layer():
    model = tiny_bert()
    sparsehooks.compress(model, {"stage": [{"prune": "magnitude", "pattern": "2:4"}]})
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        assert torch.equal((layer.weight != 0).reshape(-1, 4).sum(dim=1).unique(), torch.tensor([2]))


# ------------------------------------------------------------------------------------------------------- tiles

TILES = {
    "block 1x4": (Block(), 1, 4),
    "block 2x3": (Block(Block.Config(2, 3)), 2, 3),
    "block 6x24": (Block(Block.Config(6, 24)), 6, 24),
    "row": (Row(), 1, 24),
    "column": (Column(), 6, 1),
}


def tiles(matrix, height, width):
    for top, left in itertools.product(range(0, matrix.shape[0], height), range(0, matrix.shape[1], width)):
        yield matrix[top : top + height, left : left + width]


@pytest.mark.parametrize("name", TILES)
def test_tiles_go_or_stay_as_a_whole_and_the_smallest_means_go_first(name):
    pattern, height, width = TILES[name]
    score = randn(6, 24).abs()
    means = [tile.double().mean().item() for tile in tiles(score, height, width)]
    order = sorted(range(len(means)), key=lambda index: -means[index])
    for keep in range(len(means) + 1):
        mask = mask_of(pattern, score, keep)
        stays = [tile.all().item() for tile in tiles(mask, height, width)]
        assert [tile.any().item() for tile in tiles(mask, height, width)] == stays
        assert [index for index, stay in enumerate(stays) if stay] == sorted(order[:keep])


@pytest.mark.parametrize("name", TILES)
def test_tiles_take_strided_scores(name):
    pattern, height, width = TILES[name]
    score = randn(24, 6).abs().t()
    mask = mask_of(pattern, score, 1)
    assert torch.equal(mask, mask_of(pattern, score.contiguous(), 1))
    assert int(mask.sum()) == height * width


@pytest.mark.parametrize("kind", ["random", "tied", "pruned", "bf16"])
def test_blocks_of_one_weight_are_unstructured(kind):
    score = randn(6, 24).abs()
    score = {
        "random": score,
        "tied": score.round(),
        "pruned": score.masked_fill(score < 0.5, -math.inf),
        "bf16": score.bfloat16(),
    }[kind]
    pattern = Block(Block.Config(1, 1))
    for keep in range(0, 145, 9):
        assert torch.equal(mask_of(pattern, score, keep), mask_of(Unstructured(), score, keep))


@pytest.mark.parametrize("name", TILES)
def test_pruned_weights_do_not_count_in_the_mean_of_their_tile(name):
    pattern, height, width = TILES[name]
    here = randn(6, 24, seed=5) > -0.5
    score = randn(6, 24).abs().masked_fill(~here, -math.inf)
    units = pattern.units({"w": score})["w"].flatten().tolist()
    for unit, tile in zip(units, tiles(score, height, width), strict=True):
        left = tile[tile.isfinite()].double()
        assert unit == (pytest.approx(left.mean().item(), rel=1e-6) if left.numel() else -math.inf)


def test_a_tile_without_any_weight_left_is_the_first_to_go():
    score = torch.tensor([[1e-9, 1e-9], [-math.inf, -math.inf]])
    assert torch.equal(Row().units({"w": score})["w"].flatten(), torch.tensor([1e-9, -math.inf]))
    assert mask_of(Row(), score, 1).tolist() == [[True, True], [False, False]]


def test_means_of_bfloat16_scores_are_not_rounded_to_it():
    score = torch.ones(2, 512, dtype=torch.bfloat16)
    score[1, 0] = 1.5
    low, high = Row().units({"w": score})["w"].flatten().tolist()
    assert (low, high) == (1.0, 1 + 0.5 / 512)


@pytest.mark.parametrize("name", TILES)
def test_tiles_refuse_what_they_do_not_fill(name):
    pattern, height, width = TILES[name]
    assert pattern.check((6, 24)) is None
    if (height, width) in ((1, 24), (6, 1)):
        assert pattern.check((7, 11)) is None, "a row and a column fit every matrix"
    else:
        assert pattern.check((7, 11)) == f"its shape 7 x 11 does not divide into tiles of {height} x {width}"


# ------------------------------------------------------------------------------------------------------- allocations

SPARSITIES = [0.0, 0.1, 1 / 3, 0.5, 2 / 3, 0.8, 0.95, 1.0]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_uniform_takes_the_same_share_of_every_layer(sparsity):
    units = {"a": randn(6, 8), "b": randn(41), "c": randn(1)}
    assert Uniform().keep(units, {}, sparsity) == {
        "a": 48 - round(48 * sparsity),
        "b": 41 - round(41 * sparsity),
        "c": 1 - round(sparsity),
    }


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_takes_its_share_of_all_layers_together_wherever_it_is_smallest(sparsity):
    units = {"small": 0.1 * randn(6, 8).abs(), "large": 10 + randn(40, seed=1).abs(), "tied": torch.full((12,), 5.0)}
    counts = Global().keep(units, {}, sparsity)
    goes, one = round(100 * sparsity), int(sparsity < 1)  # of every layer one stays
    small = min(goes, 48 - one)
    tied = min(goes - small, 12 - one)
    assert counts == {"small": 48 - small, "tied": 12 - tied, "large": 40 - (goes - small - tied)}


# ------------------------------------------------------------------------------------------------------- schedules

CLOSED = {
    Linear: lambda p: p,
    Cubic: lambda p: p * (3 - 3 * p + p * p),
    Cosine: lambda p: math.sin(math.pi * p / 2) ** 2,
}
RUNS = [
    (start, end, every, total)
    for total in (1, 2, 7, 100, 1001)
    for start, end in ((0.0, 1.0), (0.1, 0.7), (0, 0.5), (0.25, 1.0), (0, total), (total // 3, total - total // 4))
    for every in (1, 2, 3, 10, 97)
]


@pytest.mark.parametrize("cls", CLOSED)
def test_ramps_have_their_closed_form(cls):
    schedule = cls()
    for index in range(1001):
        progress = index / 1000
        assert schedule.sparsity(progress) == pytest.approx(CLOSED[cls](progress), abs=1e-15)
    assert (schedule.sparsity(0.0), schedule.sparsity(1.0)) == (0.0, 1.0)


def test_the_cubic_ramp_of_zhu_and_gupta():
    assert Cubic().sparsity(0.5) == 0.875
    assert Cubic().sparsity(0.1) == pytest.approx(0.271, abs=1e-15)


@pytest.mark.parametrize("cls", CLOSED)
def test_the_last_update_lands_exactly_on_the_target(cls):
    for start, end, every, total in RUNS:
        first = round(start * total) if isinstance(start, float) else start
        last = round(end * total) if isinstance(end, float) else end
        if last <= first or (type(end) is int and end == 1):
            continue  # the plan refuses it
        schedule = cls(cls.Config(start, end, every))
        assert schedule.window(total) == (first, last)
        updates = [step for step in range(total + 1) if schedule.due(step, total)]
        assert updates == sorted({*range(first, last, every), last})
        values = [schedule.at(step, total) for step in range(total + 1)]
        assert values == sorted(values)
        assert values[: first + 1] == [0.0] * (first + 1)
        assert values[last:] == [1.0] * (total + 1 - last)
        for step in range(first, last):
            assert values[step] == pytest.approx(CLOSED[cls]((step - first) / (last - first)), abs=1e-15)


@pytest.mark.parametrize(("start", "step"), [(0.0, 0), (0.5, 50), (1.0, 100), (0, 0), (1, 1), (37, 37)])
def test_oneshot_acts_once(start, step):
    schedule = OneShot(OneShot.Config(start))
    assert schedule.window(100) == (step, step)
    assert [due for due in range(101) if schedule.due(due, 100)] == [step]
    assert [schedule.at(index, 100) for index in range(101)] == [float(index >= step) for index in range(101)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 1}, "'end' = 1 is the first optimizer step; write 1.0 for the whole run"),
        ({"every": 0}, "'every' must be at least 1, got 0"),
        ({"start": 1.5}, "'start' = 1.5 is not a fraction of the run"),
        ({"end": -0.1}, "'end' = -0.1 is not a fraction of the run"),
        ({"end": float("nan")}, "'end' = nan is not a fraction of the run"),
        ({"start": -3}, "'start' = -3 is before the first step"),
        ({"start": 30, "end": 20}, "ends .* before it starts"),
        ({"start": 0.5, "end": 0.5}, "ends .* before it starts"),
    ],
)
def test_windows_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cubic.Config(**options)


# ------------------------------------------------------------------------------------------------------- kl


def kl(student, teacher, temperature=2.0, shifts=False, **inputs):
    distiller = KL(KL.Config(temperature))
    return distiller.loss({"logits": student}, {"logits": teacher}, Batch(inputs, shifts), {})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_kl_is_what_torch_calls_batchmean_times_the_squared_temperature(temperature):
    student, teacher = 3 * randn(32, 10), 3 * randn(32, 10, seed=1)
    expected = functional.kl_div(
        functional.log_softmax(student.double() / temperature, dim=-1),
        functional.softmax(teacher.double() / temperature, dim=-1),
        reduction="batchmean",
    )
    ours = kl(student, teacher, temperature).double().sum() / 32
    torch.testing.assert_close(ours, expected * temperature**2, rtol=1e-6, atol=0)


def test_kl_is_zero_for_equal_logits_and_their_shifts_and_never_negative():
    logits = 5 * randn(64, 10)
    assert torch.equal(kl(logits, logits), torch.zeros(64))
    torch.testing.assert_close(kl(logits, logits + 3), torch.zeros(64), rtol=0, atol=1e-5)
    student = logits.clone().requires_grad_()
    kl(student, logits).sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros(64, 10), rtol=0, atol=1e-6)
    assert bool((kl(logits, randn(64, 10, seed=1)) >= 0).all())


def test_the_gradient_of_kl_tends_to_the_centred_difference_of_the_logits():
    student, teacher = randn(8, 10).requires_grad_(), randn(8, 10, seed=1)
    kl(student, teacher, temperature=1000.0).sum().backward()
    difference = student.detach() - teacher
    centred = (difference - difference.mean(dim=-1, keepdim=True)) / 10
    torch.testing.assert_close(student.grad, centred, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_is_computed_in_float32(dtype):
    student, teacher = 8 * randn(16, 10, dtype=dtype), 8 * randn(16, 10, seed=1, dtype=dtype)
    values = kl(student, teacher)
    assert values.dtype == torch.float32
    assert torch.equal(values, kl(student.float(), teacher.float()))


def test_kl_refuses_what_it_cannot_compare():
    with pytest.raises(SessionError, match="the model returns none; use hidden"):
        KL().loss({}, {"logits": randn(2, 3)}, Batch({}), {})
    with pytest.raises(SessionError, match=r"got \(2, 3\) from the student and \(2, 4\) from the teacher"):
        kl(randn(2, 3), randn(2, 4))
    with pytest.raises(SessionError, match="the model gives one number"):
        kl(randn(2, 1), randn(2, 1, seed=1))


# ------------------------------------------------------------------------------------------------------- items


def counted_by_the_trainer(batches, shifts):
    """What transformers' Trainer divides the loss by."""
    trainer = SimpleNamespace(
        model_accepts_loss_kwargs=True,
        compute_loss_func=None,
        _loss_shifts_labels=shifts,
        args=SimpleNamespace(average_tokens_across_devices=False, n_gpu=0, world_size=1),
        get_tp_size=lambda: 1,
        get_cp_size=lambda: 1,
        get_sp_size=lambda: 1,
    )
    return int(Trainer._get_num_items_in_batch(trainer, batches, torch.device("cpu")))


def ragged_labels(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (3, 7), generator=generator)
    return labels.masked_fill(torch.rand(3, 7, generator=generator) < 0.4, -100)


@pytest.mark.parametrize("kind", ["token", "causal", "shift_labels", "sample"])
def test_there_is_one_value_for_each_item_that_the_trainer_counts(kind):
    batches, values = [], []
    for seed in range(4):
        labels, logits = ragged_labels(seed), (randn(3, 7, 5, seed=seed), randn(3, 7, 5, seed=9 + seed))
        inputs = {"labels": labels}
        if kind == "shift_labels":
            inputs = {"labels": labels.roll(1), "shift_labels": labels}
        if kind == "sample":
            inputs, logits = {"labels": torch.tensor([0, 1, 2])}, tuple(one[:, 0] for one in logits)
        batches.append(inputs)
        values.append(kl(*logits, shifts=kind in ("causal", "shift_labels"), **inputs))
    total = sum(value.numel() for value in values)
    assert total == counted_by_the_trainer(batches, shifts=kind == "causal")
    assert all(value.dim() == 1 for value in values)


def test_whether_labels_are_shifted_is_known_for_real_models():
    from sparsehooks.distillation import _shifts_labels

    assert _shifts_labels(tiny_llama())
    assert not _shifts_labels(tiny_bert())
    assert not _shifts_labels(nn.Linear(2, 2))


def test_a_causal_model_is_compared_where_its_own_loss_is():
    labels, values = ragged_labels(0), torch.arange(21.0).reshape(3, 7)
    expected = [
        values[row, token].item() for row in range(3) for token in range(6) if labels[row, token + 1].item() != -100
    ]
    assert Batch({"labels": labels}, shifts_labels=True).items(values).tolist() == expected
    shifted = {"labels": labels, "shift_labels": functional.pad(labels[:, 1:], (0, 1), value=-100)}
    assert Batch(shifted, shifts_labels=True).items(values).tolist() == expected
    unshifted = [value for value, label in zip(values.flatten(), labels.flatten(), strict=True) if label != -100]
    assert Batch({"labels": labels}).items(values).tolist() == unshifted


def test_a_batch_without_any_label_has_no_items():
    values = Batch({"labels": torch.full((3, 7), -100)}).items(torch.ones(3, 7))
    assert values.shape == (0,)


def test_without_token_labels_a_sample_is_the_mean_of_its_tokens():
    values = torch.tensor([[1.0, 3.0, 100.0], [2.0, 4.0, 9.0], [5.0, 6.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    for labels in ({}, {"labels": torch.tensor([0, 1, 1])}):
        assert Batch({"attention_mask": mask, **labels}).items(values).tolist() == [2.0, 5.0, 0.0]
        assert Batch(labels).items(values).tolist() == values.mean(dim=1).tolist()


# ------------------------------------------------------------------------------------------------------- hidden


def states(*seeds, width=8):
    return tuple(randn(3, 7, width, seed=seed) for seed in seeds)


def hidden(student, teacher, learned=None, layers="all", **inputs):
    distiller = Hidden(Hidden.Config(layers))
    return distiller.loss({"hidden_states": student}, {"hidden_states": teacher}, Batch(inputs), learned or {})


MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])


def test_hidden_is_the_mean_squared_error_of_all_layers_or_the_last():
    ours, theirs = states(0, 1, 2), states(3, 4, 5)
    each = [
        functional.mse_loss(one, other, reduction="none").mean(dim=(1, 2))
        for one, other in zip(ours, theirs, strict=True)
    ]
    torch.testing.assert_close(hidden(ours, theirs), sum(each) / 3)
    torch.testing.assert_close(hidden(ours, theirs, layers="last"), each[-1])


def test_hidden_is_zero_for_equal_states_and_for_them_alone():
    ours = states(0, 1, 2)
    assert torch.equal(hidden(ours, ours), torch.zeros(3))
    assert bool((hidden(ours, states(0, 1, 3)) > 0).all())
    assert torch.equal(hidden(ours, (ours[0], randn(3, 7, 8, seed=9), ours[2]), layers="last"), torch.zeros(3))


def test_padding_does_not_count():
    ours, theirs = states(0, 1), states(2, 3)
    expected = hidden(ours, theirs, attention_mask=MASK)
    for filler in (0.0, 1e4):
        padded = tuple(torch.where(MASK[:, :, None] == 1, state, torch.tensor(filler)) for state in ours)
        assert torch.equal(hidden(padded, theirs, attention_mask=MASK), expected)
    alone = [
        hidden(
            tuple(state[row : row + 1, MASK[row] == 1] for state in ours),
            tuple(state[row : row + 1, MASK[row] == 1] for state in theirs),
        )
        for row in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), expected)


def test_hidden_counts_tokens_where_the_labels_do():
    labels = ragged_labels(0)
    values = hidden(states(0), states(1), labels=labels)
    token = (states(0)[0] - states(1)[0]).square().mean(dim=-1)
    assert torch.equal(values, token[labels != -100])


def test_another_number_of_layers_is_refused_with_what_to_write():
    with pytest.raises(
        SessionError, match='student has 1 layers and the teacher 2; use layers = "last", "uniform", or pairs'
    ):
        hidden(states(0, 1), states(2, 3, 4))
    assert hidden(states(0, 1), states(2, 3, 4), layers="last").shape == (3,)


def sized(width):
    return SimpleNamespace(config=SimpleNamespace(hidden_size=width))


def test_a_projection_is_learned_where_the_widths_differ():
    prepare = Hidden().prepare
    assert prepare(sized(8), sized(8), torch.Generator()) == {}
    learned = prepare(sized(8), sized(12), torch.Generator().manual_seed(0))
    again = prepare(sized(8), sized(12), torch.Generator().manual_seed(0))
    (projection,) = learned.values()
    assert projection.shape == (12, 8)
    assert torch.equal(projection, again["projection"])
    ours, theirs = states(0, 1), states(2, 3, width=12)
    projection.requires_grad_()
    values = hidden(ours, theirs, learned)
    expected = sum(
        (functional.linear(one, projection) - other).square().mean(dim=(1, 2))
        for one, other in zip(ours, theirs, strict=True)
    )
    torch.testing.assert_close(values, expected / 2)
    values.sum().backward()
    assert bool((projection.grad != 0).all())


def test_a_student_that_the_projection_explains_has_no_loss():
    projection = randn(12, 8)
    ours = states(0, 1)
    theirs = tuple(state @ projection.t() for state in ours)
    assert torch.equal(hidden(ours, theirs, {"projection": projection}), torch.zeros(3))


def test_a_model_without_a_width_is_refused():
    with pytest.raises(SessionError, match=r"hidden: Linear has no config\.hidden_size"):
        Hidden().prepare(nn.Linear(2, 2), sized(8), torch.Generator())


# ------------------------------------------------------------------------------------------------------- int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(dtype):
    """Rows of many sizes, a row of zeros, and zeros in between; dense, and of one column."""
    scale = torch.logspace(-4, 2, 12)[:, None]
    matrix = (randn(12, 40) * scale).masked_fill(randn(12, 40, seed=1) < -1, 0.0)
    matrix[3] = 0
    return [tensor.to(dtype) for tensor in (matrix, matrix[:, :1])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_a_projection(dtype):
    for weight in weights(dtype):
        before = weight.clone()
        quantized = Int().fake_quantize(weight)
        assert (quantized.dtype, quantized.shape) == (dtype, weight.shape)
        assert torch.equal(bits(Int().fake_quantize(quantized)), bits(quantized))
        assert torch.equal(bits(weight), bits(before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_grid_of_the_file(dtype):
    for weight in weights(dtype):
        expected = from_codes(to_codes(weight, row_scales(weight)), row_scales(weight), dtype)
        assert torch.equal(bits(Int().fake_quantize(weight)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_keeps_zeros_and_the_largest_of_a_row_near(dtype):
    for weight in weights(dtype):
        quantized = Int().fake_quantize(weight)
        zero = weight == 0
        assert torch.equal(bits(quantized)[zero], torch.zeros_like(bits(quantized)[zero])), "+0.0, never -0.0"
        half = row_scales(weight).double() / 2
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 2**-17
        error = (quantized.double() - weight.double()).abs()
        assert bool((error <= half * (1 + 2**-15) + rounding * weight.double().abs()).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_int8_is_that_of_the_identity(dtype):
    for weight in weights(dtype):
        learning = weight.clone().requires_grad_()
        upstream = randn(*weight.shape, seed=2, dtype=dtype)
        Int().fake_quantize(learning).backward(upstream)
        assert torch.equal(bits(learning.grad), bits(upstream))


def test_int8_makes_rows_that_are_not_finite_nan():
    for bad in (math.nan, math.inf):
        weight = randn(2, 3)
        weight[1, 1] = bad
        assert Int().fake_quantize(weight)[1].isnan().all()


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv1d", "conv2d", "transformers conv1d"])
def test_a_layer_computes_with_its_quantized_weight_and_is_put_back(kind):
    from transformers import Conv1D

    from sparsehooks.swapping import swap, unswap
    from sparsehooks.targets import find

    torch.manual_seed(0)
    layer, inputs = {
        "linear": (nn.Linear(8, 6), randn(3, 8)),
        "embedding": (nn.Embedding(10, 6, padding_idx=0), torch.arange(10)),
        "conv1d": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), randn(2, 4, 9)),
        "conv2d": (nn.Conv2d(4, 6, 3, stride=2, groups=2), randn(2, 4, 9, 9)),
        "transformers conv1d": (Conv1D(6, 8), randn(3, 8)),
    }[kind]
    model = nn.ModuleDict({"layer": layer})
    cls, keys, attributes = type(layer), list(model.state_dict()), set(vars(layer))
    twin = copy.deepcopy(layer)
    (target,) = find(model, ["layer"], [])[0]
    with torch.no_grad():
        twin.weight.copy_(target.restore(Int().fake_quantize(target.matrix(twin.weight))))
    swap(model, target, "quantize", lambda matrix, training: Int().fake_quantize(matrix))
    assert isinstance(layer, cls)
    assert list(model.state_dict()) == keys
    outputs, expected = layer(inputs), twin(inputs)
    torch.testing.assert_close(outputs, expected)
    upstream = randn(*outputs.shape, seed=1)
    outputs.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    unswap(model, target)
    assert (type(layer), set(vars(layer))) == (cls, attributes)
    assert not torch.equal(layer.weight, twin.weight), "swapping leaves the parameter as it is"
