"""Values that are levels times a scale for each tile: found from the values alone, of an exact size, and lies."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from blob_helpers import CODECS, FLOATS, bits, dtype_name, pruned, read_plainly

from sparsehooks import ArtifactError, Layout
from sparsehooks.artifact.header import DTYPES
from sparsehooks.builtin.codecs.tiles import normal
from sparsehooks.builtin.quantizers.levels import NF4, NF4Options
from sparsehooks.builtin.quantizers.uniform import Options, Uniform

SHAPE = (24, 192)


def on_grid(weight, quantizer):
    grid = quantizer.grid(weight)
    return quantizer.dequantize(quantizer.quantize(weight, grid), grid, weight.dtype)


def weights(dtype="F32", shape=SHAPE, sparsity=0.0, seed=0):
    return pruned(shape, sparsity, DTYPES[dtype][0], seed)


def stored(tensor, name="grid"):
    """What the codec writes, read again by itself and by the reader of the page; None if it finds no grid."""
    data, (rows, columns) = bits(tensor).numpy().reshape(-1), tensor.shape
    places = np.flatnonzero(data)
    if places.size == data.size:
        layout = Layout(dtype_name(tensor.dtype), rows, columns, data.size)
    else:
        data = data[places]
        layout = Layout(dtype_name(tensor.dtype), rows, columns, data.size, places)
    bound = CODECS[name].bound(data, layout)
    if bound is None:
        return None
    part = CODECS[name].encode(data, layout)
    assert bound == len(part) if name == "grid" else bound <= len(part)
    assert np.array_equal(CODECS[name].decode(memoryview(part), layout), data)
    assert read_plainly(name, part, layout) == data.tolist()
    return part, layout


def size(layout, width, tiles, symmetric=True, scale=3):
    return 12 + scale * tiles + (0 if symmetric else width * -(-tiles // 8)) + width * -(-layout.count // 8)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize(
    ("per", "group"), [("tensor", 128), ("channel", 128), ("group", 64), ("group", 48), ("group", 32)]
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [3, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_grids_take_their_codes_and_a_scale_a_tile(dtype, width, symmetric, per, group, sparsity):
    quantizer = Uniform(Options(bits=width, symmetric=symmetric, per=per, group=group))
    tensor = on_grid(weights(dtype, sparsity=sparsity), quantizer)
    found = stored(tensor)
    if dtype == "BF16" and width == 8:
        assert found is None or found[0][0] <= 8  # its values are as good as any
        return
    if dtype != "F32" and (width, group, sparsity) == (3, 32, 0.5) and symmetric and found is None:
        return  # 16 values of which few differ tell nothing
    part, layout = found
    tiles = {"tensor": 1, "channel": SHAPE[0], "group": tensor.numel() // group}[per]
    assert len(part) <= size(layout, width, tiles, symmetric)
    if dtype == "F32" and not sparsity:
        rows, columns = struct.unpack_from("<II", part, 4)
        assert (rows, columns) == {"tensor": SHAPE, "channel": (1, SHAPE[1]), "group": (1, group)}[per]
    assert len(stored(tensor, "grid-entropy")[0]) <= len(part) + layout.count


def test_the_largest_code_of_a_group_need_not_occur():
    tensor = on_grid(weights(), Uniform(Options(bits=4, per="group", group=64))).reshape(-1, 64)
    largest = tensor.abs().amax(dim=1, keepdim=True)
    tensor = torch.where((tensor.abs() == largest) & (torch.arange(len(tensor))[:, None] % 3 == 0), 0.0, tensor)
    part, layout = stored(tensor.reshape(SHAPE))
    assert len(part) <= size(layout, 4, SHAPE[0] * SHAPE[1] // 64)


@pytest.mark.parametrize("group", [1, 4])
def test_scales_of_stored_columns(group):
    options = Options(bits=4) if group == 1 else Options(bits=4, per="group", group=SHAPE[1] // group)
    tensor = on_grid(weights(), Uniform(options)).t().contiguous()
    part, layout = stored(tensor)
    assert len(part) == size(layout, 4, SHAPE[0] * group)
    assert struct.unpack_from("<II", part, 4) == (SHAPE[1] // group, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nf4_takes_a_table_of_its_levels(dtype):
    assert torch.equal(torch.from_numpy(normal(24).values), NF4(NF4Options()).levels(torch.device("cpu")))
    tensor = on_grid(weights(dtype), NF4(NF4Options(double=False)))
    part, layout = stored(tensor)
    assert len(part) <= size(layout, 4, layout.size // 64, scale=4) + 64
    sparse = torch.where(weights(dtype, sparsity=0.5, seed=1) == 0, 0.0, tensor).to(tensor.dtype)
    assert len(stored(sparse)[0]) < len(part)


@pytest.mark.parametrize("cut", [0, 1, 10, 23])
def test_nf4_scales_that_are_quantized_too_take_a_byte(cut):
    """A chunk may begin within a run of 256 scales."""
    tensor = on_grid(weights(shape=(200, 320)), NF4(NF4Options()))[cut:]
    part, layout = stored(tensor)
    tiles = layout.size // 64
    assert len(part) <= 12 + 2 + tiles + 3 * (2 + tiles // 256) + 64 + layout.count // 2 + 4
    assert part[2] == 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_ordinary_weights_lie_on_no_grid(dtype, sparsity):
    for seed in range(3):
        assert stored(weights(dtype, (128, 512), sparsity, seed)) is None
    off = on_grid(weights(), Uniform(Options(bits=4, per="group", group=64)))
    off[-1, -1] = 0.123456
    assert stored(off) is None
    off[-1, -1] = float("nan")
    assert stored(off) is None


@pytest.mark.parametrize("name", ["grid", "grid-entropy"])
def test_grids_that_lie(name):
    layout = Layout("F16", 2, 20, 40)
    codes = bytes(4 * 5) if name == "grid" else bytes(41)
    one = b"\x00\x00\x7f"

    def part(width=4, kind=0, form=3, zero=0, rows=1, columns=20, scales=2 * one, more=b"", codes=codes):
        return struct.pack("<BBBBII", width, kind, form, zero, rows, columns) + scales + more + codes

    def read(data, layout=layout):
        return CODECS[name].decode(memoryview(data), layout)

    levels, double = np.arange(16, dtype=np.float32), b"\1\0" + b"\1\1" + 2 * one
    assert read(part()).size == 40
    assert read(part(kind=1, more=bytes(4))).size == 40
    assert read(part(kind=2, more=levels.tobytes())).size == 40
    assert read(part(form=1, scales=double)).size == 40
    for data in (
        *(b"", part()[:11], part()[:-1], part() + b"\0", part(scales=one), part(scales=3 * one)),
        *(part(width=width) for width in (0, 1, 9, 255)),
        *(part(kind=kind, more=bytes(64)) for kind in (3, 255)),
        *(part(form=form) for form in (0, 2, 5, 255)),
        *(part(zero=1), part(rows=0), part(columns=0), part(rows=3), part(columns=21), part(rows=1 << 31)),
        *(part(scales=one + scale) for scale in (bytes(3), b"\0\0\xff", b"\xff\xff\0", b"\0\0\1"[::-1])),
        *(part(form=4, scales=np.array([1, scale], np.float32).tobytes()) for scale in (0, -1, np.nan, np.inf, 1e-40)),
        *(part(form=1, scales=first + double[2:]) for first in (b"\0\0", b"\3\0", b"\1\1")),
        part(form=1, scales=b"\1\0\1\0" + 2 * one),
        part(form=1, scales=b"\1\0\xff\xff" + b"\xff\xff\xfe" + one),
        part(kind=2, more=np.full(16, np.nan, np.float32).tobytes()),
        part(codes=b"\xff" * 20 if name == "grid" else b"\0" + b"\x0f" * 40),
    ):
        with pytest.raises(ArtifactError):
            read(data)
    with pytest.raises(ArtifactError, match="F64"):
        read(part(), Layout("F64", 2, 20, 40))
    with pytest.raises(ValueError, match="grid"):
        CODECS[name].encode(bits(torch.randn(3, 40)).numpy().reshape(-1), Layout("F32", 3, 40, 120))
