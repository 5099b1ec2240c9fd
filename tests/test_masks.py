"""Masks: exact selection against brute force, storage and application bit for bit."""

import copy
import itertools
import math

import pytest
import torch
from helpers import copied
from torch import nn
from torch.nn.utils import prune

import sparsehooks
from sparsehooks import SessionError, masks
from sparsehooks.masks import SAMPLE, check_finite, digest, pack, select, top_counts, unpack

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ranked(scores):
    """Where the largest scores of all lie: a stable sort by (-score, order of the parameters, flat index)."""
    flat = torch.cat([score.flatten().double() for score in scores.values()])
    return torch.sort(flat, descending=True, stable=True).indices


def brute_masks(scores, order, keep):
    chosen = torch.zeros(order.numel(), dtype=torch.bool)
    chosen[order[:keep]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def check_top_counts(scores, keeps):
    order = ranked(scores)
    for keep in keeps:
        expected = {name: int(mask.sum()) for name, mask in brute_masks(scores, order, keep).items()}
        assert top_counts(scores, keep) == expected


def check_select(score, keeps):
    order = ranked({"w": score})
    for keep in keeps:
        expected = brute_masks({"w": score}, order, keep)["w"]
        mask = select({"w": score}, {"w": keep})["w"]
        assert (mask.dtype, mask.shape) == (torch.bool, score.shape)
        assert torch.equal(mask, expected)


def small(kind, seed=0):
    """Three tensors, 6 x 8, 40 and 3 x 4 x 5."""
    rng = generator(seed)
    tensors = {
        "a": torch.randn(6, 8, generator=rng),
        "b": torch.randn(40, generator=rng),
        "c": torch.randn(3, 4, 5, generator=rng),
    }
    make = {
        "random": lambda t: t,
        "tied": lambda t: (t * 2).round(),
        "equal": torch.zeros_like,
        "bf16": lambda t: t.bfloat16(),
        "fp16": lambda t: (t * 0.01).half(),
        "fp64": lambda t: t.double() * 1e-12 + 1.0,  # one value in float32
        "pruned": lambda t: t.masked_fill(t < 0.3, -math.inf),
        "gone": lambda t: torch.full_like(t, -math.inf),
        "huge": lambda t: t * 1e38,
        "tiny": lambda t: t * 1e-42,
        "zeros of both signs": lambda t: t.sign() * 0.0,
    }[kind]
    return {name: make(tensor) for name, tensor in tensors.items()}


KINDS = ["random", "tied", "equal", "bf16", "fp16", "fp64", "pruned", "gone", "huge", "tiny", "zeros of both signs"]


@pytest.mark.parametrize("kind", KINDS)
def test_top_counts_are_those_of_a_stable_sort(kind):
    scores = small(kind)
    check_top_counts(scores, range(sum(score.numel() for score in scores.values()) + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_select_is_a_stable_sort(kind):
    for score in small(kind).values():
        check_select(score, range(score.numel() + 1))


def test_tensors_of_different_dtypes_are_compared_exactly():
    scores = small("tied")
    scores |= {"b": scores["b"].bfloat16(), "c": scores["c"].double() + 1e-12}
    check_top_counts(scores, range(sum(score.numel() for score in scores.values()) + 1))


def test_select_takes_strided_scores():
    score = torch.randn(8, 6, generator=generator()).round().t()
    assert not score.is_contiguous()
    check_select(score, range(score.numel() + 1))


def test_scores_may_carry_a_gradient():
    score = large("random", SAMPLE).requires_grad_()
    assert int(select({"w": score}, {"w": 1000})["w"].sum()) == 1000


def test_an_impossible_count_is_refused():
    for count in (-1, 5):
        with pytest.raises(SessionError, match=f"w: the allocation asks for {count} of 4 units"):
            select({"w": torch.zeros(4)}, {"w": count})


# ----------------------------------------------------------------------------------------------- the sampled bracket

SMALL_SAMPLE = 1 << 11


@pytest.fixture
def small_sample(monkeypatch):
    """Everything that is true of 2^16 sampled values is true of 2^11, and sorts faster."""
    monkeypatch.setattr(masks, "SAMPLE", SMALL_SAMPLE)


@pytest.fixture
def passes(monkeypatch):
    """How often the values were gone through: once if the sample's bracket held, else twice."""
    calls = []
    inner = masks._cut_inside

    def counted(tensors, k, low, high):
        calls.append((low, high))
        return inner(tensors, k, low, high)

    monkeypatch.setattr(masks, "_cut_inside", counted)
    return calls


def large(kind, sample=SMALL_SAMPLE):
    """Five values for each that is sampled, and three more."""
    size, rng = 5 * sample + 3, generator()
    normal, uniform = torch.randn(size, generator=rng), torch.rand(size, generator=rng)
    sampled = torch.arange(size) % 5 == 0
    return {
        "random": normal,
        "bf16": normal.bfloat16(),
        "fp64": normal.double() * 1e-12 + 1.0,
        "tied": normal.mul(3).round(),
        "sorted": torch.linspace(-1, 1, size),
        "equal": torch.ones(size),
        "two values": (uniform < 0.5).float(),
        "half pruned": normal.masked_fill(uniform < 0.5, -math.inf),
        "sample is smallest": torch.where(sampled, uniform - 10, uniform),
        "sample is largest": torch.where(sampled, uniform + 10, uniform),
        "sample is one value": torch.where(sampled, torch.tensor(0.25), uniform),
        "sample is pruned": uniform.masked_fill(sampled, -math.inf),
    }[kind]


HONEST = ["random", "bf16", "fp64", "tied", "sorted", "equal", "two values", "half pruned"]
MISLEADING = ["sample is smallest", "sample is largest", "sample is one value", "sample is pruned"]


def shares(size):
    return [1, size // 100, size // 2, size - size // 10, size - 1]


@pytest.mark.parametrize("kind", HONEST + MISLEADING)
def test_large_tensors_are_selected_exactly(kind, small_sample):
    score = large(kind)
    check_select(score, shares(score.numel()))


@pytest.mark.parametrize("kind", HONEST + MISLEADING)
def test_many_large_tensors_are_counted_exactly(kind, small_sample):
    score = large(kind)
    size = score.numel()
    check_top_counts(dict(zip("abcd", score.split([size - 5001, 4000, 1, 1000]), strict=True)), shares(size))


@pytest.mark.parametrize("kind", ["random", "sample is largest"])
def test_tensors_of_more_than_four_samples_are_selected_exactly(kind):
    score = large(kind, SAMPLE)
    assert score.numel() > 4 * SAMPLE
    check_select(score, shares(score.numel()))


def test_an_honest_sample_saves_the_second_pass(passes):
    score = large("random", SAMPLE)
    for keep in shares(score.numel())[1:4]:
        select({"w": score}, {"w": keep})
    assert len(passes) == 3
    assert all(math.isfinite(low) and math.isfinite(high) for low, high in passes)


def test_a_misleading_sample_costs_a_second_pass_and_nothing_else(passes, small_sample):
    for kind in ("sample is smallest", "sample is largest"):
        passes.clear()
        score = large(kind)
        check_select(score, [score.numel() // 2])
        assert len(passes) == 2, "otherwise this test does not test the fallback"
        assert passes[1] == (-math.inf, math.inf)


# ------------------------------------------------------------------------------------------------------------ twins


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_global_magnitude_equals_torch_global_unstructured(sparsity):
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 50), nn.Linear(50, 10))
    for index, layer in enumerate(model):
        nn.init.normal_(layer.weight, generator=generator(index))
    twin = copy.deepcopy(model)
    layers = [(layer, "weight") for layer in twin]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    stage = {"prune": "magnitude", "sparsity": sparsity, "allocation": "global"}
    sparsehooks.compress(model, {"stage": [stage]})
    for ours, theirs in zip(model, twin, strict=True):
        assert torch.equal(ours.weight != 0, theirs.weight_mask.bool())
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_uniform_magnitude_equals_torch_l1_unstructured(sparsity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 50))
    twin = copy.deepcopy(model)
    for layer in twin:
        prune.l1_unstructured(layer, "weight", amount=sparsity)
    sparsehooks.compress(model, {"stage": [{"prune": "magnitude", "sparsity": sparsity}]})
    for ours, theirs in zip(model, twin, strict=True):
        assert torch.equal(ours.weight, theirs.weight)


# ---------------------------------------------------------------------------------------------- storage, application


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (16, 16), (2, 3, 4, 5), (0, 4)])
def test_a_packed_mask_is_the_mask(shape):
    mask = torch.rand(shape, generator=generator(3)) < 0.5
    bits = pack(mask)
    assert (bits.dtype, bits.numel()) == (torch.uint8, -(-mask.numel() // 8))
    again = unpack(bits, shape, torch.device("cpu"))
    assert (again.dtype, again.shape) == (torch.bool, mask.shape)
    assert torch.equal(again, mask)


def test_bits_are_little_endian():
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)).tolist() == [1, 2]


def test_a_packed_mask_of_strided_memory_is_in_logical_order():
    mask = (torch.rand(6, 10, generator=generator()) < 0.5).t()
    assert torch.equal(unpack(pack(mask), mask.shape, torch.device("cpu")), mask)


@pytest.mark.parametrize("dtype", BITS)
def test_apply_zeroes_what_goes_and_touches_no_bit_of_what_stays(dtype):
    bits = BITS[dtype]
    if dtype.itemsize == 2:  # every finite value there is
        weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        weight = weight[weight.isfinite()]
    else:
        values = torch.randn(4096, generator=generator(), dtype=dtype)
        info = torch.finfo(dtype)
        edges = [0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, info.tiny / 8, info.eps]
        weight = torch.cat([values, torch.tensor(edges, dtype=dtype)])
    for keep_all in (True, False):
        mask = torch.rand(weight.shape, generator=generator(1)) < (2 if keep_all else 0.5)
        masked = weight.clone()
        masks.apply([masked, masked.clone()], [mask, mask])
        assert torch.equal(masked.view(bits)[mask], weight.view(bits)[mask])
        assert not masked[~mask].any()


def test_apply_takes_all_tensors_at_once_and_none():
    weights = [torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16)]
    masks.apply(weights, [torch.tensor([True, False, True]), torch.tensor([[True, False], [False, True]])])
    assert [weight.tolist() for weight in weights] == [[1, 0, 1], [[1, 0], [0, 1]]]
    masks.apply([], [])


def test_a_masked_weight_stays_zero_through_further_training():
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    recipe = {"stage": [{"prune": "magnitude", "sparsity": 0.75}]}
    with sparsehooks.attach(nn.Sequential(model), optimizer, recipe, total_steps=5) as session:
        before = model.weight == 0
        assert int(before.sum()) == 192
        for step in range(5):
            model(torch.randn(4, 16, generator=generator(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(model.weight == 0, before)
        assert session.sparsity == 0.75


# ---------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_are_not_finite_are_refused_by_name(bad, dtype):
    values = torch.randn(4, 5, generator=generator()).to(dtype)
    check_finite("scores of 'layer.weight'", values, "look there")
    for places in itertools.combinations(range(3), 2):
        spoilt = values.clone()
        spoilt.view(-1)[list(places)] = bad
        with pytest.raises(SessionError, match=r"2 of 20 scores of 'layer\.weight' are not finite; look there"):
            check_finite("scores of 'layer.weight'", spoilt, "look there")


def test_infinities_that_cancel_are_noticed():
    with pytest.raises(SessionError, match="2 of 3 w are"):
        check_finite("w", torch.tensor([math.inf, -math.inf, 1.0]), "")


def test_a_sum_that_overflows_is_no_infinite_score():
    check_finite("w", torch.full((100,), 60000.0, dtype=torch.float16), "")
    check_finite("w", torch.full((100,), 3e38), "")


def test_weights_that_have_diverged_stop_the_update_before_any_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    before = copied(model)
    with pytest.raises(SessionError, match=r"1 of 16 weights of '1\.weight' are not finite"):
        sparsehooks.compress(model, {"stage": [{"prune": "magnitude", "sparsity": 0.5}]})
    assert torch.equal(model[0].weight, before["0.weight"])


def test_a_digest_tells_masks_apart():
    one = {"a": pack(torch.tensor([True, False])), "b": pack(torch.tensor([True, True]))}
    others = [
        {**one, "a": pack(torch.tensor([False, True]))},
        {"a": one["b"], "b": one["a"]},
        {"a": one["a"]},
        {"x": one["a"], "b": one["b"]},
    ]
    assert digest(one) == digest({name: bits.clone() for name, bits in one.items()})
    assert len({digest(one), *map(digest, others)}) == 5


def test_select_takes_scores_that_are_views_of_their_negatives():
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.complex64).conj().imag
    assert scores.is_neg()
    assert torch.equal(select({"a": scores}, {"a": 10})["a"], select({"a": scores.resolve_neg()}, {"a": 10})["a"])
