"""Attacks by name: each is refused with a sentence that names file and tensor, quickly and in little memory.

``fuzz.Forged`` takes an encoded tensor apart; all checksums are made right again where a test does not say otherwise.
"""

import functools
import json
import os
import random
import struct
import subprocess
import sys
import textwrap
import time
import zlib

import numpy as np
import pytest
import torch
from helpers import tiny_bert
from safetensors.torch import load_file, save_file
from test_folder import CONFIG, contents, same, weights_file
from test_fuzz import fuzz
from transformers import AutoModel

from sparsehooks import (
    ArtifactError,
    Codec,
    convert,
    decompress,
    from_codes,
    inspect,
    load_state_dict,
    row_scales,
    safe_open,
    save_pretrained,
    to_codes,
    verify,
)
from sparsehooks.artifact.container import encode
from sparsehooks.artifact.folder import Folder, checksums, installed_codecs
from sparsehooks.artifact.header import DTYPES
from sparsehooks.builtin.codecs.entropy import unsqueeze

FILE = "model.safetensors"
TRILLION = 10**12


def pruned(shape=(60, 80), sparsity=0.7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < sparsity, 0.0, weight).to(dtype)


def on_grid(weight, most=127):
    scales = row_scales(weight, most)
    return from_codes(to_codes(weight, scales, most), scales, weight.dtype)


def few_values(dtype=torch.float32):
    return (2 * pruned(sparsity=0)).round().clamp(-4, 4).to(dtype) + 0.5


def two_of_four():
    return fuzz.n_of_m(pruned(sparsity=0), 2, 4) + 0.0


def submatrix():
    weight = pruned(sparsity=0)
    weight[::2] = 0
    weight[:, 10:50] = 0
    return weight


def blob_of(tensor, *names):
    """A tensor encoded in four chunks or so, by some codecs only."""
    codecs = installed_codecs()
    with fuzz.patched(_CHUNK=tensor.numel() // 4, MIN_SAVED_SHARE=-1000, MIN_SAVED_BYTES=-(1 << 20)):
        return encode(tensor, {name: codecs[name] for name in names} or codecs, level="small").numpy().tobytes()


def forged(tensor, names, *changes):
    """A blob to which something was done."""
    blob = fuzz.Forged.parse(blob_of(tensor, *names))
    for change in changes:
        change(blob)
    return fuzz.repaired_blob(blob.pack())


def write(folder, blob, name="w"):
    """An artifact that holds one blob, with the right checksum."""
    folder.mkdir(exist_ok=True)
    tensors = {name: torch.frombuffer(bytearray(blob), dtype=torch.uint8), "other": torch.ones(3)}
    save_file(tensors, folder / FILE, metadata={"format": "pt", **checksums(tensors)})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def rows_of(folder):
    with safe_open(folder) as file:
        return file.get_slice("w")[1:]


def refused(folder, message, *, tensor="w", readers=(inspect, verify, load_state_dict, decompress, rows_of)):
    """Whether all ways to read a folder refuse it, and how."""
    for read in readers:
        began, memory = time.process_time(), fuzz.peak(reset=True)
        out = folder.parent / "out"
        with pytest.raises(ArtifactError, match=message) as caught:
            read(folder, out) if read is decompress else read(folder)
        sentence = str(caught.value)
        assert fuzz.peak() - memory < 8000
        assert time.process_time() - began < 1
        assert str(folder) in sentence
        assert "\n" not in sentence
        assert not out.exists()
        if tensor is not None:
            assert f"'{folder / FILE}'" in sentence
            assert f"tensor '{tensor}'" in sentence


# ------------------------------------------------------------------------------------------------- damage


def test_truncation_anywhere(tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned((30, 40))))
    data = (folder / FILE).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in [*range(header + 200), *range(header + 200, len(data), 37), len(data) - 1]:
        (folder / FILE).write_bytes(data[:length])
        for read in (inspect, load_state_dict):
            with pytest.raises(ArtifactError, match=FILE):
                read(folder)


def test_an_encoded_tensor_that_is_cut_anywhere(tmp_path):
    blob = blob_of(pruned((30, 40)))
    for length in [*range(8, 200), *range(200, len(blob), 37), len(blob) - 1]:
        folder = write(tmp_path / "m", fuzz.repaired_blob(blob[:length]))
        for read in (verify, load_state_dict):
            with pytest.raises(ArtifactError, match=rf"{FILE}': tensor 'w': .*(damaged|bytes|not an encoded)"):
                read(folder)


def test_bit_flips_anywhere(tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned((12, 20))))
    data = (folder / FILE).read_bytes()
    harmless = data.index(b'"format":"pt"')
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << random.Random(position).randrange(8)
        (folder / FILE).write_bytes(damaged)
        if not harmless <= position < harmless + len('"format":"pt"'):
            with pytest.raises(ArtifactError):
                verify(folder)


def test_an_encoded_tensor_finds_bit_flips_by_itself(tmp_path):
    blob = blob_of(pruned((12, 20)))
    for position in range(8, len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= 1 << random.Random(position).randrange(8)
        folder = write(tmp_path / "m", damaged)
        for read in (inspect, load_state_dict):
            with pytest.raises(ArtifactError, match="tensor 'w'"):
                read(folder)


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned()))
    size = (folder / FILE).stat().st_size
    with safe_open(folder) as file:
        part = file.get_slice("w")
        os.truncate(folder / FILE, size - 1000)
        for read in (lambda: part[:], lambda: part[50:], lambda: file.get_tensor("w")):
            with pytest.raises(ArtifactError, match=f"{FILE}' became shorter while tensor 'w' was read"):
                read()


def test_a_file_that_is_replaced_while_it_is_open(tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned()))
    (tmp_path / "next").write_bytes(b"something else")
    with safe_open(folder) as file:
        (tmp_path / "next").rename(folder / FILE)
        assert same(file.get_tensor("w"), pruned())
        assert same(file.get_slice("w")[3:9], pruned()[3:9])


# ------------------------------------------------------------------------------------------------- tables that lie


def change_row(place, change, number=1):
    def apply(blob):
        blob.rows[number][place] = change(blob.rows[number]) if callable(change) else change

    return apply


POSITIONS = {
    "bitmap": (pruned(), "raw"),
    "gap-bytes": (pruned(sparsity=0.95), "raw"),
    "gaps": (pruned(sparsity=0.9), "raw"),
    "n:m": (two_of_four(), "raw"),
    "submatrix": (submatrix(), "raw"),
}
VALUES = {
    "raw": (pruned(), "bitmap"),
    "int": (on_grid(pruned()), "bitmap"),
    "codebook": (few_values(), None),
    "exponent": (pruned(), "bitmap"),
    "int-entropy": (on_grid(pruned()), "bitmap"),
    "codebook-entropy": (few_values(), None),
    "exponent-entropy": (pruned(), "bitmap"),
    "entropy": ((30 * pruned()).to(torch.int8), "bitmap"),
}
EACH = {**{name: (tensor, (name, other)) for name, (tensor, other) in POSITIONS.items()}} | {
    name: (tensor, (name,) if other is None else (other, name)) for name, (tensor, other) in VALUES.items()
}
each_codec = pytest.mark.parametrize("codec", EACH)


@each_codec
def test_the_forgeries_start_from_something_good(codec, tmp_path):
    tensor, names = EACH[codec]
    folder = write(tmp_path / "m", forged(tensor, names))
    row = next(row for row in verify(folder).tensors if row.name == "w")
    assert codec in {row.positions, row.values}
    assert same(load_state_dict(folder)["w"], tensor)


@each_codec
@pytest.mark.parametrize("by", [-1, 1, -8, 1 << 20, (1 << 32) - 1])
def test_counts_that_do_not_match(codec, by, tmp_path):
    tensor, names = EACH[codec]
    blob = forged(tensor, names, change_row(0, lambda row: row[0] + by))
    refused(write(tmp_path / "m", blob), "tensor 'w': .+", readers=(verify, load_state_dict))


@each_codec
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("lie", [lambda row: 0, lambda row: (1 << 32) - 1, lambda row: 1 << 31])
def test_chunk_lengths_that_lie(codec, part, lie, tmp_path):
    tensor, names = EACH[codec]
    if part == 0 and len(names) == 1 and lie(None) == 0:
        pytest.skip("there are no positions")
    blob = forged(tensor, names, change_row(1 + part, lie))
    refused(write(tmp_path / "m", blob), "bytes instead of|damaged", readers=(verify, load_state_dict))


@each_codec
def test_chunk_lengths_that_lie_and_add_up(codec, tmp_path):
    tensor, names = EACH[codec]

    def move(blob):
        blob.rows[0][2] -= 8
        blob.rows[1][2] += 8

    def between(blob):
        blob.rows[1][1] += 8
        blob.rows[1][2] -= 8

    for change in (move, between):
        folder = write(tmp_path / "m", forged(tensor, names, change))
        refused(folder, "tensor 'w': .+", readers=(verify, load_state_dict))


@each_codec
def test_chunks_that_change_places_or_are_missing(codec, tmp_path):
    tensor, names = EACH[codec]

    def drop(blob):
        del blob.rows[2], blob.parts[2]

    def double(blob):
        blob.rows.insert(1, blob.rows[1])
        blob.parts.insert(1, blob.parts[1])

    for change in (drop, double):
        refused(
            write(tmp_path / "m", forged(tensor, names, change)), "damaged|bytes", readers=(verify, load_state_dict)
        )
    blob = fuzz.Forged.parse(blob_of(tensor, *names))
    blob.parts[0], blob.parts[1] = blob.parts[1], blob.parts[0]
    for row, pair in zip(blob.rows, blob.parts, strict=True):
        row[1:3] = map(len, pair)
    (tmp_path / "m" / FILE).unlink()
    refused(write(tmp_path / "m", blob.pack()), "checksum", readers=(verify, load_state_dict))


# ------------------------------------------------------------------------------------------------- positions


def set_part(part, change, number=1):
    """Other bytes for the positions or the values of a chunk, and their length."""

    def apply(blob):
        blob.parts[number][part] = bytes(change(bytearray(blob.parts[number][part])))
        blob.rows[number][1 + part] = len(blob.parts[number][part])

    return apply


@pytest.mark.parametrize(
    ("codec", "change"),
    [
        ("bitmap", lambda data: data + b"\1"),
        ("bitmap", lambda data: data[:-1]),
        ("gap-bytes", lambda data: b"\xfe" * len(data)),
        ("gap-bytes", lambda data: data[:-1] + b"\xff" + struct.pack("<I", 1 << 31)),
        ("gap-bytes", lambda data: b"\xff" + data[1:] + struct.pack("<I", (1 << 32) - 1)),
        ("gap-bytes", lambda data: data[:-1] + b"\xff"),
        ("gaps", lambda data: b"\x0f" + data[1:]),
        ("gaps", lambda data: b"\xff" + data[1:]),
        ("gaps", lambda data: bytes([data[0] + 1]) + data[1:]),
        ("gaps", lambda data: bytes([data[0]]) + b"\0" * 9 + data[1:]),
        ("gaps", lambda data: data[:1]),
        ("gaps", lambda data: b""),
        ("n:m", lambda data: data[:2] + b"\xff" * (len(data) - 2)),
        ("n:m", lambda data: b"\3" + data[1:]),
        ("n:m", lambda data: b"\0\0" + data[2:]),
        ("n:m", lambda data: b"\x80\xff" + data[2:]),
        ("submatrix", lambda data: b"\xff" * (len(data) - 1) + data[-1:]),
        ("submatrix", lambda data: data[:-1] + b"\xff"),
        ("submatrix", lambda data: data[:-1] + b"\1"),
        ("submatrix", lambda data: data + b"\0"),
    ],
)
def test_positions_out_of_range_or_malformed(codec, change, tmp_path):
    tensor, names = EACH[codec]
    refused(write(tmp_path / "m", forged(tensor, names, set_part(0, change))), "tensor 'w': .+")


@pytest.mark.parametrize(
    ("codec", "change"),
    [
        ("bitmap", lambda data: data[:-1] + bytes([data[-1] | 128])),
        ("submatrix", lambda data: bytes([data[0] | 128]) + data[1:]),
    ],
)
def test_bits_behind_the_end(codec, change, tmp_path):
    weight = pruned((5, 9))  # chunks whose bits do not fill their bytes
    weight[:, 2:7] = 0
    refused(write(tmp_path / "m", forged(weight, (codec, "raw"), set_part(0, change, 0))), "bits set after")


class Wrong(Codec):
    """A codec of somebody who did not check what he read."""

    role = "positions"
    found = None

    def bound(self, data, layout):
        return 0

    def encode(self, data, layout):
        return b""

    def decode(self, part, layout):
        return self.found(layout.count, layout.size)


@pytest.mark.parametrize(
    "found",
    [
        lambda count, size: np.arange(count) - 1,
        lambda count, size: np.arange(count) + size - count + 1,
        lambda count, size: np.arange(count - 1),
        lambda count, size: np.zeros(0, np.intp),
    ],
)
def test_positions_of_a_careless_codec(found, monkeypatch, tmp_path):
    monkeypatch.setattr(Wrong, "found", lambda self, count, size: found(count, size))
    codecs = {**installed_codecs(), "wrong": Wrong()}

    def rename(blob):
        blob.names[blob.names.index("bitmap")] = "wrong"

    folder = write(tmp_path / "m", forged(pruned(), ("bitmap", "raw"), rename))
    for read in (verify, load_state_dict):
        with pytest.raises(ArtifactError, match=f"{FILE}': tensor 'w': chunk 0 does not have"):
            read(folder, codecs=codecs)


# ------------------------------------------------------------------------------------------------- shapes and headers


def set_field(**fields):
    return lambda blob: [setattr(blob, name, value) for name, value in fields.items()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [10**6, 10**6]}, "too short for the chunks"),
        ({"shape": [10**6, 10**6], "chunk": 10**6}, "too short for the chunks"),
        ({"shape": [TRILLION, 1], "chunk": 1 << 20}, "too short for the chunks"),
        ({"shape": [1, TRILLION], "chunk": 1 << 20}, "too short for the chunks"),
        ({"shape": [1, TRILLION], "chunk": (1 << 32) - 1}, "impossible size"),
        ({"shape": [1 << 32, 1 << 32]}, "its shape"),
        ({"shape": [1 << 63, 2]}, "its shape"),
        ({"shape": [(1 << 64) - 1, (1 << 64) - 1]}, "its shape"),
        ({"shape": [1 << 16] * 8}, "its shape"),
        ({"shape": [4800]}, "its shape"),
        ({"shape": []}, "its shape"),
        ({"shape": [0, 80]}, "its shape"),
        ({"shape": [1] * 7 + [60, 80]}, "its shape"),
        ({"shape": [60, 80] + [1] * 253}, "its shape"),
        ({"chunk": 0}, "impossible size"),
        ({"chunk": 81}, "impossible size"),
        ({"chunk": 1}, "too short for the chunks"),
        ({"chunk": 1 << 31}, "impossible size"),
        ({"version": 0}, "version 0"),
        ({"version": 2}, "version 2 is not known to this release; upgrade sparsehooks"),
    ],
)
def test_shape_bombs_and_overflowing_products(fields, message, tmp_path):
    refused(write(tmp_path / "m", forged(pruned(), ("bitmap", "raw"), set_field(**fields))), message)


def bomb(columns=1 << 20, rows=1 << 12):
    """A blob with a right table for each row, of which every element is zero: 16 GiB."""
    chunk = forged(torch.zeros(4, columns), ("gaps", "raw"))
    blob = fuzz.Forged.parse(chunk)
    blob.shape, blob.rows, blob.parts = [rows, columns], blob.rows[:1] * rows, blob.parts[:1] * rows
    return fuzz.repaired_blob(blob.pack())


def test_a_small_file_that_is_right_about_its_size(tmp_path):
    folder = write(tmp_path / "m", bomb())
    message = r"would decode from \d+ to 17179869184 bytes; read some rows at a time"
    refused(folder, message, readers=(inspect, verify, load_state_dict, decompress))
    with pytest.raises(ArtifactError, match=message):
        convert(folder, tmp_path / "out")
    with safe_open(folder) as file:
        part = file.get_slice("w")
        assert part.get_shape() == [1 << 12, 1 << 20]
        assert same(part[17, 3:6], torch.zeros(3))


@pytest.mark.parametrize("shape", [(1, 1 << 28), (2, 1 << 27)])
def test_long_rows_take_no_more_than_a_few_times_their_size(shape, tmp_path):
    codecs = installed_codecs()
    blob = encode(torch.zeros(1, dtype=torch.int8).expand(shape), {name: codecs[name] for name in ("gaps", "raw")})
    folder = write(tmp_path / "m", blob.numpy().tobytes())
    memory = fuzz.peak(reset=True)
    assert inspect(folder).zeros == 1 << 28
    assert fuzz.peak() - memory < 3 << 18


@pytest.mark.parametrize(
    "shape", [[0, 1 << 43], [0, 1 << 43, 1 << 43], [1 << 43, 0, 1 << 43], [0, (1 << 44) - 1], [1 << 20, 0]]
)
@pytest.mark.parametrize("dtype", ["F32", "BOOL", "C64"])
def test_sizes_of_nothing(shape, dtype, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    fields = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
    weights_file(tmp_path / "m" / FILE, {"__metadata__": {"sparsehooks.crc32": '{"w": 0}'}, "w": fields})
    memory = fuzz.peak(reset=True)
    try:
        assert verify(tmp_path / "m").bytes == 0
        assert load_state_dict(tmp_path / "m")["w"].shape == tuple(shape)
        decompress(tmp_path / "m", tmp_path / "out")
    except ArtifactError as error:
        assert "tensor 'w' has an impossible shape" in str(error)  # noqa: PT017 - either is fine
    assert fuzz.peak() - memory < 30_000


@pytest.mark.parametrize("length", [-1, -(1 << 63), (1 << 63) - 1, 1 << 62, 1 << 32, 17 << 20, 1000, 1, 0])
def test_negative_or_huge_header_lengths(length, tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned((12, 20))))
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes((length % (1 << 64)).to_bytes(8, "little") + data[8:])
    refused(folder, "truncated or not a safetensors file|JSON cannot be read", tensor=None)


def test_names_that_are_longer_than_the_blob(tmp_path):
    blob = bytearray(blob_of(pruned((12, 20))))
    for length in (0, 1, 1000, (1 << 16) - 1):
        blob[14:16] = length.to_bytes(2, "little")
        refused(write(tmp_path / "m", fuzz.repaired_blob(bytes(blob))), "tensor 'w': .*")


# ------------------------------------------------------------------------------------------------- dtypes and values


@each_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_dtypes(codec, dtype, tmp_path):
    tensor, names = EACH[codec]
    folder = write(tmp_path / "m", forged(tensor, names, lambda blob: blob.names.__setitem__(0, dtype)))
    given = next(name for name, (known, _) in DTYPES.items() if known == tensor.dtype)
    if given == dtype:
        assert same(load_state_dict(folder)["w"], tensor)
        return
    try:
        found = load_state_dict(folder)["w"]  # bits of the same width may be those of another dtype
    except ArtifactError as error:
        assert "tensor 'w'" in str(error)  # noqa: PT017
    else:
        assert found.dtype == DTYPES[dtype][0]
        assert found.element_size() == tensor.element_size() or (codec.startswith("int") and dtype in {"BF16", "F16"})


@pytest.mark.parametrize("dtype", ["", "F4", "f32", "F8_E8M0", "C64", "F32 ", "__import__('os')", "x" * 1000])
def test_dtypes_that_do_not_exist(dtype, tmp_path):
    blob = forged(pruned(), ("bitmap", "raw"), lambda blob: blob.names.__setitem__(0, dtype))
    refused(write(tmp_path / "m", blob), "dtype .{2,22} is not one of")


@pytest.mark.parametrize(
    ("dtype", "shape"), [("I8", None), ("BOOL", None), ("F8_E4M3", None), ("U8", 2), ("I64", None)]
)
def test_an_encoded_tensor_under_another_label(dtype, shape, tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned()))
    header, body = fuzz.split((folder / FILE).read_bytes())
    entry, size = header["w"], {"I64": 8}.get(dtype, 1)
    entry.update(dtype=dtype, shape=[entry["shape"][0] // size] if shape is None else [1, entry["shape"][0]])
    (folder / FILE).write_bytes(fuzz.joined(header, body))
    refused(folder, "is encoded, but labelled")


@pytest.mark.parametrize("codec", ["int", "int-entropy"])
@pytest.mark.parametrize(
    "scale", [np.nan, np.inf, -np.inf, -1.0, -0.0, 0.0, 1e-45, 3e38, np.nextafter(np.float32(0.5), np.float32(1))]
)
def test_scales_that_are_none(codec, scale, tmp_path):
    tensor, names = EACH[codec]
    change = set_part(1, lambda data: data[:8] + struct.pack("<f", scale) + data[12:])
    refused(write(tmp_path / "m", forged(tensor, names, change)), "a scale lies outside the grid")


@pytest.mark.parametrize("codec", ["codebook", "codebook-entropy"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFC00123, 0xFFFFFFFF, 0x7F800000, 0xFF800000])
def test_values_that_are_not_finite_come_back_bit_for_bit(codec, bits, tmp_path):
    """They are data like any other, in a table too; what is refused is a table out of order."""
    tensor, names = EACH[codec]
    special = torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    mixed = torch.where(tensor == tensor[0, 0], special, tensor)
    folder = write(tmp_path / "m", forged(mixed, names))
    assert next(row for row in verify(folder).tensors if row.name == "w").values == codec
    assert same(load_state_dict(folder)["w"], mixed)
    at = 1 + 4 * 2
    change = set_part(1, lambda data: data[:at] + struct.pack("<I", bits) + data[at + 4 :])
    refused(write(tmp_path / "m", forged(tensor, names, change)), "not in ascending order", readers=(verify,))


@pytest.mark.parametrize(
    ("codec", "change"),
    [
        ("codebook", lambda data: b"\xff" + data[1:]),
        ("codebook", lambda data: data[:-1] + b"\xff"),
        ("codebook", lambda data: b""),
        ("codebook-entropy", lambda data: b"\0" + data[1:5] + data[-50:]),
        ("int", lambda data: b"\1" + data[1:]),
        ("int", lambda data: b"\x09" + data[1:]),
        ("int", lambda data: data[:1] + b"\1" + data[2:]),
        ("int", lambda data: data[:-1] + b"\xff"),
        ("exponent", lambda data: b"\5" + data[1:]),
        ("exponent", lambda data: data[:4] + struct.pack("<I", (1 << 32) - 1) + data[8:]),
        ("exponent", lambda data: data[:8] + struct.pack("<I", (1 << 32) - 1) + data[12:]),
        ("exponent-entropy", lambda data: b"\x09" + data[1:]),
        ("exponent-entropy", lambda data: data[:2] + b"\xff\xff" + data[4:]),
        ("exponent-entropy", lambda data: data[:4] + struct.pack("<I", (1 << 32) - 1) + data[8:]),
        ("entropy", lambda data: b"\x07" + data[1:]),
        ("entropy", lambda data: b"\1" + data[1:-9]),
        ("entropy", lambda data: data + b"\0"),
        ("raw", lambda data: data[:-1]),
    ],
)
def test_values_that_are_malformed(codec, change, tmp_path):
    tensor, names = EACH[codec]
    refused(write(tmp_path / "m", forged(tensor, names, set_part(1, change))), "tensor 'w': .+")


@functools.cache
def squeezed(count, method):
    """Zeros, entropy-coded."""
    if method == 1:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15)
        return b"\1" + coder.compress(bytes(count)) + coder.flush()
    zstandard = pytest.importorskip("zstandard")
    return b"\2" + zstandard.ZstdCompressor(3, write_content_size=method == 3).compress(bytes(count))


@pytest.mark.parametrize("codec", ["entropy", "int-entropy", "codebook-entropy", "exponent-entropy"])
@pytest.mark.parametrize("method", [1, 2, 3])
def test_decompression_bombs(codec, method, tmp_path):
    tensor, names = EACH[codec]
    stream = squeezed(300 << 20, method)
    assert len(stream) < 400_000

    def change(data):
        if codec == "exponent-entropy":
            taken, zero, symbols, length = struct.unpack("<BBHI", data[:8])
            start = 8 + 2 * (4800 // 4 - sum(tensor.reshape(4, -1)[1] == 0).item()) + 2 * symbols
            head = struct.pack("<BBHI", taken, zero, symbols, len(stream))
            return head + data[8:start] + stream + data[start + length :]
        head = {"entropy": 0, "int-entropy": 4 + 4 * 15, "codebook-entropy": 1 + 4 * (data[0] + 1)}[codec]
        return data[:head] + stream

    refused(write(tmp_path / "m", forged(tensor, names, set_part(1, change))), r"are not \d+ symbols")


@pytest.mark.parametrize("method", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_streams_of_another_length(count, method):
    for other in (0, 1, count - 1, count, count + 1, 100_000):
        if other == count == 0:
            continue  # nothing is stored as it is
        if other == count:
            assert unsqueeze(memoryview(squeezed(other, method)), count).size == count
        elif other >= 0:
            with pytest.raises(ArtifactError, match=f"not {count} symbols"):
                unsqueeze(memoryview(squeezed(other, method)), count)


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    ["os.system", "subprocess:Popen", "sparsehooks.builtin.codecs.raw:Raw", "antigravity", "Raw", "raw\0", "r" * 300],
)
@pytest.mark.parametrize("place", ["bitmap", "raw"])
def test_unknown_codecs_are_named_and_not_imported(name, place, tmp_path):
    def rename(blob):
        blob.names[blob.names.index(place)] = name

    before = set(sys.modules)
    refused(write(tmp_path / "m", forged(pruned(), ("bitmap", "raw"), rename)), "needs the .* codec '.*'; install")
    assert "antigravity" not in set(sys.modules) - before


def test_codecs_of_the_wrong_kind_or_twice_or_none(tmp_path):
    def names(*given):
        return lambda blob: blob.names.__setitem__(slice(1, None), given)

    for given in (
        ("raw", "raw"),
        ("bitmap",),
        ("bitmap", "bitmap"),
        ("", "raw"),
        (),
        ("raw", "bitmap"),
        ("bitmap", "ü"),
    ):
        folder = write(tmp_path / "m", forged(pruned(), ("bitmap", "raw"), names(*given)))
        refused(folder, "codec|list of names")
    for place in (2, 3, 254, 255):
        for which in (4, 5):
            folder = write(tmp_path / "m", forged(pruned(), ("bitmap", "raw"), change_row(which, place)))
            refused(folder, r"names codec \d+ of 2|bytes are|values for", readers=(verify, load_state_dict))


def test_reading_executes_and_imports_nothing(tmp_path):
    """An audit hook sees it all, and cannot be removed: a process of its own."""
    good = write(tmp_path / "good", blob_of(pruned()))
    write(tmp_path / "code", forged(pruned(), ("bitmap", "raw"), lambda blob: blob.names.__setitem__(1, "os:system")))
    pickled = b"cposix\nsystem\n(S'touch owned'\ntR."
    write(tmp_path / "pickle", forged(pruned(), ("bitmap", "raw"), set_part(1, lambda data: pickled)))
    for name, config in {
        "auto": {"auto_map": {"AutoModel": "evil.Model"}, "quantization_config": {"plugins": {"evil": {}}}},
        "class": {**CONFIG, "codecs": "evil:Codec", "import": "evil"},
    }.items():
        folder = write(tmp_path / name, blob_of(pruned()))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("open('owned', 'w')")
        (folder / "model.py").write_text("open('owned', 'w')")
    code = f"""
        import contextlib, os, sys
        from pathlib import Path
        from sparsehooks import ArtifactError, decompress, inspect, load_state_dict, verify
        root = Path({str(tmp_path)!r})
        os.chdir(root)
        def read(folder):
            for way in (verify, inspect, load_state_dict, lambda path: decompress(path, root / "out" / path.name)):
                with contextlib.suppress(ArtifactError):
                    way(folder)
        read(Path({str(good)!r}))
        def hook(event, arguments):
            kind = event.split(".")[0]
            if kind in {{"import", "exec", "compile", "subprocess", "socket", "pickle", "marshal"}}:
                print(event, arguments)
            if event in {{"os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"}}:
                print(event, arguments)
            if event == "open" and not str(arguments[0]).startswith(str(root)):
                print(event, arguments)
        sys.addaudithook(hook)
        for folder in sorted(root.iterdir()):
            if folder.name not in {{"good", "out"}}:
                read(folder)
        print("done", sorted(path.name for path in root.iterdir()))
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "done ['auto', 'class', 'code', 'good', 'out', 'pickle']\n"


# ------------------------------------------------------------------------------------------------- JSON


def twice(text, key):
    """JSON with one of its keys two times."""
    return text.replace(f'"{key}"'.encode(), f'"{key}": 0, "{key}"'.encode(), 1)


def test_duplicate_keys(tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned((12, 20))))
    header, body = fuzz.split((folder / FILE).read_bytes())
    text = fuzz.dumped(header)
    sums = header["__metadata__"]["sparsehooks.crc32"]
    for other in (
        *(twice(text, key) for key in ("w", "__metadata__", "format", "dtype", "data_offsets", "sparsehooks.crc32")),
        fuzz.dumped({**header, "__metadata__": {"sparsehooks.crc32": sums.replace('"w"', '"w": 1, "w"')}}),
    ):
        weights_file(folder / FILE, other, body)
        refused(folder, f"{FILE}' has a key twice", tensor=None, readers=(verify, inspect, load_state_dict))
    weights_file(folder / FILE, text, body)
    verify(folder)
    config = folder / "config.json"
    config.write_bytes(twice(config.read_bytes(), "quantization_config"))
    refused(folder, "config.json' has a key twice", tensor=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"w": 1' + "0" * 5000 + "}", "JSON cannot be read"),
        ("[" * 100_000, "JSON cannot be read"),
        ('{"a":' * 100_000, "JSON cannot be read"),
        ('{"w": NaN}', "checksums that are not numbers"),
        ('{"w": 1e400}', "checksums that are not numbers"),
        ('{"w": true}', "checksums that are not numbers"),
        ("[]", "checksums that are not numbers"),
        ("", "JSON cannot be read"),
        ('{"\\u001b[2J": 1}', r"checksum of tensor '.x1b\[2J', which no file holds"),
        ('{"' + "x" * 100_000 + '": 1}', "checksum of tensor 'x{80}', which no file holds"),
    ],
)
def test_checksums_that_are_none(text, message, tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned((12, 20))))
    header, body = fuzz.split((folder / FILE).read_bytes())
    header["__metadata__"]["sparsehooks.crc32"] = text
    (folder / FILE).write_bytes(fuzz.joined(header, body))
    refused(folder, message, tensor=None, readers=(verify, inspect, load_state_dict))


def test_metadata_that_are_no_text(tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned((12, 20))))
    header, body = fuzz.split((folder / FILE).read_bytes())
    for metadata in (
        {"format": "\ud800"},
        {"\udfff": "pt"},
        {"sparsehooks.crc32": "\ud800"},
        {"format": 1},
        {"a": None},
    ):
        (folder / FILE).write_bytes(fuzz.joined({**header, "__metadata__": metadata}, body))
        refused(folder, "metadata that are not strings", tensor=None)


def test_json_in_other_encodings(tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned((12, 20))))
    header, body = fuzz.split((folder / FILE).read_bytes())
    for encoding in ("utf-16-le", "utf-32-le", "utf-8-sig"):
        weights_file(folder / FILE, fuzz.dumped(header).decode().encode(encoding), body)
        refused(folder, "JSON cannot be read|not a safetensors file", tensor=None)


def test_names_of_tensors_that_are_none(tmp_path):
    folder = write(tmp_path / "m", blob_of(pruned((12, 20))))
    header, body = fuzz.split((folder / FILE).read_bytes())
    for name in ("", "../w", "w\n", "\x1b[2J", "\ud800", "w" * 501):
        some = {name if key == "w" else key: fields for key, fields in header.items()}
        (folder / FILE).write_bytes(fuzz.joined(some, body))
        refused(folder, "cannot be the name of a tensor", tensor=None)


# ------------------------------------------------------------------------------------------------- shards


def sharded(folder, seed):
    model = tiny_bert(seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand(parameter.shape) < 0.8] = 0
    save_pretrained(model, folder, max_shard_size="30KB")
    return folder, sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_shard_of_another_model(tmp_path):
    ours, files = sharded(tmp_path / "ours", 0)
    theirs, _ = sharded(tmp_path / "theirs", 1)
    assert len(files) > 2
    for file in files:
        mine = (ours / file).read_bytes()
        (ours / file).write_bytes((theirs / file).read_bytes())
        refused(ours, "were not saved together; get all files of the model again", tensor=None)
        with pytest.raises(ArtifactError, match="were not saved together"):
            AutoModel.from_pretrained(ours)
        (ours / file).write_bytes(mine)
    verify(ours)
    header, body = fuzz.split((ours / files[1]).read_bytes())
    del header["__metadata__"]["sparsehooks.crc32"]
    (ours / files[1]).write_bytes(fuzz.joined(header, body))
    refused(ours, "were not saved together", tensor=None)


def test_tensors_of_another_model_under_our_checksums(tmp_path):
    ours, files = sharded(tmp_path / "ours", 0)
    theirs, others = sharded(tmp_path / "theirs", 1)
    stranger = {name: tensor for file in others for name, tensor in load_file(theirs / file).items()}
    for file in files:
        data = (ours / file).read_bytes()
        metadata = fuzz.split(data)[0]["__metadata__"]
        save_file({name: stranger[name] for name in load_file(ours / file)}, ours / file, metadata=metadata)
        inspect(ours)
        for read in (verify, load_state_dict, AutoModel.from_pretrained):
            with pytest.raises(ArtifactError, match=f"{file}' is damaged: tensor '.*' does not match its checksum"):
                read(ours)
        (ours / file).write_bytes(data)
    verify(ours)


def test_missing_and_doubled_shards(tmp_path):
    folder, files = sharded(tmp_path / "m", 0)
    before = contents(folder)
    for file in files:
        (folder / file).rename(tmp_path / "away")
        refused(folder, f"{file}' is missing", tensor=None)
        (folder / file).mkdir()
        refused(folder, f"{file}' is missing or not a file", tensor=None)
        (folder / file).rmdir()
        os.mkfifo(folder / file)
        refused(folder, f"{file}' is missing or not a file", tensor=None)
        (folder / file).unlink()
        (tmp_path / "away").rename(folder / file)
    for first in files[:2]:
        for second in files[2:]:
            data = (folder / first).read_bytes()
            (folder / first).write_bytes((folder / second).read_bytes())
            refused(folder, "disagree on tensor", tensor=None)
            (folder / first).write_bytes(data)
    assert contents(folder) == before
    assert Folder.open(folder).bytes == verify(folder).bytes
