"""The int8 grid and the built-in codecs: identities, exact sizes, and bytes that lie."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch

from sparsehooks import ArtifactError, Layout, from_codes, row_scales, to_codes
from sparsehooks.builtin.codecs.bitmap import Bitmap
from sparsehooks.builtin.codecs.int8 import Int8
from sparsehooks.builtin.codecs.raw import Raw
from sparsehooks.builtin.codecs.two_of_four import TwoOfFour

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16, torch.float16: torch.uint16}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def bits(tensor):
    return tensor.view(BITS[tensor.dtype])


def quantized(weight):
    scales = row_scales(weight)
    return from_codes(to_codes(weight, scales), scales, weight.dtype)


def any_bits(dtype, rows, columns, seed):
    """Finite values with uniformly random bits: every exponent, subnormals and the largest included."""
    rng = np.random.default_rng(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.from_numpy(rng.integers(0, 256, (rows, columns * size), dtype=np.uint8)).view(dtype)
    return torch.where(raw.isfinite(), raw, torch.zeros((), dtype=dtype))


def rows_of_all_magnitudes(dtype):
    """One row for each power of two that the dtype has, from its smallest subnormal to its largest value."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(300, 64, generator=generator, dtype=torch.float64) * 2 - 1
    powers = torch.linspace(np.log2(info.smallest_normal) - 24, np.log2(info.max), 300, dtype=torch.float64)
    values = (unit * torch.exp2(powers)[:, None]).clamp(info.min, info.max)
    values[-1, 0], values[-2, 0] = info.max, info.min
    return values.to(dtype)


# ------------------------------------------------------------------------------------------------- the int8 grid


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [rows_of_all_magnitudes, lambda dtype: any_bits(dtype, 4000, 16, 1)])
def test_quantizing_twice_changes_no_bit(dtype, make):
    weight = make(dtype)
    once = quantized(weight)
    assert torch.equal(bits(quantized(once)), bits(once))
    assert once.isfinite().all()
    assert not (once.signbit() & (once == 0)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_row_maximum_of_16_bits_comes_back(dtype):
    weight = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = weight[weight.isfinite() & (weight >= torch.finfo(dtype).smallest_normal)][:, None]
    weight = weight * torch.tensor([1.0, 0.77, -0.33, 0.0039], dtype=dtype)
    once = quantized(weight)
    large = weight[:, 0].float() > 2.0**-110
    assert torch.equal(once[large, 0], weight[large, 0])
    assert torch.equal(bits(quantized(once)), bits(once))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_moves_by_more_than_half_a_step(dtype):
    weight = rows_of_all_magnitudes(dtype)
    scales, once = row_scales(weight), quantized(weight)
    exact = from_codes(to_codes(weight, scales), scales, torch.float64)
    assert ((weight.double() - exact).abs() <= scales.double() * (0.5 + 2.0**-9)).all()
    assert torch.equal(once, exact.to(dtype))


def test_scales_have_17_bits_and_stay_in_range():
    weight = torch.cat([rows_of_all_magnitudes(torch.float32), torch.zeros(1, 64)])
    scales = row_scales(weight)
    assert scales.dtype == torch.float32
    assert scales.shape == (301, 1)
    assert not (scales.view(torch.int32) & 127).any()
    assert scales.min() >= 2.0**-126
    assert (127 * scales).isfinite().all()
    assert scales[-1] == 1
    assert row_scales(torch.ones(3, 2, 2, 2)).shape == (3, 1, 1, 1)


def test_zero_maps_to_zero_and_codes_are_symmetric():
    weight = torch.tensor([[-1.0, 1.0, 0.0, -0.0, 0.5]])
    codes = to_codes(weight, row_scales(weight))
    assert codes.tolist() == [[-127, 127, 0, 0, 64]]
    assert quantized(weight)[0, 2:4].signbit().sum() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_spoil_their_row_and_no_other(bad, dtype):
    weight = torch.tensor([[1.0, bad], [1.0, 2.0]], dtype=dtype)
    assert row_scales(weight).isfinite().tolist() == [[False], [True]]
    assert quantized(weight).isfinite().tolist() == [[False, False], [True, True]]


# ------------------------------------------------------------------------------------------------- positions


def positions(codec, mask):
    """What a position codec makes of a mask: the positions it keeps, the sections, the layout."""
    layout = Layout("F32", *mask.shape, int(mask.sum()))
    bound = codec.bound(mask, layout)
    if bound is None:
        return None
    kept = codec.cover(mask, layout)
    layout = Layout("F32", *mask.shape, int(kept.sum()))
    sections = codec.encode(kept, layout)
    assert tuple(sections) == codec.sections
    assert sum(map(len, sections.values())) == bound
    return kept, sections, layout


def views(sections):
    return {name: memoryview(part) for name, part in sections.items()}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (3, 5), (8, 8), (5, 1001)])
@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_bitmap_round_trip(rows, columns, density):
    mask = np.random.default_rng(0).random((rows, columns)) < density
    kept, sections, layout = positions(Bitmap(), mask)
    assert kept is mask
    assert np.array_equal(Bitmap().decode(views(sections), layout), mask)


def test_bitmap_lies():
    layout = Layout("F32", 3, 3, 1)
    for part in (b"", b"\1", b"\1\0\0", b"\1\2"):
        with pytest.raises(ArtifactError):
            Bitmap().decode(views({"bits": part}), layout)


def test_two_of_four_takes_every_group_of_at_most_two():
    groups = [group for group in product([False, True], repeat=4) if sum(group) <= 2]
    for count in (1, 2, 3, 4, 11):
        for columns in (4, 4 * count):
            mask = np.array((groups * count)[: len(groups) // count * count]).reshape(-1, columns)
            kept, sections, layout = positions(TwoOfFour(), mask)
            assert (kept | ~mask).all()
            assert (kept.reshape(-1, 4).sum(axis=1) == 2).all()
            assert np.array_equal(TwoOfFour().decode(views(sections), layout), kept)
            assert len(sections["pairs"]) == -(-mask.size // 12)


def test_two_of_four_refuses_other_masks():
    assert positions(TwoOfFour(), np.array([[True, True, True, False]])) is None
    assert positions(TwoOfFour(), np.zeros((2, 6), bool)) is None
    three = np.zeros((4, 8), bool)
    three[3, 4:7] = True
    assert positions(TwoOfFour(), three) is None


def test_two_of_four_lies():
    layout = Layout("F32", 1, 16, 8)  # four groups: a full byte and one digit
    codec = TwoOfFour()
    codec.decode(views({"pairs": bytes([215, 5])}), layout)
    for part in (bytes([216, 0]), bytes([255, 0]), bytes([0, 6]), bytes([0]), bytes([0, 0, 0]), b""):
        with pytest.raises(ArtifactError):
            codec.decode(views({"pairs": part}), layout)
    for wrong in (Layout("F32", 1, 16, 7), Layout("F32", 2, 8, 16), Layout("F32", 3, 6, 9)):
        with pytest.raises(ArtifactError):
            codec.decode(views({"pairs": bytes([0, 0])}), wrong)


# ------------------------------------------------------------------------------------------------- values


def values_layout(tensor, counts=None):
    rows, columns = tensor.shape
    counts = np.full(rows, columns) if counts is None else np.asarray(counts)
    return Layout(NAMES[tensor.dtype], rows, columns, int(counts.sum()), counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_keeps_every_bit(dtype):
    pattern = torch.arange(1 << 12, dtype=torch.int32).mul(1048573).view(torch.uint8)
    tensor = pattern.view(dtype).view(8, -1)
    data, layout = bits(tensor).numpy().reshape(-1), values_layout(tensor)
    sections = Raw().encode(data, layout)
    assert len(sections["values"]) == Raw().bound(data, layout) == tensor.nbytes
    assert np.array_equal(Raw().decode(views(sections), layout), data)
    with pytest.raises(ArtifactError):
        Raw().decode(views({"values": sections["values"][:-1]}), layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [rows_of_all_magnitudes, lambda dtype: any_bits(dtype, 700, 900, 2)])
def test_int8_finds_the_grid_from_the_values(dtype, make):
    tensor = quantized(make(dtype))
    data, layout = bits(tensor).numpy().reshape(-1), values_layout(tensor)
    sections = Int8().encode(data, layout)
    assert tuple(sections) == Int8.sections
    assert sum(map(len, sections.values())) == Int8().bound(data, layout) == tensor.numel() + 4 * len(tensor)
    assert np.array_equal(Int8().decode(views(sections), layout), data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_with_rows_of_different_lengths(dtype):
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 3000, 400) * (rng.random(400) < 0.6)  # many rows without any value, several blocks
    tensor = quantized(torch.from_numpy(rng.normal(size=(400, 3000))).to(dtype))
    data = np.concatenate([row[:count] for row, count in zip(bits(tensor).numpy(), counts, strict=True)])
    # the largest of a row has to be among those that are kept
    largest = tensor.float().abs().argmax(dim=1).numpy()
    starts = np.cumsum(counts) - counts
    full = counts > 0
    data[starts[full]] = bits(tensor).numpy()[np.arange(400), largest][full]
    layout = values_layout(tensor, counts)
    sections = Int8().encode(data, layout)
    assert sum(map(len, sections.values())) == Int8().bound(data, layout)
    assert np.array_equal(Int8().decode(views(sections), layout), data)


def test_int8_refuses_values_off_the_grid():
    on_grid = quantized(torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)))
    assert Int8().bound(bits(on_grid).numpy().reshape(-1), values_layout(on_grid)) is not None
    for value in (float("nan"), float("inf"), -0.0, 1e-30, 0.123456):
        off = on_grid.clone()
        off[63, 4999] = value
        assert Int8().bound(bits(off).numpy().reshape(-1), values_layout(off)) is None
    double = torch.zeros(2, 2, dtype=torch.float64).view(torch.uint64).numpy().reshape(-1)
    assert Int8().bound(double, Layout("F64", 2, 2, 4, np.full(2, 2))) is None


def test_int8_lies():
    layout = Layout("F16", 2, 2, 4, np.full(2, 2))
    good = {"codes": bytes(4), "scales": np.ones(2, np.float32).tobytes()}
    Int8().decode(views(good), layout)
    for name, part in [
        ("codes", b"\0\0\0\x80"),
        ("codes", bytes(3)),
        ("scales", bytes(4)),
        *(
            ("scales", np.array([1, scale], np.float32).tobytes())
            for scale in (0, -1, np.nan, np.inf, 1e-40, 3e36, 1 + 2**-20)
        ),
    ]:
        with pytest.raises(ArtifactError):
            Int8().decode(views(good | {name: part}), layout)
    with pytest.raises(ArtifactError, match="F64"):
        Int8().decode(views(good), Layout("F64", 2, 2, 4, np.full(2, 2)))


# ------------------------------------------------------------------------------------------------- the door


def test_registering_the_codecs_imports_neither_torch_nor_numpy():
    code = "import sys, sparsehooks.builtin.codecs; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
