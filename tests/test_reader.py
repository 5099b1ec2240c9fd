"""docs/format.md is enough to write a reader: tests/reader.py is one, and reads all that is written."""

from __future__ import annotations

import ast
import itertools
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import reader
import torch
import zstandard
from blob_helpers import FLOATS, WIDTHS, bits, code_max, dtype_name, from_bits, pruned, quantized, random_bits
from helpers import tiny_bert
from safetensors.torch import save_file
from torch import nn

import sparsehooks
from sparsehooks import ArtifactError, Layout
from sparsehooks.artifact import container
from sparsehooks.artifact.blob import decode as decode_by_library
from sparsehooks.artifact.header import DTYPES
from sparsehooks.components import LEVELS
from sparsehooks.plugins import installed_catalog

PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
CODECS = {record.component.name: record.load()() for record in installed_catalog().records("codec")}
SHAPE = (8, 6, 8)
"""8 rows of 48 columns."""
CHUNKS = {"one chunk": (384, 1 << 20), "three rows a chunk": (144, 1 << 20), "pieces of rows": (44, 47)}
"""How many elements a chunk has, and the longest row that is not cut."""


@pytest.fixture
def always(monkeypatch):
    """Encode also what saves nothing."""
    monkeypatch.setattr(container, "MIN_SAVED_SHARE", -1000)
    monkeypatch.setattr(container, "MIN_SAVED_BYTES", -(1 << 20))


@pytest.fixture
def set_chunks(always, monkeypatch):
    def to(name):
        monkeypatch.setattr(container, "_CHUNK", CHUNKS[name][0])
        monkeypatch.setattr(container, "MAX_CHUNK", CHUNKS[name][1])

    return to


def raw(tensor):
    """The bytes of a tensor, as torch has them."""
    return bits(tensor).numpy().tobytes()


def decode(blob):
    return reader.decode(reader.Part(bytes(blob.numpy())))


def codecs_of(blob):
    """The codecs that a blob names."""
    dimensions, length = struct.unpack_from("<BH", bytes(blob[:20].numpy()), 13)
    start = 20 + 8 * dimensions
    return bytes(blob[start : start + length].numpy()).decode().split("\n")[1:]


# -------------------------------------------------------------------------------------------------- the reader


def test_it_has_at_most_130_lines_of_python_alone():
    source = Path(reader.__file__).read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 120
    tree = ast.parse(source)
    imported = {}
    for place in ast.walk(tree):
        for node in ast.iter_child_nodes(place):
            if isinstance(node, ast.Import):
                imported |= dict.fromkeys((alias.name for alias in node.names), place)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported[node.module] = place
    assert set(imported) - sys.stdlib_module_names == {"zstandard"}
    assert imported["zstandard"] is not tree  # only where a zstandard stream is met
    assert not re.search("__import__|importlib|exec|eval", source)


# ---------------------------------------------------------------------------------------- the examples of the page


BF16 = {1.0: 0x3F80, 1.5: 0x3FC0, -0.5: 0xBF00, 0.25: 0x3E80, 0.5: 0x3F00, 0.75: 0x3F40, 1.25: 0x3FA0}
BF16 |= {-1.0: 0xBF80, -2.0: 0xC000, 8.0: 0x4100}
EXAMPLES = [
    # codec; dtype; elements; columns; where the values are; and the positions or the values' bits: in the page's order
    ("bitmap", "U8", 12, 12, None, [0, 3, 5, 11]),
    ("gap-bytes", "U8", 1000, 1000, None, [2, 3, 300, 302, 999]),
    ("gaps", "U8", 64, 64, None, [3, 4, 20]),
    ("n:m", "U8", 24, 24, None, [0, 1, 6, 7, 8, 11, 13, 14, 17, 19, 20, 22]),
    ("submatrix", "U8", 24, 6, None, [1, 3, 9, 11, 13]),
    ("submatrix", "U8", 24, 6, None, [1, 3, 7, 9]),
    ("raw", "BF16", 2, 2, None, [BF16[1.0], BF16[-2.0]]),
    ("int", "F32", 8, 4, [0, 1, 3, 4, 6], [0x3F400000, 0xBE800000, 0x3F000000, 0x40400000, 0xBF800000]),
    ("int-entropy", "F32", 6, 3, None, [0x3F400000, 0xBE800000, 0x3F000000, 0x40400000, 0xBF800000, 0]),
    ("grid", "F32", 8, 4, [0, 1, 2, 4, 6, 7], [1056964608, 3196059648, 1048576000, 1065361408, 1073750016, 3212845056]),
    ("grid-entropy", "F32", 6, 3, None, [1061158912, 3196059648, 1056964608, 1077948416, 3212845056, 0]),
    ("codebook", "BF16", 5, 5, None, [BF16[value] for value in (1.0, 0.5, 1.0, -2.0, 1.0)]),
    ("codebook-entropy", "BF16", 5, 5, None, [BF16[value] for value in (1.0, 0.5, 1.0, -2.0, 1.0)]),
    ("exponent", "BF16", 6, 6, None, [BF16[value] for value in (1.0, 1.5, -0.5, 8.0, 0.25, 1.0)]),
    ("exponent", "F16", 6, 6, None, [0x3C00, 0x3E00, 0xB800, 0x4800, 0x3400, 0x3C00]),
    ("exponent", "F32", 2, 2, None, [0x3F800000, 0x3F8CCCCD]),
    (
        *("exponent-entropy", "BF16", 8, 8, None),
        [BF16[value] for value in (1.0, 1.5, -0.5, 0.25, 0.75, 1.25, -1.0, 8.0)],
    ),
    ("entropy", "I8", 4, 4, None, [1, 1, 1, 2]),
    ("Entropy streams", "I8", 20, 20, None, [1] * 20),
]


def bytes_of_the_page():
    """The title of the section and the bytes of each example of a codec."""
    codecs = PAGE.split("\n## Codecs of positions\n")[1].split("\n## What a reader checks\n")[0]
    for section in re.split(r"\n### ", codecs)[1:]:
        title, text = section.split("\n", 1)
        for found in re.findall(r":\s+((?:`[0-9a-f]{2}(?: [0-9a-f]{2})*`\s*)+)", text):
            yield title.strip("`"), bytes.fromhex(found.replace("`", ""))


def test_the_examples_of_the_page():
    assert {codec for codec, _ in bytes_of_the_page()} >= set(CODECS)
    for (title, part), (codec, dtype, size, columns, where, expected) in zip(
        bytes_of_the_page(), EXAMPLES, strict=True
    ):
        assert title == codec
        name, count, given = title.replace("Entropy streams", "entropy"), len(expected), reader.Part(part)
        if CODECS[name].role == "positions":
            found = reader.positions_of(name, given, count, size, columns)
        else:
            found = reader.values_of(name, given, count, dtype, where or range(size), size, columns)
        assert list(found) == expected
        assert not given.read()


def test_the_blob_of_the_page():
    block = PAGE.split("\n### An example\n")[1].split("```")[1]
    lines = re.findall(r"^ *(\d+)  ((?:[0-9a-f]{2} )*[0-9a-f]{2})", block, re.MULTILINE)
    blob = b""
    for offset, text in lines:
        assert int(offset) == len(blob)
        blob += bytes.fromhex(text)
    expected = torch.zeros(2, 16, dtype=torch.bfloat16)
    expected[0, 3], expected[1, 0], expected[1, 9] = 1.0, -2.0, 0.5
    assert reader.decode(reader.Part(blob)) == ("BF16", (2, 16), raw(expected))


def test_it_knows_the_dtypes_of_the_page():
    table = PAGE.split("\n## Dtypes\n")[1].split("\n\n")[1]
    named = [name for row in table.splitlines() for name in re.findall(r"`([A-Z]\w+)`", row)]
    assert sorted(named) == sorted(reader.KIND) == sorted(DTYPES)
    for name in named:
        assert struct.calcsize(reader.KIND[name]) == DTYPES[name][0].itemsize


# ------------------------------------------------------------------------------------------- codecs, dtypes, chunks


def masks():
    """Which elements have values: all, and what the codecs of positions are for."""
    shape = (8, 48)
    yield np.ones(shape, np.bool_)
    for density in (0.4, 0.03, 0.0):
        yield np.random.default_rng(1).random(shape) < density
    yield np.tile([True, False, False, True, False, True, True, False], (8, 6))  # 2:4
    for density in (1.0, 0.95, 0.3):
        mask = np.random.default_rng(2).random(shape) < density
        mask[[0, 3, 4]] = mask[:, ::3] = False
        yield mask


def contents(dtype):
    """Bits of all kinds that codecs of values are for: noise, weights, few different ones, integer grids."""
    noise = random_bits(dtype, 8 * 48)
    yield noise
    yield noise[np.random.default_rng(0).integers(0, 9, noise.size)]
    if dtype in FLOATS:
        weight = pruned((8, 48), 0).to(DTYPES[dtype][0])
        alike = weight.clone()
        alike[:, ::5] = 4.0  # so that rows, and pieces of them, have one scale
        yield bits(weight).numpy().reshape(-1)
        for width in (2, 5, 8):
            yield bits(quantized(weight, width)).numpy().reshape(-1)
            yield bits(quantized(alike, width)).numpy().reshape(-1)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("codec", CODECS)
def test_it_reads_every_codec(codec, chunks, set_chunks):
    set_chunks(chunks)
    of_positions = CODECS[codec].role == "positions"
    codecs = {name: CODECS[name] for name in (codec, "raw" if of_positions else "bitmap")}
    met = 0
    for dtype in DTYPES:
        arrays = itertools.islice(contents(dtype), 1 if of_positions else None)
        for array, mask in itertools.product(arrays, list(masks())[: None if of_positions else 2]):
            wanted = from_bits(np.where(mask.reshape(-1), array, np.zeros_like(array)), dtype, SHAPE)
            blob = container.encode(wanted, codecs, level="small", signed_zeros=True)
            if blob is None:  # it cannot hold this
                continue
            assert decode(blob) == (dtype, SHAPE, raw(wanted))
            assert struct.unpack_from("<I", bytes(blob[:20].numpy()), 16) == CHUNKS[chunks][:1]
            met += codec in codecs_of(blob)
    assert met > 5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_reads_every_level(dtype, level, set_chunks):
    for chunks, sparsity in itertools.product(CHUNKS, (0, 0.5, 0.9, 1)):
        set_chunks(chunks)
        array = random_bits(dtype, 8 * 48)
        array[np.random.default_rng(0).random(array.size) < sparsity] = 0
        wanted = from_bits(array, dtype, SHAPE)
        blob = container.encode(wanted, CODECS, level=level, signed_zeros=True)
        assert decode(blob) == (dtype, SHAPE, raw(wanted))


@pytest.mark.usefixtures("always")
def test_it_reads_every_form_of_n_of_m():
    for m in (2, 4, 8, 16):
        for n in range(1, m):
            kept = torch.rand(80, m, generator=torch.Generator().manual_seed(n)).argsort(1) < n
            wanted = kept.to(torch.uint8).view(16, -1)
            blob = container.encode(wanted, {name: CODECS[name] for name in ("n:m", "raw")})
            assert decode(blob) == ("U8", tuple(wanted.shape), raw(wanted))
            assert "n:m" in codecs_of(blob) or 4 * n > 3 * m


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_rounds_products_as_torch_does(dtype, width):
    most = code_max(width)
    largest = torch.finfo(torch.float32).max / most
    scales = torch.tensor(
        [2.0**-126, 2.0**-25, 2.0**-24 * 1.25, 0.001, 1.0, 300.7, 65519.0, 65520.0, 2.0**100, largest]
    )
    scales = (scales.view(torch.int32) & -128).view(torch.float32)  # of 17 bits, as the page asks for
    codes = torch.arange(-most, most + 1).expand(len(scales), -1)
    wanted = bits((codes * scales[:, None]).to(DTYPES[dtype][0]) + 0.0)
    part = bytes([width, 0, 0, 0]) + scales.numpy().tobytes() + b"\0" + (codes + most).to(torch.uint8).numpy().tobytes()
    count, (rows, columns) = wanted.numel(), wanted.shape
    found = reader.values_of("int-entropy", reader.Part(part), count, dtype, range(count), count, columns)
    assert found == wanted.reshape(-1).tolist()
    assert found == CODECS["int-entropy"].decode(memoryview(part), Layout(dtype, rows, columns, count)).tolist()


def test_it_reads_every_method_of_entropy_streams():
    data = bytes(range(7)) * 40
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    frames = [zstandard.ZstdCompressor(write_content_size=known).compress(data) for known in (True, False)]
    streams = [b"\0" + data, b"\1" + deflate.compress(data) + deflate.flush(), *(b"\2" + frame for frame in frames)]
    for stream in streams:
        assert reader.entropy(reader.Part(stream), len(data)) == data
        for count in (len(data) - 1, len(data) + 1):
            assert len(reader.entropy(reader.Part(stream), count)) != count  # which its callers refuse
    with pytest.raises(IndexError):
        reader.entropy(reader.Part(b"\3" + data), len(data))


# -------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def model():
    """Tensors of every dtype, sparse and dense, large enough to be worth it, and some that never are."""
    tensors = {"vector": torch.arange(5.0), "magic": torch.tensor([list(b"\x89SPHK1\r\n")], dtype=torch.uint8)}
    tensors["complex"] = torch.ones(3, 3, dtype=torch.complex64)
    for dtype in DTYPES:
        array = random_bits(dtype, 96 * 100)
        array[np.random.default_rng(0).random(array.size) < 0.9] = 0
        tensors[dtype] = from_bits(array, dtype, (96, 100))
    for dtype in FLOATS:
        tensors[f"weight {dtype}"] = pruned((96, 100), 0).to(DTYPES[dtype][0])
        tensors[f"grid {dtype}"] = quantized(pruned((96, 100), 0.5).to(DTYPES[dtype][0]), 4)
    tensors["chunks"] = torch.zeros(700, 1000, dtype=torch.int8)
    tensors["chunks"][::50, ::7] = 3
    tensors["pieces of a row"] = torch.zeros(2, (1 << 20) + 11, dtype=torch.bool)
    tensors["pieces of a row"][:, :: 1 << 10] = True
    parameters = {name.replace(" ", "-"): nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    return nn.ParameterDict(parameters)


@pytest.mark.parametrize("level", LEVELS)
def test_it_reads_what_save_pretrained_writes(model, level, tmp_path):
    sparsehooks.save_pretrained(model, tmp_path / "artifact", level=level, signed_zeros=True)
    path = tmp_path / "artifact" / "model.safetensors"
    found = reader.read_file(path)
    assert found.keys() == model.keys()
    for name, wanted in model.items():
        if name != "complex":
            assert found[name] == (dtype_name(wanted.dtype), tuple(wanted.shape), raw(wanted.detach()))
    assert found["complex"][:2] == ("C64", (3, 3))
    assert path.stat().st_size < sum(wanted.nbytes for wanted in model.values()) / 3


def test_it_reads_negative_zeros_as_positive_ones(tmp_path):
    weight = pruned((96, 100), 0) * (pruned((96, 100), 0.9, seed=1) != 0)
    assert weight.view(torch.int32).eq(-(1 << 31)).any()
    sparsehooks.save_pretrained(nn.ParameterDict({"weight": nn.Parameter(weight)}), tmp_path / "artifact")
    found = reader.read_file(tmp_path / "artifact" / "model.safetensors")["weight"]
    assert found == ("F32", (96, 100), raw(weight + 0.0))


def test_it_reads_a_model_in_several_files(tmp_path):
    model = sparsehooks.compress(
        tiny_bert(), {"stage": [{"prune": "magnitude", "sparsity": 0.9, "targets": ["Linear"]}]}
    )
    sparsehooks.save_pretrained(model, tmp_path / "artifact", max_shard_size="40kB")
    paths = list((tmp_path / "artifact").glob("*.safetensors"))
    assert len(paths) > 1
    found = {}
    for path in paths:
        found |= reader.read_file(path)
    state = model.state_dict()
    assert found == {name: ("F32", tuple(tensor.shape), raw(tensor + 0.0)) for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def small_blob(always):
    tensor = torch.zeros(6, 10, dtype=torch.bfloat16)
    tensor[::2, ::3] = 1.5
    return bytes(container.encode(tensor, CODECS).numpy())


def written(path, blob, **metadata):
    save_file({"weight": torch.frombuffer(bytearray(blob), dtype=torch.uint8)}, path, metadata=metadata or None)
    return path


def names_of(blob):
    return codecs_of(torch.frombuffer(bytearray(blob), dtype=torch.uint8))


def test_it_refuses_any_change(small_blob, tmp_path):
    sums = {"sparsehooks.crc32": json.dumps({"weight": zlib.crc32(small_blob)})}
    for metadata in ({}, sums):
        assert reader.read_file(written(tmp_path / "good", small_blob, **metadata))["weight"][0] == "BF16"
    for index in range(len(small_blob)):
        changed = small_blob[:index] + bytes([small_blob[index] ^ 1]) + small_blob[index + 1 :]
        path = written(tmp_path / "bad", changed, **({} if index >= 8 else sums))  # without its magic it is no blob
        with pytest.raises(ValueError, match="weight"):
            reader.read_file(path)
    for length in range(8, len(small_blob)):
        with pytest.raises(ValueError, match="weight"):
            reader.read_file(written(tmp_path / "bad", small_blob[:length]))
    with pytest.raises(ValueError, match="after the last chunk"):
        reader.read_file(written(tmp_path / "bad", small_blob + bytes(8)))


def test_it_refuses_what_it_does_not_know(small_blob, tmp_path):
    names = names_of(small_blob)
    length = 20 + 2 * 8 + len("\n".join(["BF16", *names])) + 18  # of one row
    length += -length % 8
    others = [(name.encode(), b"x" * len(name), "x" * len(name)) for name in names]
    for old, new, said in ((b"BF16", b"BF17", "header"), (b"\1\2", b"\2\2", "version 2"), *others):
        header = small_blob[12:length].replace(old, new, 1)
        blob = small_blob[:8] + zlib.crc32(header).to_bytes(4, "little") + header + small_blob[length:]
        assert blob != small_blob
        with pytest.raises(ValueError, match=said):
            reader.read_file(written(tmp_path / "bad", blob))


def forged(codecs, count, positions, values, dtype="U8", shape=(2, 8), chunk=16):
    """A blob of one chunk that says whatever it is told, with the right checksums."""
    first, second = (part + bytes(-len(part) % 8) for part in (positions, values))
    names = "\n".join([dtype, *codecs]).encode()
    header = struct.pack(f"<BBHI{len(shape)}Q", 1, len(shape), len(names), chunk, *shape) + names
    places = (0 if len(codecs) == 2 else 255, len(codecs) - 1)
    header += struct.pack("<4I2B", count, len(positions), len(values), zlib.crc32(first + second), *places)
    header += bytes(-(12 + len(header)) % 8)
    return b"\x89SPHK1\r\n" + zlib.crc32(header).to_bytes(4, "little") + header + first + second


LIES = {
    "a position beyond the last": forged(["gap-bytes", "raw"], 2, b"\7\x08", b"\1\2"),
    "more values than elements": forged(["gaps", "raw"], 17, b"\0" + b"\xff" * 2 + b"\1", bytes(17)),
    "a count that nothing bears out": forged(["gaps", "raw"], (1 << 32) - 1, b"\0", b""),
    "fewer ones than values": forged(["bitmap", "raw"], 2, b"\1\0", b"\1\2"),
    "bytes after the positions": forged(["gap-bytes", "raw"], 1, b"\0\0", b"\1"),
    "bytes after the values": forged(["raw"], 16, b"", bytes(17)),
    "bytes for no positions": forged(["raw"], 16, b"\0", bytes(16)),
    "not a value for each element": forged(["raw"], 15, b"", bytes(15)),
    "an entropy stream of wide values": forged(["entropy"], 16, b"", bytes(17), dtype="U16"),
    "too many symbols": forged(["entropy"], 16, b"", bytes(18)),
    "too few symbols": forged(["entropy"], 16, b"", bytes(16)),
    "a place beyond the codebook": forged(["codebook-entropy"], 16, b"", b"\0\7\0" + b"\1" * 16),
    "an unknown method": forged(["entropy"], 16, b"", b"\x09" + bytes(16)),
    "damaged deflate": forged(["entropy"], 16, b"", b"\1" + b"\xff" * 16),
    "a damaged frame": forged(["entropy"], 16, b"", b"\2" + b"\xff" * 16),
    "codes of integers": forged(["int"], 16, b"", b"\2\0\0\0" + b"\0\0\x80?" * 2 + bytes(4), dtype="I16"),
    "a codec of positions for values": forged(["bitmap"], 16, b"", b"\xff\xff"),
    "a codec of values for positions": forged(["codebook", "raw"], 0, b"", b""),
    "one dimension": forged(["raw"], 16, b"", bytes(16), shape=(16,)),
    "no elements": forged(["raw"], 0, b"", b"", shape=(0, 16)),
    "an endless chunk": forged(["gap-bytes", "raw"], 0, b"", b"", shape=(2, 1 << 30), chunk=(1 << 32) - 1),
}


def test_forged_blobs_are_read_where_they_tell_the_truth():
    assert reader.decode(reader.Part(forged(["raw"], 16, b"", bytes(range(16)))))[2] == bytes(range(16))
    found = reader.decode(reader.Part(forged(["gap-bytes", "raw"], 2, b"\7\x07", b"\1\2")))
    assert found == ("U8", (2, 8), bytes(7) + b"\1" + bytes(7) + b"\2")


@pytest.mark.parametrize("lie", LIES)
def test_it_refuses_what_the_page_refuses(lie, tmp_path):
    with pytest.raises(ValueError, match="weight"):
        reader.read_file(written(tmp_path / "bad", LIES[lie]))
    with pytest.raises(ArtifactError):  # the library reads the page alike
        decode_by_library(torch.frombuffer(bytearray(LIES[lie]), dtype=torch.uint8), CODECS, name="weight", shape=None)


def test_only_one_dimension_of_bytes_is_a_blob(small_blob, tmp_path):
    tensors = {
        "two": torch.frombuffer(bytearray(small_blob), dtype=torch.uint8)[None],
        "signed": torch.frombuffer(bytearray(small_blob), dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "plain")
    found = reader.read_file(tmp_path / "plain")
    assert found["two"] == ("U8", (1, len(small_blob)), small_blob)
    assert found["signed"] == ("I8", (len(small_blob),), small_blob)
