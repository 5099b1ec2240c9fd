"""Quantizers against closed forms, brute force and torch's own."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsehooks.builtin.quantizers.kmeans import KMeans, Options as KMeansOptions, clusters
from sparsehooks.builtin.quantizers.levels import NF4, APoT, APoTOptions, NF4Options
from sparsehooks.builtin.quantizers.lsq import Lsq, Options as LsqOptions
from sparsehooks.builtin.quantizers.uniform import Options, Uniform
from sparsehooks.builtin.solvers.damping import Options as Damping
from sparsehooks.grids import SMALLEST, Steps, min_max, read_grid, significant
from sparsehooks.plugins import PluginManager
from sparsehooks.ranges import _divergences, find_range
from sparsehooks.testing import check_component


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


UNIFORM = [
    Options(bits, symmetric, per, **({"group": 8} if per == "group" else {}))
    for bits, symmetric, per in itertools.product((2, 3, 4, 5, 6, 7, 8), (True, False), ("tensor", "channel", "group"))
]


def name_of(options):
    return f"{options.bits}-{'sym' if options.symmetric else 'asym'}-{options.per}"


@pytest.mark.parametrize("options", UNIFORM, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_value_is_farther_than_half_a_step(options, dtype):
    quantizer, weight = Uniform(options), normal(6, 32, dtype=dtype)
    weight[2, ::3] = 0
    grid = quantizer.grid(weight)
    codes = quantizer.quantize(weight, grid)
    steps = Steps(options.bits, options.symmetric)
    assert steps.least <= int(codes.min())
    assert int(codes.max()) <= steps.most
    exact = quantizer.dequantize(codes, grid, torch.float32)
    scale = grid["scales"].repeat_interleave(weight.numel() // grid["scales"].numel()).reshape(weight.shape)
    # rounding the scale and the zero point can push the end of the range out by half a step, and a scale's last bit
    limit = scale * (0.5 if options.symmetric else 1.0) * (1 + 2**-14)
    assert bool(((exact - weight.float()).abs() <= limit).all())
    assert bool((exact[weight == 0] == 0).all())
    # every product is exact: in float64 it is the same number
    zeros = grid.get("zeros", torch.zeros(1, 1)).double()
    wide = zeros.repeat_interleave(weight.numel() // zeros.numel()).reshape(weight.shape)
    assert torch.equal(exact.double(), (codes.double() - wide) * scale.double())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantization_equals_that_of_torch(bits, symmetric):
    quantizer, weight = Uniform(Options(bits, symmetric)), normal(7, 40)
    grid = quantizer.grid(weight)
    steps = Steps(bits, symmetric)
    zeros = grid.get("zeros", torch.zeros(7, 1)).flatten().int()
    mine, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    found = quantizer.fake_quantize(mine, grid)
    expected = torch.fake_quantize_per_channel_affine(
        theirs, grid["scales"].flatten(), zeros, 0, steps.least, steps.most
    )
    assert torch.equal(found, expected)
    upstream = normal(7, 40, seed=1)
    found.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(mine.grad, theirs.grad)


def test_a_range_that_clips_gives_no_gradient_outside():
    quantizer = Uniform(Options(4, range="percentile", percentile=90.0))
    weight = normal(3, 100).requires_grad_()
    grid = quantizer.grid(weight)
    quantizer.fake_quantize(weight).sum().backward()
    outside = (weight.detach() / grid["scales"]).round().abs() > 7
    assert 0 < int(outside.sum()) < 60
    assert bool((weight.grad[outside] == 0).all())
    assert bool((weight.grad[~outside] == 1).all())


def brute_percentile(row, share):
    values = sorted(value for value in row.tolist() if value)
    outside = math.floor((1 - share / 100) * len(values))
    return min(0.0, values[outside]), max(0.0, values[len(values) - 1 - outside])


@pytest.mark.parametrize("share", [90.0, 99.0, 100.0])
def test_percentiles_leave_zeros_out(share):
    weight = normal(5, 200)
    weight[torch.rand(5, 200, generator=torch.Generator().manual_seed(2)) < 0.7] = 0
    weight[4] = 0
    low, high = find_range(weight, "percentile", Steps(8), share)
    for index in range(4):
        assert (low[index].item(), high[index].item()) == brute_percentile(weight[index], share)
    assert low[4].item() == high[4].item() == 0


@pytest.mark.parametrize("how", ["mse", "half_quadratic", "percentile", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ranges_hold_zero_and_lie_within_the_values(how, symmetric, bits):
    weight = normal(1 if how == "entropy" else 6, 400)
    low, high = find_range(weight, how, Steps(bits, symmetric), 99.0)
    whole = find_range(weight, "min_max", Steps(bits, symmetric), 99.0)
    most = 1.5 if how == "half_quadratic" else 1.0
    assert bool(((low <= 0) & (low >= most * whole[0])).all())
    assert bool(((high >= 0) & (high <= most * whole[1])).all())


def squared(weight, options):
    quantizer = Uniform(options)
    return (quantizer.fake_quantize(weight) - weight).double().square().sum(dim=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_search_for_the_squared_error_is_never_worse_than_the_whole_range(bits, symmetric):
    weight = normal(20, 300)
    searched = squared(weight, Options(bits, symmetric, range="mse"))
    assert bool((searched <= squared(weight, Options(bits, symmetric)) * (1 + 1e-6)).all())
    if bits <= 4:
        assert searched.sum() < 0.95 * squared(weight, Options(bits, symmetric)).sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_half_quadratic_is_never_worse_in_its_own_norm(bits, symmetric):
    weight = normal(20, 64)

    def error(how):
        found = Uniform(Options(bits, symmetric, "group", 64, range=how)).fake_quantize(weight)
        return (found - weight).abs().pow(0.7).sum(dim=1)

    assert bool((error("half_quadratic") <= error("min_max") * (1 + 1e-6)).all())
    assert error("half_quadratic").sum() < error("min_max").sum()


def test_the_best_clip_of_a_normal_distribution():
    # the optimal 4-bit clip of a Gaussian lies at about 2.6 standard deviations: a step of 2.6 / 7.5 between 15 levels
    weight = normal(1, 1_000_000)
    _, high = find_range(weight, "mse", Steps(4), 99.9)
    fine = torch.linspace(1.5, 5.0, 141)

    def error(limit):
        scale = limit / 7
        return ((weight / scale).round().clamp(-7, 7) * scale - weight).square().mean()

    best = fine[torch.stack([error(limit) for limit in fine]).argmin()]
    assert abs(high.item() - best.item()) < 0.1


def divergence(histogram, end, levels):
    """Migacz's, bin by bin."""
    clipped = histogram[:end].clone()
    clipped[-1] += histogram[end:].sum()
    level = torch.arange(end) * levels // end
    spread = torch.zeros(end, dtype=torch.float64)
    for index in range(levels):
        there = (level == index) & (histogram[:end] > 0)
        if there.any():
            spread[there] = histogram[:end][there].sum() / there.sum()
    kept = clipped > 0
    spread = spread[kept].clamp(min=1e-12)
    share = clipped[kept] / clipped.sum()
    return float((share * (share / (spread / spread.sum())).log()).sum())


@pytest.mark.parametrize("levels", [1, 2, 8, 127, 128])
@pytest.mark.parametrize("gaps", [False, True])
def test_divergences_from_sums_are_those_bin_by_bin(levels, gaps):
    histogram = torch.histc(normal(1, 5000).abs() ** 2, 300, 0).double()
    if gaps:
        histogram[torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
        histogram[3] = 10
    found = _divergences(histogram, levels)
    assert len(found) == 300 - levels + 1
    for end in range(levels, 301, 7):
        if histogram[:end].sum():
            assert abs(float(found[end - levels]) - divergence(histogram, end, levels)) < 1e-9


@pytest.mark.parametrize("far", [[1.0] * 9, [0.9, 0.95, 1.0]])
def test_entropy_clips_not_all_values_that_are_far_from_zero(far):
    _, high = find_range(torch.tensor([[*far, *(-value for value in far)]]), "entropy", Steps(8), 99.9)
    assert high.item() >= min(far)


def test_entropy_clips_a_long_tail():
    weight = torch.cat([normal(1, 100_000), torch.full((1, 5), 40.0)], dim=1)
    _, high = find_range(weight, "entropy", Steps(8), 99.9)
    assert 3 < high.item() < 12


# ------------------------------------------------------------------------------------------------------------- learned


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_gradient_of_a_learned_scale(per):
    quantizer, weight = Lsq(LsqOptions(3, per)), normal(4, 30) * 2
    grid = {name: part.requires_grad_() for name, part in quantizer.grid(weight).items()}
    upstream = normal(4, 30, seed=1)
    quantizer.fake_quantize(weight, grid).backward(upstream)
    scale = significant(grid["log_scales"].detach().exp(), 17)
    ratio = weight / scale
    slope = torch.where(ratio < -3, -3.0, torch.where(ratio > 3, 3.0, ratio.round() - ratio))  # equation 3
    each = slope.numel() / scale.numel()
    expected = (upstream * slope * scale / math.sqrt(each * 3)).double()
    expected = expected.sum(1, keepdim=True) if per == "channel" else expected.sum().reshape(1, 1)
    torch.testing.assert_close(grid["log_scales"].grad.double(), expected, rtol=1e-5, atol=1e-6)
    assert 0 < int((ratio.abs() > 3).sum()) < 60


def test_where_a_learned_scale_starts():
    weight = normal(3, 50)
    weight[1, :25] = 0
    weight[2] = 0
    scales = Lsq(LsqOptions(4)).grid(weight)["log_scales"].exp().flatten()
    for row, scale in zip(weight[:2], scales, strict=False):
        there = row[row != 0].abs()
        assert abs(scale.item() - 2 * there.mean().item() / math.sqrt(7)) < 1e-6
    assert scales[2] == 1


# ------------------------------------------------------------------------------------------------------------- k-means


def optimal_error(values, count, stride=1):
    """Ckmeans.1d.dp by brute force, O(k n^2), with cuts at multiples of ``stride`` of the sorted values."""
    ordered = np.sort(values.astype(np.float64))
    first, second = (np.concatenate([[0], np.cumsum(ordered**power)]) for power in (1, 2))
    first, second, total = first[::stride], second[::stride], np.arange(len(ordered) + 1)[::stride]
    size = len(total) - 1
    best = np.full(size + 1, np.inf)
    best[0] = 0
    for _ in range(count):
        new = np.full(size + 1, np.inf)
        new[0] = 0
        for stop in range(1, size + 1):
            starts = np.arange(stop)
            costs = second[stop] - second[starts] - (first[stop] - first[starts]) ** 2 / (total[stop] - total[starts])
            new[stop] = (best[starts] + np.maximum(costs, 0)).min()
        best = new
    return best[size]


def error_of(values, centroids):
    return np.square(values[:, None].astype(np.float64) - centroids[None].astype(np.float64)).min(axis=1).sum()


@pytest.mark.parametrize("count", [1, 2, 4, 16])
@pytest.mark.parametrize("kind", ["normal", "tails", "pruned"])
def test_clusters_are_within_a_hundredth_of_the_best(count, kind):
    values = np.random.default_rng(count).standard_normal(600).astype(np.float32)
    values = {"normal": values, "tails": values**3, "pruned": values[np.abs(values) > 1]}[kind]
    best = optimal_error(values, count)
    found = error_of(values, clusters(values, count))
    assert best * (1 - 1e-9) <= found <= best * 1.01


def test_many_values_are_clustered_as_well_as_few():
    values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    assert error_of(values, clusters(values, 16)) < 1.01 * optimal_error(values, 16, stride=200)


def test_a_linear_start_never_gets_worse():
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    start = np.linspace(values.min(), values.max(), 16)
    assert error_of(values, clusters(values, 16, "linear")) < error_of(values, start)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [1.0, 2.0, 3.0]])
def test_fewer_values_than_clusters_are_exact(values):
    assert clusters(np.array(values, np.float32), 16).tolist() == sorted(set(values))


@pytest.mark.parametrize("sparse", [True, False])
def test_indices_fit_their_bits_and_zeros_stay(sparse):
    weight = normal(20, 30)
    weight[torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) < (0.8 if sparse else 0.1)] = 0
    quantizer = KMeans(KMeansOptions(3))
    grid = quantizer.grid(weight)
    found = quantizer.dequantize(quantizer.quantize(weight, grid), grid, torch.float32)
    assert torch.equal(found == 0, weight == 0)
    assert len(found[found != 0].unique()) == (8 if sparse else 7)


def test_a_centroid_receives_the_sum_of_its_members_gradients():
    weight = normal(6, 40)
    weight[0] = 0
    quantizer = KMeans(KMeansOptions(2))
    grid = quantizer.grid(weight)
    grid["codebook"].requires_grad_()
    upstream = normal(6, 40, seed=1)
    learning = weight.clone().requires_grad_()
    quantizer.fake_quantize(learning, grid).backward(upstream)
    expected = [float(upstream[grid["codes"] == code].sum()) for code in range(1, 4)]
    torch.testing.assert_close(grid["codebook"].grad[1:], torch.tensor(expected))
    assert grid["codebook"].grad[0] == 0
    assert torch.equal(learning.grad, torch.zeros(6, 40)), "without a gradient DDP would wait for it"


# ------------------------------------------------------------------------------------------------------------- levels


def test_the_levels_of_nf4():
    published = [-1, -0.69619289, -0.52507304, -0.39491749, -0.28444136, -0.18477344, -0.09104999, 0]
    published += [0.07958033, 0.16093017, 0.24611229, 0.33791519, 0.4407098, 0.56261697, 0.72295673, 1]
    torch.testing.assert_close(NF4().levels("cpu"), torch.tensor(published), rtol=0, atol=2e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_levels_of_powers_of_two(bits):
    levels = APoT(APoTOptions(bits)).levels("cpu")
    assert len(levels) == 2**bits - 1
    assert torch.equal(levels, -levels.flip(0))
    assert levels[-1] == 1


@pytest.mark.parametrize(
    ("bits", "sums", "top"),
    [
        (3, [0, 1, 2, 4], 4),  # {0, 2^-1, 2^-2, 2^-3}
        (4, [0, 1, 2, 3, 4, 6, 8, 10], 10),  # {0, 2^-1, 2^-2, 2^-4} + {0, 2^-3}
        (5, [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48], 48),  # 2^-1, 2^-3, 2^-5 and 2^-2, 2^-4, 2^-6
    ],
)
def test_the_levels_that_the_authors_of_apot_publish(bits, sums, top):
    levels = APoT(APoTOptions(bits)).levels("cpu")
    torch.testing.assert_close(levels[levels >= 0] * top, torch.tensor(sums, dtype=torch.float32))


@pytest.mark.parametrize("double", [False, True])
def test_a_scale_of_nf4_is_the_largest_of_its_block(double):
    weight = normal(8, 256)
    weight[3, :64] = 0
    scales = NF4(NF4Options(64, double)).grid(weight)["scales"]
    largest = weight.reshape(8, 4, 64).abs().amax(dim=2)
    if double:
        step = significant((largest.max() / 255).reshape(1), 16)
        assert bool((((scales - largest).abs() <= step / 2 * 1.001) | (largest == 0)).all())
        torch.testing.assert_close((scales / step).round() * step, scales, rtol=0, atol=0)
    else:
        assert torch.equal(scales, torch.where(largest > 0, largest, 1.0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Options(9), "'bits' = 9 is outside 2 to 8"),
        (lambda: Options(group=0), "'group' = 0"),
        (lambda: Options(percentile=math.nan), "'percentile' = nan"),
        (lambda: Options(range="entropy"), 'add per = "tensor"'),
        (lambda: Options(group=64), '\'group\' = 64 has no effect with per = "channel"; add per = "group"'),
        (lambda: Options(percentile=99.0), "'percentile' = 99.0 has no effect with range = \"min_max\"; add range"),
        (lambda: LsqOptions(1), "'bits' = 1"),
        (lambda: LsqOptions(learning_rate=math.inf), "'learning_rate' = inf is not a positive number"),
        (lambda: KMeansOptions(learning_rate=math.inf), "'learning_rate' = inf is not a positive number"),
        (lambda: APoTOptions(learning_rate=math.inf), "'learning_rate' = inf is not a positive number"),
        (lambda: Damping(math.inf), "'damping' = inf is not a positive number"),
        (lambda: LsqOptions(learning_rate=math.nan), "'learning_rate' = nan"),
        (lambda: KMeansOptions(0), "'bits' = 0 is outside 1 to 8"),
        (lambda: NF4Options(0), "'block' = 0"),
        (lambda: APoTOptions(learning_rate=-1.0), "'learning_rate' = -1.0"),
    ],
)
def test_bad_options_are_said(make, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "lsq", "kmeans", "nf4", "apot"])
def test_they_keep_their_contract(name):
    check_component(PluginManager(autoload=False).catalog, "quantizer", name)


def plainly_read(block, steps):
    """The scale and the zero point of one row: of the largest size that gives it back."""
    low, high = (float(end) for end in min_max(block[None]))
    reach = max(-low, high) if steps.symmetric else high - low
    for size in range(steps.most, 0, -1) if reach else ():
        exact = torch.tensor([reach / size], dtype=torch.float64).float().clamp(min=SMALLEST)
        scale = significant(exact, 17 if steps.symmetric else 16)
        codes = (block.float() / scale).round()
        if torch.equal(steps.values(codes, scale, None, block.dtype), block):
            return float(scale), -min(0.0, float(codes.min()))
    return None if reach else (1.0, 0.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_grid_is_read_where_there_is_one(dtype, bits, symmetric):
    """Also where only one of many values lies beside it."""
    steps, seen = Steps(bits, symmetric), set()
    for seed, (rows, columns) in enumerate([(1, 1), (3, 300), (20, 70), (70, 9), (17, 65)] * 2):
        weight = normal(rows, columns, seed=seed) * 10.0 ** (seed - 5)
        weight[normal(rows, columns, seed=seed + 50) > seed % 3] = 0
        weight[::5] = 0
        grid = steps.fit(*min_max(weight))
        zeros = grid.get("zeros")
        weight = steps.values(steps.codes(weight, grid["scales"], zeros), grid["scales"], zeros, dtype)
        if seed % 2:
            weight[seed % rows, seed % columns] = 1.2345 * weight.abs().max()
        expected = [plainly_read(row, steps) for row in weight]
        found = read_grid(weight, steps)
        seen.add(found is not None)
        assert (found is None) == (None in expected)
        if found is not None:
            assert found["scales"].flatten().tolist() == [scale for scale, _ in expected]
            assert symmetric or found["zeros"].flatten().tolist() == [zero for _, zero in expected]
    assert True in seen


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1, 199])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_lies_on_no_grid(symmetric, row, value):
    steps, weight = Steps(8, symmetric), torch.zeros(200, 100)
    assert read_grid(weight, steps) is not None
    weight[row, 1] = value
    assert read_grid(weight, steps) is None


class Counted(TorchDispatchMode):
    """Counts torch's operations."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(200, 384), (1, 5000)])
def test_what_plainly_lies_on_no_grid_costs_little(shape):
    weight = normal(*shape)
    with Counted() as counted:
        assert read_grid(weight, Steps(8)) is None
    assert counted.calls < 50
