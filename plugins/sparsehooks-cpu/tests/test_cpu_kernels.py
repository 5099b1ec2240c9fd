"""The compiled kernels beside sums in float64, for each variant that this CPU can run."""

import numpy as np
import pytest
import sparsehooks_cpu.library as module
import torch
import torch.nn.functional as F
from sparsehooks_cpu import variants
from sparsehooks_cpu.backends import STEPS, Pair, Quad, Unstructured
from sparsehooks_cpu.packing import LANES, PANEL, ROWS, interleave, units
from torch import nn

from sparsehooks import Steps, min_max, read_grid

TOKENS = (0, 1, 2, 5, 8, 9, 16, 33, 37, 64, 99, 130)
SHAPES = ((1, 1), (7, 12), (300, 100), (257, 97), (64, 384))
CPU = torch.device("cpu")


@pytest.fixture(params=list(variants.X86))
def variant(request, monkeypatch):
    """One of the variants, in place of the best."""
    monkeypatch.setenv(module.VARIABLE, request.param)
    module.library.cache_clear()
    yield request.param
    module.library.cache_clear()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sparse(rows, columns, block=1, sparsity=0.8, seed=0):
    """A weight with blocks of zeros; rows have very different numbers of them, and one has no other."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-columns // block)
    share = torch.rand(rows, 1, generator=generator) * 2 * sparsity
    share[rows // 2] = 1.0
    kept = (torch.rand(rows, blocks, generator=generator) >= share).repeat_interleave(block, dim=1)[:, :columns]
    return torch.where(kept, torch.randn(rows, columns, generator=generator), -0.0)


def linear(weight, *, bias=True):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias:
            layer.bias.copy_(torch.randn(len(weight), generator=torch.Generator().manual_seed(1)))
    return layer.requires_grad_(requires_grad=False)


def tokens(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(backend, layer, inputs):
    return backend.run(backend.pack(layer), inputs)


def needs(backend, variant):
    reason = module.problem(backend.kernel, backend.feature)
    if reason is not None:
        pytest.skip(f"{variant}: {reason}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_the_exact_sum_rounded(variant, shape):
    needs(Unstructured, variant)
    layer = linear(sparse(*shape))
    for count in TOKENS:
        inputs = tokens(count, shape[1])
        expected = F.linear(inputs.double(), layer.weight.double(), layer.bias.double())
        # n additions and products, each rounded to 24 bits
        size = F.linear(inputs.double().abs(), layer.weight.double().abs(), layer.bias.double().abs())
        found = run(Unstructured(), layer, inputs)
        assert found.shape == expected.shape
        assert bool(((found - expected).abs() <= size * shape[1] * 2**-24).all()), count


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_summed_exactly(variant, shape):
    weight = sparse(*shape, block=4).mul(40).round().clamp(-127, 127)
    for backend, dtype in ((Unstructured(), torch.float32), (Pair(), torch.float32), (Pair(), torch.bfloat16)):
        if module.problem(backend.kernel, backend.feature) is None:
            layer = linear(weight.to(dtype), bias=False)
            for count in TOKENS:
                inputs = tokens(count, shape[1]).mul(20).round().clamp(-127, 127).to(dtype)
                found = run(backend, layer, inputs)
                assert torch.equal(found, F.linear(inputs.double(), layer.weight.double()).to(dtype)), count


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_sums_products_of_rounded_numbers(variant, shape):
    needs(Pair, variant)
    layer = linear(sparse(*shape, block=2))
    for count in TOKENS:
        inputs = tokens(count, shape[1])
        rounded = inputs.bfloat16().double(), layer.weight.bfloat16().double()
        expected = F.linear(*rounded, layer.bias.double())
        size = F.linear(rounded[0].abs(), rounded[1].abs(), layer.bias.double().abs())
        found = run(Pair(), layer, inputs)
        assert bool(((found - expected).abs() <= size * shape[1] * 2**-24).all()), count


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_the_sum_of_the_codes(variant, shape):
    needs(Quad, variant)
    weight = sparse(*shape, block=4)
    grid = STEPS.fit(*min_max(weight))
    layer = linear(STEPS.values(STEPS.codes(weight, grid["scales"], None), grid["scales"], None, torch.float32))
    scales = read_grid(layer.weight, STEPS)["scales"]
    steps = Steps(8, symmetric=False)
    assert run(Quad(), layer, tokens(0, shape[1])).shape == (0, shape[0])
    for count in TOKENS[1:]:
        # of one sign, of both, zero throughout, tiny
        inputs = tokens(count, shape[1]) * torch.tensor([1.0, 1e-30, 0.0, 5.0, 1e-38])[torch.arange(count) % 5, None]
        inputs = torch.where(torch.arange(count)[:, None] % 3 == 1, inputs.abs(), inputs)
        found = run(Quad(), layer, inputs)
        given = steps.fit(*min_max(inputs))
        codes = steps.codes(inputs, given["scales"], given["zeros"]) - given["zeros"].float()
        whole = F.linear(codes.double(), STEPS.codes(layer.weight, scales, None).double())
        expected = whole * (given["scales"].double() * scales.flatten().double()) + layer.bias.double()
        # three roundings: the sum, its product with the scales, and the bias added
        bound = 2**-22 * (expected.abs() + layer.bias.double().abs())
        assert bool(((found - expected).abs() <= bound).all()), count


def test_a_grid_that_inputs_lie_on_is_found_again():
    needs(Quad, "best")
    weight = sparse(40, 64, block=4)
    grid = STEPS.fit(*min_max(weight))
    layer = linear(STEPS.values(STEPS.codes(weight, grid["scales"], None), grid["scales"], None, torch.float32))
    steps = Steps(8, symmetric=False)
    inputs = tokens(16, 64)
    given = steps.fit(*min_max(inputs))
    rounded = steps.values(
        steps.codes(inputs, given["scales"], given["zeros"]), given["scales"], given["zeros"], torch.float32
    )
    torch.testing.assert_close(run(Quad(), layer, inputs), layer(rounded), rtol=0, atol=2e-5)


def backends(rows=300, columns=200):
    for backend in (Unstructured(), Pair(), Quad()):
        if module.problem(backend.kernel, backend.feature) is None:
            weight = sparse(rows, columns, block=4).mul(40).round().clamp(-127, 127) / 64
            yield backend, linear(weight)


def test_threads_change_no_bit(threads):
    for backend, layer in backends(700, 200):  # large enough for two
        for count in (1, 33, 128, 996, 1100):  # as threads share them, and more than are transposed at a time
            inputs = tokens(count, 200)
            threads(1)
            expected = run(backend, layer, inputs)
            threads(2)
            assert torch.equal(run(backend, layer, inputs), expected)


def test_the_number_of_tokens_matters_no_more_than_their_order():
    """A token's outputs are those it has alone, to the order of sums."""
    for backend, layer in backends():
        inputs = tokens(1500, 200)
        together = run(backend, layer, inputs)
        for i in (0, 63, 64, 1023, 1024, 1499):
            torch.testing.assert_close(run(backend, layer, inputs[i]), together[i], rtol=1e-5, atol=1e-4)


def test_inputs_of_any_shape_layout_and_dtype():
    for backend, layer in backends():
        packed = backend.pack(layer)
        inputs = tokens(2, 3, 200)
        expected = backend.run(packed, inputs)
        assert expected.shape == (2, 3, 300)
        assert torch.equal(backend.run(packed, inputs.transpose(0, 1)), expected.transpose(0, 1))
        wide = torch.zeros(2, 3, 400)
        wide[..., ::2] = inputs
        assert torch.equal(backend.run(packed, wide[..., ::2]), expected)
        assert backend.run(packed, inputs[:0]).shape == (0, 3, 300)
        half = backend.run(packed, inputs.bfloat16())
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, backend.run(packed, inputs.bfloat16().float()).bfloat16())
        assert backend.run(packed, inputs.half()).dtype == torch.float16
        with pytest.raises(ValueError, match=r"the layer takes 200 features, got inputs of shape \(2, 3, 100\)"):
            backend.run(packed, inputs[..., :100])


def test_what_is_not_finite_stays_in_its_token():
    for backend, layer in backends():
        for count in (3, 40):
            inputs = tokens(count, 200)
            expected = run(backend, layer, inputs)
            for bad in (torch.nan, torch.inf):
                inputs[1, 7] = bad
                found = run(backend, layer, inputs)
                assert not bool(torch.isfinite(found[1]).all())
                others = torch.arange(count) != 1
                assert torch.equal(found[others], expected[others])


def test_a_layer_of_zeros_gives_its_bias():
    layer = linear(torch.zeros(20, 30))
    for backend in (backend for backend, _ in backends()):
        for count in (1, 20):
            assert torch.equal(run(backend, layer, tokens(count, 30)), layer.bias.expand(count, 20))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interleaving_loses_nothing(shape):
    """A brute-force reader of the layout finds each unit once, longest rows first."""
    matrix = torch.randint(-3, 3, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    values, columns, rows, counts, starts = interleave(matrix)
    found = np.zeros((-(-shape[0] // ROWS) * ROWS, -(-shape[1] // PANEL) * PANEL), np.int32)
    panels = found.shape[1] // PANEL
    assert len(rows) == len(counts) == len(starts) - 1 == panels * found.shape[0] // ROWS
    for tile in range(len(rows)):
        assert sorted(rows[tile].tolist()) == list(range(ROWS))
        assert counts[tile].tolist() == sorted(counts[tile].tolist(), reverse=True)
        at = int(starts[tile])
        for place in range(ROWS):
            row = int(rows[tile, place]) + tile // panels * ROWS
            for k in range(int(counts[tile, place])):
                index = at + k * LANES + place % LANES
                column = int(columns[index]) + tile % panels * PANEL
                assert found[row, column] == 0 != int(values[index])
                found[row, column] = values[index]
            if place % LANES == LANES - 1:
                at += int(counts[tile, place - LANES + 1]) * LANES
        assert at == int(starts[tile + 1])
    assert np.array_equal(found[: shape[0], : shape[1]], matrix.numpy())


def test_units():
    weight = torch.tensor([[0.0, -0.0, 2.0], [0.0, 0.0, -0.0]])
    assert units(weight).tolist() == [[0, 0, 0x40000000], [0, 0, 0]]
    assert units(weight.bfloat16()).tolist() == [[0, 0x4000], [0, 0]]
    assert units(torch.tensor([[0, 0, 0, 0, 1]], dtype=torch.int8)).tolist() == [[0, 1]]
