"""Integer grids and the built-in codecs: identities, exact sizes, a second reader, and bytes that lie."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from blob_helpers import CODECS, FLOATS, WIDTHS, bits, code_max, dtype_name, quantized, random_bits, read_plainly

from sparsehooks import ArtifactError, Layout, from_codes, row_scales, to_codes
from sparsehooks.artifact.header import DTYPES

POSITIONS = [name for name, codec in CODECS.items() if codec.role == "positions"]
VALUES = [name for name, codec in CODECS.items() if codec.role == "values"]


def torch_dtype(name):
    return DTYPES[name][0]


def any_bits(name, rows, columns, seed):
    """Finite values with uniformly random bits: every exponent, subnormals and the largest included."""
    raw = torch.from_numpy(random_bits(name, rows * columns, seed)).view(torch_dtype(name)).view(rows, columns)
    return torch.where(raw.isfinite(), raw, torch.zeros((), dtype=raw.dtype))


def rows_of_all_magnitudes(name):
    """One row for each power of two that the dtype has, from its smallest subnormal to its largest value."""
    info = torch.finfo(torch_dtype(name))
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(300, 64, generator=generator, dtype=torch.float64) * 2 - 1
    powers = torch.linspace(np.log2(info.smallest_normal) - 24, np.log2(info.max), 300, dtype=torch.float64)
    values = (unit * torch.exp2(powers)[:, None]).clamp(info.min, info.max)
    values[-1, 0], values[-2, 0] = info.max, info.min
    return values.to(torch_dtype(name))


# ----------------------------------------------------------------------------------------------- integer grids


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("make", [rows_of_all_magnitudes, lambda name: any_bits(name, 4000, 16, 1)])
def test_quantizing_twice_changes_no_bit(name, make, width):
    once = quantized(make(name), width)
    assert torch.equal(bits(quantized(once, width)), bits(once))
    assert once.isfinite().all()
    assert not (once.signbit() & (once == 0)).any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_row_maximum_of_16_bits_comes_back(dtype, width):
    weight = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = weight[weight.isfinite() & (weight >= torch.finfo(dtype).smallest_normal)][:, None]
    weight = weight * torch.tensor([1.0, 0.77, -0.33, 0.0039], dtype=dtype)
    once = quantized(weight, width)
    large = weight[:, 0].float() > 2.0**-110
    assert torch.equal(once[large, 0], weight[large, 0])
    assert torch.equal(bits(quantized(once, width)), bits(once))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", FLOATS)
def test_no_value_moves_by_more_than_half_a_step(name, width):
    weight = rows_of_all_magnitudes(name)
    scales, once = row_scales(weight, code_max(width)), quantized(weight, width)
    exact = from_codes(to_codes(weight, scales, code_max(width)), scales, torch.float64)
    assert ((weight.double() - exact).abs() <= scales.double() * (0.5 + 2.0**-9)).all()
    assert torch.equal(once, exact.to(weight.dtype))


@pytest.mark.parametrize("width", WIDTHS)
def test_scales_have_17_bits_and_stay_in_range(width):
    weight = torch.cat([rows_of_all_magnitudes("F32"), torch.zeros(1, 64)])
    scales = row_scales(weight, code_max(width))
    assert scales.dtype == torch.float32
    assert scales.shape == (301, 1)
    assert not (scales.view(torch.int32) & 127).any()
    assert scales.min() >= 2.0**-126
    assert (code_max(width) * scales).isfinite().all()
    assert scales[-1] == 1
    assert row_scales(torch.ones(3, 2, 2, 2), code_max(width)).shape == (3, 1, 1, 1)


def test_zero_maps_to_zero_and_codes_are_symmetric():
    weight = torch.tensor([[-1.0, 1.0, 0.0, -0.0, 0.5]])
    codes = to_codes(weight, row_scales(weight))
    assert codes.tolist() == [[-127, 127, 0, 0, 64]]
    assert to_codes(weight, row_scales(weight, 1), 1).tolist() == [[-1, 1, 0, 0, 0]]
    assert quantized(weight)[0, 2:4].signbit().sum() == 0


def test_a_product_too_small_for_the_dtype_is_a_positive_zero():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        values = from_codes(torch.tensor([[-1, 0, 1]], dtype=torch.int8), torch.tensor([[2.0**-30]]), dtype)
        assert not values[0, :2][values[0, :2] == 0].signbit().any()
    assert from_codes(torch.tensor([[-1]], dtype=torch.int8), torch.tensor([[2.0**-30]]), torch.float16) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FLOATS)
def test_values_that_are_not_finite_spoil_their_row_and_no_other(bad, name):
    weight = torch.tensor([[1.0, bad], [1.0, 2.0]], dtype=torch_dtype(name))
    assert row_scales(weight).isfinite().tolist() == [[False], [True]]
    assert quantized(weight).isfinite().tolist() == [[False, False], [True, True]]


# ------------------------------------------------------------------------------------------- the specification


BF16 = {1.0: 0x3F80, 0.5: 0x3F00, -2.0: 0xC000}
EXAMPLES = [
    # codec, bytes, dtype, rows, columns, positions, and the positions or the values that the bytes stand for
    ("bitmap", "2908", "F32", 1, 12, None, [0, 3, 5, 11]),
    ("gap-bytes", "0200ff01ff 28010000 b8020000", "F32", 1, 8000, None, [2, 3, 300, 302, 999]),
    ("gaps", "04 07 05050404", "F32", 1, 64, None, [3, 4, 20]),
    (
        *("n:m", "0204 02010101000100000101010001", "F32", 1, 24, None),
        [0, 1, 6, 7, 8, 11, 13, 14, 17, 19, 20, 22],
    ),
    ("submatrix", "07 2a 01 7300", "F32", 4, 6, None, [1, 3, 9, 11, 13]),
    ("submatrix", "03 0a 00", "F32", 4, 6, None, [1, 3, 7, 9]),
    ("raw", "803f 00c0", "BF16", 1, 2, None, [BF16[1.0], BF16[-2.0]]),
    ("int", "03000000 0000803e 0000803f 041b0d", "F32", 2, 4, [0, 1, 3, 4, 6], [0.75, -0.25, 0.5, 3.0, -1.0]),
    ("int-entropy", "03000000 0000803e 0000803f 00060205060203", "F32", 2, 3, None, [0.75, -0.25, 0.5, 3.0, -1.0, 0.0]),
    (
        *("grid", "02010300 01000000 04000000 00007d40007f 0300111d", "F32", 2, 4, [0, 1, 2, 4, 6, 7]),
        [0.5, -0.25, 0.25, 1.0009765625, 2.001953125, -1.0009765625],
    ),
    (
        *("grid-entropy", "03000300 01000000 03000000 00007d40007f 00060205060203", "F32", 2, 3, None),
        [0.75, -0.25, 0.5, 3.0029296875, -1.0009765625, 0.0],
    ),
    ("codebook", "02 003f803f00c0 1508", "BF16", 1, 5, None, [BF16[one] for one in (1.0, 0.5, 1.0, -2.0, 1.0)]),
    (
        "codebook-entropy",
        "02 003f803f00c0 000100010201",
        "BF16",
        1,
        5,
        None,
        [BF16[one] for one in (1.0, 0.5, 1.0, -2.0, 1.0)],
    ),
    (
        *("exponent", "03000000 01000000 01000000 7f7d7e 6300 03 82 008001000000", "BF16", 1, 6, None),
        [0x3F80, 0x3FC0, 0xBF00, 0x4100, 0x3E80, 0x3F80],
    ),
    (
        *("exponent", "03000000 01000000 01000000 0f0d0e 6300 03 12 000001000000 000002", "F16", 1, 6, None),
        [0x3C00, 0x3E00, 0xB800, 0x4800, 0x3400, 0x3C00],
    ),
    ("exponent", "03000000 00000000 00000000 0000cdcc 7f0001 00 0018", "F32", 1, 2, None, [0x3F800000, 0x3F8CCCCD]),
    (
        *(
            "exponent-entropy",
            "0000 0400 09000000 7d007e007f008200 000202010001020203 4400000000002012",
            "BF16",
            1,
            8,
            None,
        ),
        [0x3F80, 0x3FC0, 0xBF00, 0x3E80, 0x3F40, 0x3FA0, 0xBF80, 0x4100],
    ),
    ("entropy", "0001010102", "I8", 1, 4, None, [1, 1, 1, 2]),
    ("entropy", "01 05c101090000000090fc3f0d000008", "I8", 1, 20, None, [1] * 20),
]


@pytest.mark.parametrize(("name", "text", "dtype", "rows", "columns", "places", "expected"), EXAMPLES)
def test_the_examples_of_the_specification(name, text, dtype, rows, columns, places, expected):
    part, places = bytes.fromhex(text), None if places is None else np.array(places)
    layout = Layout(dtype, rows, columns, len(expected), places)
    if name.startswith(("int", "grid")):
        data = np.array(expected, np.float32).view(np.uint32)
    else:
        data = np.array(expected, np.intp if CODECS[name].role == "positions" else layout.bits)
    decoded = CODECS[name].decode(memoryview(part), layout)
    assert decoded.dtype == data.dtype
    assert decoded.tolist() == data.tolist() == read_plainly(name, part, layout)
    if name not in ("exponent", "entropy", "n:m"):
        assert CODECS[name].encode(data, layout) == part
    specification = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
    assert text.replace(" ", "") in re.sub(r"[\s`]", "", specification)


def encoded(name, data, layout):
    """What a codec writes, read again by itself and bit by bit; None if it cannot hold the data."""
    codec = CODECS[name]
    bound = codec.bound(data, layout)
    if bound is None:
        return None
    part = codec.encode(data, layout)
    assert bound <= len(part)
    for view in (memoryview(part), memoryview(bytearray(b"\0" + part))[1:]):  # also where it is not aligned
        decoded = codec.decode(view, layout)
        assert decoded.dtype == data.dtype
        assert np.array_equal(decoded, data)
    if data.size <= 1 << 13:
        assert read_plainly(name, part, layout) == data.tolist()
    return part


def positions(name, mask, dtype="F32"):
    """What a codec makes of a mask: the positions it keeps, the part, the layout; None if it cannot hold it."""
    codec, data = CODECS[name], np.flatnonzero(mask)
    layout = Layout(dtype, *mask.shape, data.size)
    bound = codec.bound(data, layout)
    if bound is None:
        return None
    kept = codec.cover(data, layout)
    assert kept.dtype == np.intp
    assert np.isin(data, kept).all()
    layout = dataclasses.replace(layout, count=kept.size)
    part = encoded(name, kept, layout)
    assert bound <= len(part)
    return kept, part, layout


def refused(name, part, layout, match=None):
    with pytest.raises(ArtifactError, match=match):
        CODECS[name].decode(memoryview(part), layout)


# ------------------------------------------------------------------------------------------------- positions


SHAPES = [(1, 1), (1, 7), (3, 5), (8, 8), (1, 1000), (1000, 1), (5, 1001), (64, 48)]


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_positions_come_back(name, shape):
    rng = np.random.default_rng(0)
    held = 0
    for density in (0, 0.001, 0.03, 0.1, 0.3, 0.5, 0.7, 0.95, 1):
        mask = rng.random(shape) < density
        held += positions(name, mask) is not None
        mask[: len(mask) // 2] = False
        held += positions(name, mask) is not None
        mask[:, rng.random(shape[1]) < 0.6] = False
        held += positions(name, mask) is not None
    assert held or name == "n:m"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_do_not_depend_on_the_dtype(name, dtype):
    mask = np.zeros((16, 64), np.bool_)
    mask[:, ::8] = True
    assert positions(name, mask, dtype)[1] == positions(name, mask)[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bitmap_takes_a_bit_an_element(shape):
    for density in (0, 0.3, 1):
        mask = np.random.default_rng(0).random(shape) < density
        kept, part, _ = positions("bitmap", mask)
        assert np.array_equal(kept, np.flatnonzero(mask))
        assert len(part) == -(-mask.size // 8) == CODECS["bitmap"].bound(kept, Layout("F32", *shape, kept.size))


def test_a_bitmap_that_lies():
    layout = Layout("F32", 3, 3, 1)
    assert CODECS["bitmap"].decode(memoryview(b"\0\1"), layout).tolist() == [8]
    for part in (b"", b"\1", b"\1\0\0", b"\1\2", b"\1\1", b"\0\0"):
        refused("bitmap", part, layout)


def test_gaps_as_bytes_may_be_of_any_length():
    for gaps in ([0] * 5 + [254, 255, 256, 0, 70_000], [300_000], [1 << 20], [0], []):
        places = np.array(list(accumulate(gap + 1 for gap in gaps)), np.intp) - 1
        size = 8 * max(int(places.max(initial=0)) + 1, places.size)
        layout = Layout("U8", 1, size, places.size)
        part = encoded("gap-bytes", places, layout)
        assert len(part) == len(gaps) + 4 * sum(gap >= 255 for gap in gaps)
    dense = np.arange(0, 64, 7)
    assert encoded("gap-bytes", dense, Layout("U8", 8, 8, dense.size)) is None


def test_gaps_as_bytes_that_lie():
    layout = Layout("F32", 1, 1000, 3)
    good = b"\5\xff\1" + struct.pack("<I", 300)
    assert CODECS["gap-bytes"].decode(memoryview(good), layout).tolist() == [5, 306, 308]
    for part in (b"", good[:-1], good + b"\0", b"\5\2", b"\5\xff\xff" + good[3:], b"\5\2\1\0\0\0\0"):
        refused("gap-bytes", part, layout, "bytes are not 3 gaps")
    for large in (997, 1 << 31, (1 << 32) - 1):
        refused("gap-bytes", good[:3] + struct.pack("<I", large), layout, "beyond the last of 1000")
    refused("gap-bytes", bytes(3), Layout("F32", 1, 2, 3))
    refused("gap-bytes", bytes(3), Layout("F32", 1, 2, (1 << 32) - 1))


@pytest.mark.parametrize("density", [0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.001])
def test_gaps_are_as_small_as_random_positions_allow(density):
    mask = np.random.default_rng(1).permutation(1 << 18).reshape(512, 512) < int(density * (1 << 18))
    _, part, _ = positions("gaps", mask)
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) * mask.size / 8
    assert entropy * 0.999 < len(part) < 1.035 * entropy
    assert CODECS["gaps"].bound(np.flatnonzero(mask), Layout("F32", 512, 512, int(mask.sum()))) > 0.85 * len(part)


def test_gaps_that_are_not_random_come_back():
    size = 1 << 18
    for places in ([size - 1], [0], [0, size - 1], range(1000), range(size - 1000, size), range(0, size, 255), []):
        data = np.array(places, np.intp)
        assert encoded("gaps", data, Layout("F32", 512, 512, data.size)) is not None


def test_gaps_that_lie():
    layout = Layout("F32", 1, 100, 2)
    good = bytes([2, 0b11000, 0b01, 0b10])  # gaps 13 and 2
    assert CODECS["gaps"].decode(memoryview(good), layout).tolist() == [13, 16]
    for part in (
        *(b"", b"\2", good[:-1], good + b"\0", b"\x10" + good[1:], b"\xff" + good[1:], b"\0" + good[1:]),
        *(bytes([2, 0b1000, 1, 2]), bytes([2, 0b11100, 1, 2]), bytes([2, 0b11000, 0, 1, 2]), bytes([2, 0, 1, 2])),
        bytes([2, 0, 0, 0, 3, 3, 3]),  # the first lies at 24 * 4 + 3
        bytes([2]) + bytes(1000) + bytes([3, 0, 0]),
    ):
        refused("gaps", part, layout)
    for count in (0, 1, 3, 101, (1 << 32) - 1):
        refused("gaps", good, dataclasses.replace(layout, count=count))


FORMS = [(n, m) for m in (2, 4, 8, 16) for n in range(1, m)]


@pytest.mark.parametrize(("n", "m"), FORMS)
def test_every_form_of_n_in_m(n, m):
    rng = np.random.default_rng(n * m)
    information = math.log2(math.comb(m, n)) / m
    for groups in (1, 2, 3, 7, 64, 6400):
        mask = (np.argsort(rng.random((groups, m)), axis=1) < n).reshape(-1, m if groups < 64 else 4 * m)
        kept, part, layout = positions("n:m", mask)
        assert len(part) == CODECS["n:m"].bound(kept, layout)
        if groups >= 64:  # fewer may fit smaller groups by chance
            assert tuple(part[:2]) == (n, m)
            assert np.array_equal(kept, np.flatnonzero(mask))
    assert information * mask.size / 8 <= len(part)
    assert len(part) <= (information + 1 / m) * mask.size / 8
    if (n, m) == (2, 4):
        assert 8 * len(part) < 0.651 * mask.size


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 16)])
def test_groups_of_n_in_m_are_filled_up(n, m):
    rng = np.random.default_rng(0)
    mask = np.argsort(rng.random((500, m)), axis=1) < n
    mask &= rng.random(mask.shape) < 0.9
    kept, part, _ = positions("n:m", mask)
    assert tuple(part[:2]) == (n, m)
    assert kept.size == 500 * n
    assert (np.bincount(kept // m, minlength=500) == n).all()
    for group, given in enumerate(mask):  # the first free ones are added
        free = np.flatnonzero(~given)[: n - given.sum()]
        assert np.array_equal(
            np.sort(np.concatenate([np.flatnonzero(given), free])), kept[kept // m == group] - group * m
        )


def test_two_in_four_takes_every_group_of_at_most_two():
    groups = [group for group in product([False, True], repeat=4) if sum(group) <= 2]
    for count in (3, 4, 11):
        mask = np.array((groups + [group for group in groups if sum(group) == 2] * 8) * count).reshape(-1, 4)
        kept, part, _ = positions("n:m", mask)
        assert (np.bincount(kept // 4) == 2).all()
        assert len(part) == 2 + 13 * math.ceil(math.ceil(mask.size / 20) / 8)


def test_n_in_m_refuses_other_masks():
    for mask in (np.ones((1, 4)), np.zeros((2, 6)), np.zeros((4, 8)), np.ones((3, 3)), np.ones((0, 0))):
        assert positions("n:m", mask) is None
    three = np.tile([True, False, True, False], 4096).reshape(64, -1)
    three[-1, -4:] = True
    assert positions("n:m", three) is None
    assert positions("n:m", np.random.default_rng(0).random((64, 64)) < 0.5) is None
    assert positions("n:m", np.eye(64)) is None  # one in 64, too many zeros to add


def test_n_in_m_that_lies():
    layout = Layout("F32", 1, 32, 16)  # eight groups of 2:4: a full word and three digits, 13 planes of a byte
    data = np.flatnonzero(np.tile([0, 1, 0, 1], 8))
    good = encoded("n:m", data, layout)
    # 1:2 comes first; the same positions as 2:4 are written by hand
    assert tuple(good[:2]) == (1, 2)

    def words(*numbers):
        return bytes([2, 4, *(sum((word >> bit & 1) << i for i, word in enumerate(numbers)) for bit in range(13))])

    assert CODECS["n:m"].decode(memoryview(words(4 * 1555, 4 * 43)), layout).tolist() == data.tolist()
    CODECS["n:m"].decode(memoryview(words(6**5 - 1, 6**3 - 1)), layout)
    for numbers in ((6**5, 0), (8191, 0), (0, 6**3), (0, 6**5 - 1)):
        refused("n:m", words(*numbers), layout, "no such combination")
    short = words(0, 0)
    for part in (
        b"",
        b"\2",
        short[:-1],
        short + b"\0",
        *(bytes(form) + short[2:] for form in product(range(18), repeat=2)),
    ):
        if part[:2] not in (b"\2\4", b"\4\x08") or len(part) != len(short):  # 4:8 takes as many bytes
            refused("n:m", part, layout)
    for wrong in (Layout("F32", 1, 32, 15), Layout("F32", 8, 32, 128), Layout("F32", 3, 6, 9), Layout("F32", 1, 32, 0)):
        refused("n:m", short, wrong)


def test_a_submatrix_is_written_in_the_smallest_of_three_ways():
    rng = np.random.default_rng(0)
    rows, columns = rng.random(300) < 0.5, rng.random(400) < 0.4
    whole = np.outer(rows, columns)
    head = 38 + 50 + 1
    for keep, mode, most in ((1.0, 0, 0), (0.95, 0, 0), (0.5, 1, 1), (0.1, 2, 0.49)):
        mask = whole & (rng.random(whole.shape) < keep)
        kept, part, _ = positions("submatrix", mask)
        assert part[head - 1] == mode
        assert kept.size == (whole.sum() if mode == 0 else mask.sum())
        assert len(part) <= head + 1 + most * whole.sum() / 8
    clustered = np.zeros((300, 400), np.bool_)
    clustered[:150:2, :100] = clustered[150:300:2, 100:200] = True  # gaps would seem small here by their bound
    assert positions("submatrix", clustered) is not None
    assert positions("submatrix", rng.random((300, 400)) < 0.5) is None
    assert len(positions("submatrix", np.zeros((300, 400)))[1]) == head


def test_a_submatrix_that_lies():
    layout = Layout("F32", 3, 10, 4)
    good = bytes([0b101, 0b10010000, 0, 0])
    decode = CODECS["submatrix"].decode
    assert decode(memoryview(good), layout).tolist() == [4, 7, 24, 27]
    bitmap, gaps = good[:3] + b"\1\x0f", good[:3] + b"\2\0\x0f"
    assert decode(memoryview(bitmap), layout).tolist() == decode(memoryview(gaps), layout).tolist() == [4, 7, 24, 27]
    for part in (
        *(b"", good[:3], good + b"\0", good[:3] + b"\3", good[:3] + b"\xff", b"\7" + good[1:], b"\0" + good[1:]),
        *(b"\x0d" + good[1:], good[:2] + b"\4\0", good[:3] + b"\1", good[:3] + b"\2"),
        *(
            bitmap + b"\0",
            good[:3] + b"\1\x1f",
            good[:3] + b"\1\7",
            good[:3] + b"\2\0\x1e",
            b"\0\0\0\1\0",
            b"\0\0\0\2\0\1",
        ),
    ):
        refused("submatrix", part, layout)
    empty = dataclasses.replace(layout, count=0)
    for part in (bytes(4), b"\0\0\0\1", b"\0\0\0\2\0"):
        assert decode(memoryview(part), empty).size == 0


# ------------------------------------------------------------------------------------------------- values


def flat(tensor):
    """The bits of a matrix, and the layout where all of them are kept."""
    data = bits(tensor).numpy().reshape(-1)
    return data, Layout(dtype_name(tensor.dtype), *tensor.shape, data.size)


def sparse(tensor):
    """The bits of what is not zero, and the layout."""
    data, layout = flat(tensor)
    places = np.flatnonzero(data)
    return data[places], dataclasses.replace(layout, count=places.size, positions=places)


def holds(name, dtype, data):
    """Whether a codec has to hold values that lie on no grid."""
    if name.startswith(("int", "grid")) or not data.size:
        return name in ("raw", "entropy") and (name == "raw" or data.dtype.itemsize == 1)
    if name.startswith("codebook"):
        return len(np.unique(data)) <= 256
    if name.startswith("exponent"):
        return dtype in FLOATS
    return name == "raw" or data.dtype.itemsize == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_dtype_come_back(name, dtype):
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 7, 8, 9, 300, 1001):
        anything = random_bits(dtype, count)
        few = rng.choice(random_bits(dtype, 9, seed=1), count)
        normal = torch.from_numpy(rng.normal(0, 0.02, count)).to(torch_dtype(dtype)).view(DTYPES[dtype][1]).numpy()
        for data in (anything, few, normal, np.full(count, anything[0] if count else 0, anything.dtype)):
            layout = Layout(
                dtype, 1, max(1, count), count, np.arange(count) if rng.random() < 0.5 or not count else None
            )
            found = encoded(name, data, layout)
            if not name.startswith(("int", "grid")):
                assert (found is not None) == holds(name, dtype, data)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", ["raw", "exponent", "exponent-entropy"])
def test_every_16_bit_pattern_comes_back(name, dtype):
    data = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16)
    for part in (data, np.sort(data), np.repeat(data[:5000], 3)):
        assert encoded(name, part, Layout(dtype, 1, part.size, part.size)) is not None


@pytest.mark.parametrize("name", ["raw", "exponent", "exponent-entropy"])
def test_special_fp32_values_come_back(name):
    special = [0x7FC00001, 0xFF800123, 0x7F800000, 0xFF800000, 1, 0x80000001, 0x007FFFFF, 0x7F7FFFFF, 0, 0x80000000]
    data = np.tile(np.array(special, np.uint32), 17)
    assert encoded(name, data, Layout("F32", 10, 17, 170)) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_values_are_themselves(dtype):
    data = random_bits(dtype, 3000)
    layout = Layout(dtype, 3, 1000, 3000)
    part = encoded("raw", data, layout)
    assert part == data.tobytes()
    assert CODECS["raw"].bound(data, layout) == len(part)
    refused("raw", part[:-1], layout)
    refused("raw", part + b"\0", layout)
    refused("raw", b"", layout)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [rows_of_all_magnitudes, lambda name: any_bits(name, 300, 200, 2)])
def test_grids_are_found_from_the_values(dtype, make, width):
    tensor = quantized(make(dtype), width)
    for data, layout in (flat(tensor), sparse(tensor)):
        part = encoded("int", data, layout)
        length = layout.count if width == 8 else width * -(-layout.count // 8)
        assert part[0] <= width
        assert len(part) <= 4 + 4 * layout.rows + length
        assert CODECS["int"].bound(data, layout) == len(part)
        assert encoded("int-entropy", data, layout)[: 4 + 4 * layout.rows] == part[: 4 + 4 * layout.rows]
    usual = quantized(torch.randn(40, 80, generator=torch.Generator().manual_seed(0)).to(tensor.dtype), width)
    assert encoded("int", *flat(usual))[0] == width


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_grid_with_rows_of_different_lengths(dtype):
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 3000, 400) * (rng.random(400) < 0.6)  # many rows without any value
    weight = torch.from_numpy(rng.normal(size=(400, 3000))).to(torch_dtype(dtype))
    keep = torch.from_numpy(np.argsort(rng.random((400, 3000)), axis=1) < counts[:, None])
    tensor = quantized(weight * keep)
    data, layout = sparse(tensor)
    assert np.array_equal(layout.row_counts(), (tensor != 0).sum(dim=1).numpy())
    assert (layout.row_counts() == 0).any()
    assert len(encoded("int", data, layout)) == 4 + 4 * 400 + data.size
    empty = dataclasses.replace(layout, count=0, positions=data[:0].astype(np.intp))
    assert encoded("int", data[:0], empty) is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_zeros_do_not_hide_a_grid(dtype):
    tensor = quantized(torch.randn(8, 100, generator=torch.Generator().manual_seed(0)).to(torch_dtype(dtype)), 4)
    tensor[:3] = 0
    tensor[3, :50] = 0
    assert encoded("int", *flat(tensor))[0] == 4
    assert encoded("int", *flat(torch.zeros_like(tensor))) is None  # a codebook is smaller


def test_values_off_the_grid_are_no_integers():
    on_grid = quantized(torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)))
    assert CODECS["int"].bound(*flat(on_grid)) is not None
    for value in (float("nan"), float("inf"), -0.0, 1e-30, 0.123456):
        for place in ((0, 0), (63, 4999)):
            off = on_grid.clone()
            off[place] = value
            assert CODECS["int"].bound(*flat(off)) is None
            assert CODECS["int-entropy"].bound(*flat(off)) is None
    assert CODECS["int"].bound(*flat(torch.zeros(2, 2, dtype=torch.float64))) is None
    for name in ("int", "int-entropy"):
        with pytest.raises(ValueError, match="grid"):
            CODECS[name].encode(*flat(torch.randn(3, 4)))


@pytest.mark.parametrize("name", ["int", "int-entropy"])
def test_integers_that_lie(name):
    layout = Layout("F16", 2, 2, 4)
    head, scales = bytes([8, 0, 0, 0]), np.ones(2, np.float32).tobytes()
    codes = bytes(4) if name == "int" else bytes(5)
    CODECS[name].decode(memoryview(head + scales + codes), layout)
    for part in (
        *(b"", head, head + scales[:-1], head + scales + codes[:-1], head + scales + codes + b"\0"),
        *(bytes([width, 0, 0, 0]) + scales + codes for width in (0, 1, 9, 255)),
        *(head[:place] + b"\1" + head[place + 1 :] + scales + codes for place in (1, 2, 3)),
        head + scales + codes[:-1] + b"\xff",
        *(
            head + np.array([1, scale], np.float32).tobytes() + codes
            for scale in (0, -1, np.nan, np.inf, 1e-40, 3e36, 1 + 2**-20)
        ),
    ):
        refused(name, part, layout)
    for width in WIDTHS[:-1]:
        low = bytes([width, 0, 0, 0]) + scales
        wrong = width * b"\x0f" if name == "int" else b"\0\0\0\0" + bytes([2 * code_max(width) + 1])
        refused(name, low + wrong, layout, "code lies outside")
    refused(name, head + scales + codes, Layout("F64", 2, 2, 4), "F64")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 255, 256, 257])
def test_codebooks_of_every_size(dtype, size):
    width = Layout(dtype, 1, 1, 1).bits.itemsize
    if size > (2 if dtype == "BOOL" else 1 << 8 * width):
        return
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.choice(min(1 << 8 * width, 1 << 32) if dtype != "BOOL" else 2, size, replace=False))
    table = numbers.astype(f"<u{width}")
    data = rng.permutation(np.concatenate([table, rng.choice(table, 3000)]))
    layout = Layout(dtype, 1, data.size, data.size)
    for name in ("codebook", "codebook-entropy"):
        part = encoded(name, data, layout)
        if size > 256:
            assert part is None
            continue
        assert part[0] == size - 1
        assert part[1 : 1 + table.nbytes] == table.tobytes()
    if size <= 256:
        part = encoded("codebook", data, layout)
        assert len(part) == CODECS["codebook"].bound(data, layout)
        assert len(part) == 1 + table.nbytes + math.ceil(math.log2(size)) * -(-data.size // 8)


def test_a_value_more_than_a_codebook_holds_is_seen_wherever_it_is():
    data = np.arange(1 << 18).astype(np.uint32) % 256
    layout = Layout("F32", 512, 512, data.size)
    assert CODECS["codebook"].bound(data, layout) is not None
    data[-1] = 1 << 31
    assert CODECS["codebook"].bound(data, layout) is None


@pytest.mark.parametrize("name", ["codebook", "codebook-entropy"])
def test_a_codebook_that_lies(name):
    layout = Layout("BF16", 1, 8, 8)
    good = encoded(name, np.array([7, 9, 1000, 7, 7, 9, 9, 9], np.uint16), layout)
    assert good[:7] == b"\2\7\0\x09\0\xe8\3"
    for part in (b"", b"\2", good[:6], b"\xff" + good[1:], good[:-1], good + b"\0", b"\0" + good[1:]):
        refused(name, part, layout)
    for table in (b"\7\0\7\0\xe8\3", b"\x09\0\7\0\xe8\3", b"\7\0\xe8\3\x09\0"):
        refused(name, b"\2" + table + good[7:], layout, "not in ascending order")
    beyond = b"\1\1" if name == "codebook" else b"\0" + bytes([0, 0, 0, 3, 0, 0, 0, 0])
    refused(name, good[:7] + beyond, layout, "beyond the table of 3")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exponents", [1, 2, 3, 4, 5, 6, 7, 16, 17, 30])
@pytest.mark.parametrize("exceptions", [0, 1, 40])
def test_exponents_of_all_numbers_with_exceptions(dtype, exponents, exceptions):
    rng = np.random.default_rng(exponents)
    values = np.ldexp(rng.uniform(0.5, 1, 6000) * rng.choice([-1, 1], 6000), rng.integers(-exponents, 0, 6000) // 2)
    values[rng.choice(np.arange(500, 6000), exceptions, replace=False)] = np.inf
    data, layout = flat(torch.from_numpy(values).to(torch_dtype(dtype)).view(60, 100))
    part = encoded("exponent", data, layout)
    fixed = layout.count * (data.dtype.itemsize - 1) + (3 * layout.count // 8 if dtype == "F16" else 0)
    digits = {3: 5, 4: 4, 6: 3, 16: 2}[part[0]]
    assert len(part) == 12 + fixed + part[0] + -(-layout.count // digits) + sum(struct.unpack("<II", part[4:12]))
    if exponents < 6 and dtype != "F16":
        assert 8 * len(part) < (16 if data.dtype.itemsize == 2 else 32) * layout.count * 0.85
    small = encoded("exponent-entropy", data, layout)
    assert len(small) <= 1.05 * len(part)


def test_exceptions_may_be_far_apart_and_many():
    data = np.full(1 << 18, 0x3F80, np.uint16)
    for places in ([], [0], [(1 << 18) - 1], [5, 100_000, 100_001, 250_000], range(0, 1 << 18, 3)):
        some = data.copy()
        some[list(places)] = 0x7F81
        part = encoded("exponent", some, Layout("BF16", 512, 512, 1 << 18))
        assert struct.unpack("<I", part[4:8])[0] == (
            0 if len(places) > 4 or 0 in places else len(places)
        )  # the sample sees some


def test_exponents_that_lie():
    layout = Layout("BF16", 1, 10, 10)
    head = struct.pack("<BBHII", 3, 0, 0, 2, 2)
    good = head + bytes([127, 126, 125]) + bytes([242, 0]) + b"\2\3" + b"\1\xff" + bytes(10)
    upper = CODECS["exponent"].decode(memoryview(good), layout) >> 7
    assert upper.tolist() == [125, 125, 1, 125, 125, 127, 255, 127, 127, 127]
    for part in (
        *(b"", head, good[:-1], good + b"\0", good[:15] + bytes([243, 0]) + good[17:], good[:17] + b"\2\7" + good[19:]),
        *(struct.pack("<BBHII", base, 0, 0, 2, 2) + good[12:] for base in (0, 1, 2, 4, 5, 6, 16, 255)),
        *(struct.pack("<BBHII", 3, *rest) + good[12:] for rest in ((1, 0, 2, 2), (0, 1, 2, 2), (0, 0, 11, 2))),
        *(
            struct.pack("<BBHII", 3, 0, 0, *rest) + good[12:]
            for rest in ((0, 4), (4, 0), (1, 3), (3, 1), (2**32 - 1, 2))
        ),
    ):
        refused("exponent", part, layout)
    for dtype in ("F32", "F16", "F64", "U16"):
        refused("exponent", good, Layout(dtype, 1, 10, 10))
    for exponents, exception in (([15, 31, 32], 1), ([15, 14, 13], 32), ([15, 14, 255], 1), ([15, 14, 31], 31)):
        part = struct.pack("<BBHII", 3, 0, 0, 1, 1) + bytes([*exponents, 0, 0, 2, exception]) + bytes(10 + 3 * 2)
        if max(*exponents, exception) < 32:
            CODECS["exponent"].decode(memoryview(part), Layout("F16", 1, 10, 10))
        else:
            refused("exponent", part, Layout("F16", 1, 10, 10), "no such exponent in F16")


def test_coded_exponents_that_lie():
    layout = Layout("BF16", 1, 10, 10)
    indices = b"\0" + bytes([1, 0] * 5)
    good = struct.pack("<BBHI", 0, 0, 2, len(indices)) + b"\x7e\0\x7f\0" + indices + bytes(8 * 2)
    upper = CODECS["exponent-entropy"].decode(memoryview(good), layout) >> 7
    assert upper.tolist() == [127, 126] * 5
    for part in (
        *(b"", good[:8], good[:-1], good + b"\0", good[:13] + b"\2" + good[14:], good[:12] + b"\7" + good[13:]),
        *(
            struct.pack("<BBHI", *start) + good[8:]
            for start in ((5, 0, 2, 11), (0, 1, 2, 11), (0, 0, 1, 11), (0, 0, 1, 13))
        ),
        *(struct.pack("<BBHI", *start) + good[8:] for start in ((0, 0, 2, 10), (0, 0, 0, 11), (0, 0, 2, 2**32 - 1))),
    ):
        refused("exponent-entropy", part, layout)
    for symbols in ((0x7F, 0x7E), (0x7E, 0x7E), (0x7E, 0x100), (0x7E, 0xFFFF)):
        refused("exponent-entropy", good[:8] + struct.pack("<2H", *symbols) + good[12:], layout, "ascending order")
    for dtype in ("F32", "F16", "F64", "U16"):
        refused("exponent-entropy", good, Layout(dtype, 1, 10, 10))


# --------------------------------------------------------------------------------------------- entropy coding


def skewed(count, seed=0):
    return np.random.default_rng(seed).geometric(0.4, count).astype(np.uint8)


@pytest.fixture
def without_zstandard(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)


def test_the_smallest_way_to_code_is_taken():
    noise, layout = random_bits("U8", 5000), Layout("U8", 1, 5000, 5000)
    assert encoded("entropy", noise, layout) == b"\0" + noise.tobytes()
    data = skewed(5000)
    best = encoded("entropy", data, layout)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    streams = {
        1: deflate.compress(data.tobytes()) + deflate.flush(),
        2: zstandard.ZstdCompressor(1, write_content_size=False).compress(data.tobytes()),
    }
    assert len(best) == 1 + min(map(len, streams.values()))
    assert best[1:] == streams[best[0]]
    runs = np.repeat(np.arange(5, dtype=np.uint8), 1000)
    assert encoded("entropy", runs, layout)[0] == 2
    assert len(encoded("entropy", runs, layout)) < 100


def test_blocks_of_other_symbols_do_not_break_the_bound():
    data = np.concatenate([skewed(70_000) + shift for shift in range(0, 64, 8)])
    for name in ("entropy", "codebook-entropy"):
        assert encoded(name, data, Layout("U8", 1, data.size, data.size)) is not None


def test_deflate_is_enough_to_write(without_zstandard):
    layout = Layout("U8", 1, 5000, 5000)
    assert encoded("entropy", skewed(5000), layout)[0] == 1
    assert encoded("entropy", random_bits("U8", 5000), layout)[0] == 0


def test_files_that_need_zstandard_say_so(monkeypatch):
    data = np.repeat(np.arange(5, dtype=np.uint8), 1000)
    layout = Layout("U8", 1, 5000, 5000)
    part = encoded("entropy", data, layout)
    assert part[0] == 2
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ArtifactError, match=r"^it needs zstandard to be read: pip install zstandard$") as caught:
        CODECS["entropy"].decode(memoryview(part), layout)
    assert caught.value.__cause__ is None


def deflated(data, level=9):
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    return b"\1" + deflate.compress(data) + deflate.flush()


def zstandarded(data, *, size=False, **options):
    return b"\2" + zstandard.ZstdCompressor(write_content_size=size, **options).compress(data)


def test_other_streams_of_the_same_bytes_are_read():
    data = skewed(3000)
    layout = Layout("U8", 1, 3000, 3000)
    for part in (
        *(deflated(data.tobytes(), level) for level in (0, 1, 6, 9)),
        *(zstandarded(data.tobytes(), level=level) for level in (-5, 1, 19)),
        zstandarded(data.tobytes(), size=True),
        zstandarded(data.tobytes(), write_checksum=True),
    ):
        assert np.array_equal(CODECS["entropy"].decode(memoryview(part), layout), data)
    for part in (b"\0", deflated(b"")):
        assert CODECS["entropy"].decode(memoryview(part), dataclasses.replace(layout, count=0)).size == 0


@pytest.mark.parametrize("make", [lambda data: b"\0" + data, deflated, zstandarded])
def test_coded_bytes_that_lie(make):
    data = skewed(3000).tobytes()
    layout = Layout("U8", 1, 3000, 3000)
    good = make(data)
    CODECS["entropy"].decode(memoryview(good), layout)
    for part in (
        *(good[:-1], good + b"\0", good[:1], good[: len(good) // 2], b"\3" + good[1:], b"\xff" + good[1:], b"", b"\0"),
        *(make(data[:-1]), make(data + b"\0"), make(b""), make(data * 100), good + good[1:]),
    ):
        refused("entropy", part, layout, "not 3000 symbols")
    for dtype in ("U16", "F32", "BF16"):
        refused("entropy", good, Layout(dtype, 1, 3000, 3000))


def frame(window, *blocks):
    """A frame of zstandard without a content size, of blocks that say how many zeros they are."""
    last = len(blocks) - 1
    headers = [struct.pack("<I", (size << 3) | 2 | (number == last))[:3] + b"\0" for number, size in enumerate(blocks)]
    return b"\2" + struct.pack("<IBB", 0xFD2FB528, 0, window << 3) + b"".join(headers)


@pytest.mark.parametrize(
    "bomb",
    [
        deflated(bytes(1 << 28)),
        zstandarded(bytes(1 << 28)),
        zstandarded(bytes(1 << 28), size=True),
        frame(7, *[1 << 17] * 20_000),  # 2.6 GB in 80 KB
        b"\2" + struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 50) + b"\3\0\0\0",  # says so of itself
        frame(21, 1000),  # 2 GB of window
    ],
)
@pytest.mark.parametrize("count", [0, 1, 3000, 1 << 18])
def test_bombs_stay_small(bomb, count):
    layout = Layout("U8", 1, 1 << 18, count)
    begin = time.thread_time()
    tracemalloc.start()
    refused("entropy", bomb, layout, f"not {count} symbols")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert time.thread_time() - begin < 0.1


def test_a_window_of_more_than_8_mib_is_refused():
    layout = Layout("U8", 1, 1000, 1000)
    assert not CODECS["entropy"].decode(memoryview(frame(13, 1000)), layout).any()
    for window in (14, 16, 17, 21):
        refused("entropy", frame(window, 1000), layout, "not 1000 symbols")


def test_a_bomb_does_not_fill_the_memory_of_the_process():
    """What zstandard and zlib allocate for themselves is seen by the system only."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(sys.path[0])!r})
from test_codecs import CODECS, ArtifactError, Layout, deflated, frame, zstandarded
bombs = [deflated(bytes(1 << 26)), zstandarded(bytes(1 << 26)), frame(13, *[1 << 17] * 20_000), frame(21, 1000)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bomb in bombs * 20:
    try:
        CODECS["entropy"].decode(memoryview(bomb), Layout("U8", 1, 1 << 18, 1 << 18))
    except ArtifactError:
        continue
    sys.exit("a bomb was read")
sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 20_000)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ------------------------------------------------------------------------------------------------- the door


def test_registering_the_codecs_imports_neither_torch_nor_numpy():
    code = "import sys, sparsehooks.builtin.codecs; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
