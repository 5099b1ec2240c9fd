"""Saved folders: read strictly, verified to the bit, undone exactly, written whole or not at all."""

import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sparsehooks import ArtifactError, from_codes, load_state_dict, row_scales, save_pretrained, to_codes
from sparsehooks.artifact import atomic, reading
from sparsehooks.artifact.container import encode, is_blob
from sparsehooks.artifact.folder import (
    Folder,
    checksums,
    decompress,
    inspect,
    installed_codecs,
    new_folder,
    verify,
)
from sparsehooks.artifact.shards import Shard, ShardWriter
from sparsehooks.artifact.stored import Stored

CONFIG = {"model_type": "bert", "quantization_config": {"quant_method": "sparsehooks", "version": "1"}}


@pytest.fixture(scope="session")
def codecs():
    return installed_codecs()


def state_dict():
    generator = torch.Generator().manual_seed(0)

    def random_weight(rows, columns, sparsity):
        weight = torch.randn(rows, columns, generator=generator)
        return torch.where(torch.rand(rows, columns, generator=generator) < sparsity, 0.0, weight)

    codes = random_weight(64, 300, 0)
    scales = row_scales(codes)
    return {
        "a.weight": random_weight(128, 96, 0.8),
        "a.bias": torch.randn(128, generator=generator),
        "b.weight": random_weight(128, 96, 0.9).to(torch.bfloat16),
        "b.codes": from_codes(to_codes(codes, scales), scales, torch.float32),
        "c.dense": random_weight(40, 40, 0),
        "c.half": torch.ones(7, dtype=torch.float16),
        "c.flags": torch.tensor([True, False, True]),
        "c.ids": torch.arange(9),
        "c.scalar": torch.tensor(3.5),
        "c.empty": torch.zeros(0, 5),
        "c.bytes": torch.arange(200, dtype=torch.uint8),
        "c.float8": torch.tensor([1.0, 0.0, -2.0]).to(torch.float8_e4m3fn),
    }


def same(left, right):
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def encoded(state, codecs):
    blobs = {name: encode(tensor, codecs) for name, tensor in state.items()}
    return {name: state[name] if blob is None else blob for name, blob in blobs.items()}


def save(folder, shards, *, config=CONFIG, index=None):
    """Write an artifact from the stored tensors of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **checksums({name: tensors[name] for tensors in shards.values() for name in tensors})}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata=metadata)
    if len(shards) > 1:
        where = {name: file for file, tensors in shards.items() for name in tensors}
        fields = {"metadata": {"total_size": 1, "total_parameters": 2}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(fields | (index or {})))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "more").mkdir(exist_ok=True)
    (folder / "more" / "notes.txt").write_text("kept")
    return folder


@pytest.fixture
def single(tmp_path, codecs):
    return save(tmp_path / "single", {"model.safetensors": encoded(state_dict(), codecs)})


@pytest.fixture
def sharded(tmp_path, codecs):
    tensors = encoded(state_dict(), codecs)
    names = list(tensors)
    shards = {
        f"model-0000{number + 1}-of-00003.safetensors": {name: tensors[name] for name in names[number::3]}
        for number in range(3)
    }
    return save(tmp_path / "sharded", shards)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------- good folders


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_decompress_gives_the_original_bit_for_bit(kind, request, tmp_path, codecs):
    folder = request.getfixturevalue(kind)
    before = contents(folder)
    out = decompress(folder, tmp_path / "x" / "dense", codecs=codecs)
    assert out == tmp_path / "x" / "dense"
    assert contents(folder) == before
    assert set(contents(out)) == set(before)
    expected, loaded = state_dict(), {}
    for file in out.glob("*.safetensors"):
        loaded |= load_file(file)
        assert set(load_file(file)) == set(load_file(folder / file.name))
        assert Shard.open(file).metadata == {"format": "pt"}
    assert loaded.keys() == expected.keys()
    assert all(same(loaded[name], expected[name]) for name in expected)
    assert json.loads((out / "config.json").read_text()) == {"model_type": "bert"}
    assert (out / "more" / "notes.txt").read_text() == "kept"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["dense"]
    if kind == "sharded":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert index["metadata"]["total_parameters"] == 2
        assert index["weight_map"] == json.loads(before["model.safetensors.index.json"])["weight_map"]
    with pytest.raises(ArtifactError, match="was not saved by sparsehooks"):
        inspect(out, codecs=codecs)


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("look", [inspect, verify])
def test_inspect_and_verify_tell_what_is_there(kind, look, request, codecs):
    folder = request.getfixturevalue(kind)
    seen = []
    found = look(folder, codecs=codecs, progress=lambda done, total: seen.append((done, total)))
    rows = {row.name: row for row in found.tensors}
    expected = state_dict()
    assert rows.keys() == expected.keys()
    for name, tensor in expected.items():
        row = rows[name]
        assert (row.shape, row.dense_bytes) == (tuple(tensor.shape), tensor.nbytes)
        assert row.zeros == int((tensor.float() == 0).sum())
        assert row.sparsity == row.zeros / max(1, tensor.numel())
        assert row.bits_per_weight == 8 * row.bytes / max(1, tensor.numel())
    codecs_of = {name: (row.positions, row.values) for name, row in rows.items() if row.values}
    gaps = ("gaps", "exponent")
    assert codecs_of == {"a.weight": gaps, "b.weight": gaps, "b.codes": (None, "grid")}
    assert rows["b.weight"].dtype == "BF16"
    assert rows["c.float8"].dtype == "F8_E4M3"
    totals = found.to_dict()["totals"]
    assert totals["tensors"] == len(expected)
    assert totals["parameters"] == sum(tensor.numel() for tensor in expected.values())
    assert totals["dense_bytes"] == sum(tensor.nbytes for tensor in expected.values())
    assert totals["ratio"] == totals["bytes"] / totals["dense_bytes"] < 0.5
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert seen[-1] == (totals["bytes"], totals["bytes"])
    assert seen == sorted(seen)


def test_tensors_are_read_one_at_a_time(sharded):
    folder = Folder.open(sharded)
    stored = {entry.name: shard.read(entry, 0, entry.length) for shard, entry in folder.entries()}
    assert {name for name, tensor in stored.items() if is_blob(tensor)} == {"a.weight", "b.weight", "b.codes"}
    assert same(stored["a.bias"], state_dict()["a.bias"])


def test_a_plain_module_is_known_by_its_blobs(tmp_path, codecs):
    folder = save(tmp_path / "module", {"model.safetensors": encoded(state_dict(), codecs)}, config=None)
    assert len(verify(folder, codecs=codecs).tensors) == 12
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(encoded(state_dict(), codecs), bare / "model.safetensors")
    assert len(inspect(bare, codecs=codecs).tensors) == 12
    with pytest.raises(ArtifactError, match="no checksums"):
        verify(bare, codecs=codecs)
    save_file({"w": torch.ones(3)}, bare / "model.safetensors")
    with pytest.raises(ArtifactError, match="was not saved by sparsehooks"):
        inspect(bare, codecs=codecs)


def test_the_checksums_of_the_whole_model_stand_in_every_shard(tmp_path, codecs):
    tensors = encoded(state_dict(), codecs)
    folder = tmp_path / "m"
    parts = {f"{part}.safetensors": {name: tensors[name] for name in list(tensors)[part::2]} for part in (0, 1)}
    save(folder, parts)
    verify(folder, codecs=codecs)
    for some in ({"0.safetensors"}, {"1.safetensors"}, set(parts)):
        for file in some:
            save_file(parts[file], folder / file, metadata=checksums(tensors | {"gone": torch.ones(1)}))
        message = "'gone', which no file holds" if some == set(parts) else "were not saved together"
        with pytest.raises(ArtifactError, match=message):
            verify(folder, codecs=codecs)
        save(folder, parts)
    save_file(parts["1.safetensors"], folder / "1.safetensors", metadata=checksums(parts["1.safetensors"]))
    with pytest.raises(ArtifactError, match=r"1.safetensors' and .*0.safetensors' were not saved together"):
        inspect(folder, codecs=codecs)
    fewer = checksums({name: tensors[name] for name in tensors if name != "c.ids"})
    for file, some in parts.items():
        save_file(some, folder / file, metadata=fewer)
    with pytest.raises(ArtifactError, match=r"tensor 'c.ids' does not match its checksum"):
        verify(folder, codecs=codecs)


def test_installed_codecs_are_the_default(single, tmp_path):
    assert inspect(single) == verify(single)
    decompress(single, tmp_path / "dense")


def test_a_missing_codec_is_named(single, codecs):
    fewer = {name: codec for name, codec in codecs.items() if name != "grid"}
    with pytest.raises(ArtifactError, match=r"model.safetensors': tensor 'b.codes': .*'grid'; install the plugin"):
        inspect(single, codecs=fewer)


def test_links_into_a_hugging_face_cache_are_followed(single, tmp_path, codecs):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (cache / "blobs" / f"hash-{name}").write_bytes((single / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    verify(snapshot, codecs=codecs)
    out = decompress(snapshot, tmp_path / "dense", codecs=codecs)
    assert not any(path.is_symlink() for path in out.iterdir())


# ------------------------------------------------------------------------------------------------- bad folders


def test_what_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="there is no folder"):
        inspect(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="holds no model"):
        inspect(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ArtifactError, match="not a file"):
        inspect(tmp_path)


def test_two_models_in_one_folder(sharded, single):
    (sharded / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="holds both"):
        inspect(sharded)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "x.bin", "..", "", 3, "\0.safetensors"]
)
def test_an_index_that_names_other_files(sharded, file):
    path = sharded / "model.safetensors.index.json"
    fields = json.loads(path.read_text())
    fields["weight_map"]["a.weight"] = file
    path.write_text(json.dumps(fields))
    (sharded.parent / "x.safetensors").write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=r"not a .safetensors file of this folder"):
        inspect(sharded)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_link_that_leaves_the_folder(sharded, name):
    outside = sharded.parent / "outside" / name
    outside.parent.mkdir()
    (sharded / name).rename(outside)
    (sharded / name).symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads out of its folder"):
        inspect(sharded)


def test_other_files_that_leave_the_folder_are_not_copied(single, tmp_path, codecs):
    (single / "vocab.txt").symlink_to("/etc/passwd")
    inspect(single, codecs=codecs)
    with pytest.raises(ArtifactError, match=r"vocab.txt' leads out of its folder"):
        decompress(single, tmp_path / "dense", codecs=codecs)
    (single / "vocab.txt").unlink()
    (single / "vocab.txt").symlink_to("vocab.txt")
    with pytest.raises(ArtifactError, match="not a file"):
        decompress(single, tmp_path / "dense", codecs=codecs)
    assert not (tmp_path / "dense").exists()


def test_an_index_that_disagrees_with_the_files(sharded):
    path = sharded / "model.safetensors.index.json"
    fields = json.loads(path.read_text())
    for change in (
        {"a.weight": "model-00002-of-00003.safetensors"},
        {"not.there": "model-00001-of-00003.safetensors"},
        {"a.weight": "model-00004-of-00003.safetensors"},
    ):
        path.write_text(json.dumps(fields | {"weight_map": fields["weight_map"] | change}))
        with pytest.raises(ArtifactError, match=r"disagree on tensor|is missing"):
            inspect(sharded)
    del fields["weight_map"]["c.ids"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match=r"disagree on tensor 'c.ids'"):
        inspect(sharded)
    for broken in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {}, "weight_map": {}}', "[" * 100_000, "{}"):
        path.write_text(broken)
        with pytest.raises(ArtifactError):
            inspect(sharded)


def test_swapped_files_and_swapped_tensors(sharded, codecs):
    first, second = (sharded / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(ArtifactError, match="disagree"):
        inspect(sharded, codecs=codecs)


def test_two_tensors_of_one_shape_that_change_places(tmp_path, codecs):
    tensors = encoded({"p": torch.eye(100), "q": torch.eye(100).flip(0)}, codecs)
    assert tensors["p"].shape == tensors["q"].shape
    folder = save(tmp_path / "m", {"model.safetensors": tensors})
    right = checksums(tensors)
    save_file({"p": tensors["q"], "q": tensors["p"]}, folder / "model.safetensors", metadata={"format": "pt", **right})
    inspect(folder, codecs=codecs)
    with pytest.raises(ArtifactError, match=r"tensor '[pq]' does not match its checksum"):
        verify(folder, codecs=codecs)


def test_any_flipped_bit_of_header_or_tensors_is_found(single, tmp_path, codecs):
    data = (single / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    harmless = data.index(b'"format":"pt"')  # the only text that nothing depends on
    positions = [*range(8 + length), *random.Random(0).sample(range(8 + length, len(data)), 300), len(data) - 1]
    for position in positions:
        if harmless <= position < harmless + len('"format":"pt"'):
            continue
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        (single / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ArtifactError):
            verify(single, codecs=codecs)


def test_truncated_and_extended_files(single):
    path = single / "model.safetensors"
    data = path.read_bytes()
    for other in (b"", data[:7], data[:8], data[:100], data[:-1], data + b"\0", b"\xff" * 8 + data[8:], b"PK" + data):
        path.write_bytes(other)
        with pytest.raises(ArtifactError):
            inspect(single)


def weights_file(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"[]",
        b"{" + b'"a":{' * 50_000,
        {"__metadata__": {"k": 1}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": 3},
        {"": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a\0": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"../a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
    ],
)
def test_headers_that_safetensors_should_not_have(tmp_path, header):
    with pytest.raises(ArtifactError, match=r"weights.safetensors"):
        Shard.open(weights_file(tmp_path / "weights.safetensors", header, b"\0\0\0\0"))


def test_headers_beyond_the_caps(tmp_path):
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", 17 << 20) + b"{" + b" " * (17 << 20))
    with pytest.raises(ArtifactError, match="truncated or not"):
        Shard.open(huge)
    empty = ",".join(f'"{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for index in range(200_001))
    with pytest.raises(ArtifactError, match="200001 tensors"):
        Shard.open(weights_file(tmp_path / "many.safetensors", f"{{{empty}}}".encode()))


def test_truth_values_are_zero_or_one(tmp_path):
    path = weights_file(
        tmp_path / "x.safetensors", {"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"
    )
    shard = Shard.open(path)
    with pytest.raises(ArtifactError, match="neither true nor false"):
        shard.read(shard.entries[0], 0, 2)


def test_a_file_that_shrinks_while_it_is_read(single):
    folder = Folder.open(single)
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="became shorter"):
        [shard.read(entry, 0, entry.length) for shard, entry in folder.entries()]


def test_no_file_stays_open(sharded):
    def opened():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    for _ in range(20):
        folder = Folder.open(sharded)
    assert opened() == before + 3
    del folder
    assert opened() == before


def test_a_folder_that_is_replaced_while_it_is_opened(single, monkeypatch):
    identity, calls, last = reading._identity, itertools.count(), 7
    monkeypatch.setattr(reading, "_identity", lambda root: (*identity(root), min(next(calls), last)))
    assert list(Folder.open(single).entries())
    assert next(calls) == last + 3
    calls, last = itertools.count(), 1000
    with pytest.raises(ArtifactError, match=f"'{single}' is changed all the time"):
        Folder.open(single)
    (single / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=f"'{single}' is changed all the time"):
        Folder.open(single)


def test_a_folder_that_is_replaced_while_it_is_decompressed(single, tmp_path, codecs):
    before = contents(tmp_path)

    def replace(done, total):
        if done == total:
            single.rename(tmp_path / "old")
            shutil.copytree(tmp_path / "old", single)

    with pytest.raises(ArtifactError, match=f"'{single}' was replaced while it was read; try again"):
        decompress(single, tmp_path / "dense", codecs=codecs, progress=replace)
    shutil.rmtree(tmp_path / "old")
    assert contents(tmp_path) == before


def test_a_shard_is_what_safetensors_writes(tmp_path):
    state = state_dict()
    names = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}
    some = {name: tensor for name, tensor in state.items() if tensor.dtype in names}
    contents = {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in sorted(some.items())}
    writer = ShardWriter(tmp_path / "ours.safetensors", contents, {"format": "pt"})
    writer.write(some.__getitem__)
    writer.finish({"format": "pt"})
    save_file(some, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    loaded = load_file(tmp_path / "ours.safetensors")
    assert all(same(loaded[name], some[name]) for name in some)
    ours, theirs = (Shard.open(tmp_path / f"{which}.safetensors") for which in ("ours", "theirs"))
    assert ours.metadata == theirs.metadata
    assert {(entry.name, entry.dtype, entry.shape, entry.length) for entry in ours.entries} == {
        (entry.name, entry.dtype, entry.shape, entry.length) for entry in theirs.entries
    }
    assert [entry.dtype for entry in ours.entries] == [entry.dtype for entry in theirs.entries]


def test_checksums_are_crc32_of_the_bytes():
    found = checksums({"a": torch.tensor([1.0, 2.0]).to(torch.bfloat16), "b": torch.ones(2, 3).t()})
    assert json.loads(found["sparsehooks.crc32"]) == {
        "a": zlib.crc32(bytes.fromhex("803f0040")),
        "b": zlib.crc32(bytes.fromhex("0000803f") * 6),
    }


# ------------------------------------------------------------------------------------------------- new folders


def test_a_folder_appears_whole_with_ordinary_permissions(tmp_path):
    out = tmp_path / "a" / "b"
    with new_folder(out) as temporary:
        save_file({"w": torch.ones(2)}, temporary / "model.safetensors")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("x")
        assert not out.parent.exists()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    assert (out / "sub" / "x").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error"), KeyError("k")])
@pytest.mark.parametrize("existing", [False, True])
def test_after_an_error_nothing_is_left(tmp_path, single, error, existing):
    out = single if existing else tmp_path / "a" / "b"
    (single / "more" / "notes.txt").unlink()
    (single / "more").rmdir()
    before = contents(tmp_path)
    expected = KeyError if isinstance(error, KeyError) else ArtifactError

    def fail():
        with new_folder(out) as temporary:
            (temporary / "half").write_text("half")
            raise error

    with pytest.raises(expected) as caught:
        fail()
    assert contents(tmp_path) == before
    if expected is ArtifactError:
        assert str(caught.value).startswith(f"cannot write '{out}': ")


def test_an_artifact_is_replaced_by_the_new_one(single, tmp_path, codecs):
    others = {name: data for name, data in contents(single).items() if "model" not in name and "config" not in name}
    assert others
    with new_folder(single) as temporary:
        (temporary / "model.safetensors").write_bytes(b"new")
    assert contents(single) == {"model.safetensors": b"new", **others}
    assert [path.name for path in tmp_path.iterdir()] == ["single"]


def test_what_else_lies_in_a_replaced_folder_is_not_touched(single, tmp_path):
    (single / "private.log").write_text("begun")
    (single / "private.log").chmod(0o640)
    (single / "link").symlink_to("nowhere")
    (single / "more" / "link").symlink_to("..")
    kept = ["private.log", "tokenizer.json", "more/notes.txt"]
    before = {name: (single / name).stat() for name in kept}
    with (single / "private.log").open("a") as log:
        with new_folder(single) as temporary:
            (temporary / "model.safetensors").write_bytes(b"new")
            (temporary / "tokenizer.json").write_text("new")
        log.write(" and ended")
    assert (single / "private.log").read_text() == "begun and ended"
    assert (single / "tokenizer.json").read_text() == "new"
    assert (single / "link").readlink() == Path("nowhere")
    assert (single / "more" / "link").readlink() == Path("..")
    for name in ("private.log", "more/notes.txt"):
        after = (single / name).stat()
        assert (after.st_ino, after.st_mode) == (before[name].st_ino, before[name].st_mode)
    assert not (single / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["single"]


@pytest.mark.parametrize("missing", ["exchange", "links", "both"])
def test_file_systems_that_can_do_less(single, tmp_path, monkeypatch, missing):
    def refuse(*arguments, **options):
        raise OSError(95, "Operation not supported")

    if missing != "links":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    if missing != "exchange":
        monkeypatch.setattr(os, "link", refuse)
    others = {name: data for name, data in contents(single).items() if "model" not in name and "config" not in name}
    for text in (b"new", b"newer"):
        with new_folder(single) as temporary:
            save_file(encoded(state_dict(), installed_codecs()), temporary / "model.safetensors")
            (temporary / "which").write_bytes(text)
        assert contents(single).keys() == {"model.safetensors", "which", *others}
        assert others.items() <= contents(single).items()
        assert (single / "which").read_bytes() == text
        assert [path.name for path in tmp_path.iterdir()] == ["single"]


def test_a_folder_that_cannot_move_leaves_the_old_one(single, tmp_path, monkeypatch):
    rename = Path.rename

    def refuse(self, target):
        if self.suffix == ".tmp":
            raise PermissionError(13, "Permission denied", str(self), None, str(target))
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", refuse)
    before = contents(tmp_path)
    for out in (single, tmp_path / "other"):
        message = f"cannot write '{out}': Permission denied; nothing was changed"
        with pytest.raises(ArtifactError, match=message), new_folder(out) as temporary:
            (temporary / "model.safetensors").write_bytes(b"new")
        assert contents(tmp_path) == before


def test_what_appears_while_a_folder_is_replaced_stays(single, monkeypatch):
    exchange = atomic._exchange

    def late(first, second):
        (second / "late.txt").write_text("late")
        return exchange(first, second)

    monkeypatch.setattr(atomic, "_exchange", late)
    with new_folder(single) as temporary:
        (temporary / "model.safetensors").write_bytes(b"new")
    assert (single / "late.txt").read_text() == "late"
    assert (single / "model.safetensors").read_bytes() == b"new"


def test_what_killed_runs_left_is_removed(single, tmp_path):
    def leave(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
        return name

    leave(".single.0123abcd.tmp")
    leave(".single.ffffffff.tmp")
    locked = leave(".single.00000000.tmp")
    kept = {
        leave(name) for name in (".single.notes.tmp", ".other.0123abcd.tmp", ".single.0123abcd.old", "0123abcd.tmp")
    }
    (tmp_path / ".single.11111111.tmp").write_text("a file")
    (tmp_path / ".single.22222222.tmp").symlink_to(locked)
    kept |= {".single.11111111.tmp", ".single.22222222.tmp", "single"}
    running = os.open(tmp_path / locked, os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)

    def fill(folder, value):
        tensors = {"w": torch.tensor(value)}
        save_file(tensors, folder / "model.safetensors", metadata=checksums(tensors))

    with new_folder(single) as first:
        fill(first, 1)
        assert {path.name for path in tmp_path.iterdir()} == kept | {locked, first.name}
        with new_folder(single) as second:  # nobody removes the folder of a run that goes on
            fill(second, 2)
        assert load_state_dict(single) == {"w": 2}
    assert load_state_dict(single) == {"w": 1}
    os.close(running)
    with new_folder(single) as temporary:
        fill(temporary, 3)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path, single, codecs):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    decompress(single, tmp_path / "link", codecs=codecs)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()


def test_other_content_is_refused_and_untouched(tmp_path, single, codecs):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("f")
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="already holds other files; choose a new folder"), new_folder(other):
        pass
    late = tmp_path / "late"

    def appear():
        late.mkdir()
        (late / "thesis.tex").write_text("written meanwhile")

    with pytest.raises(ArtifactError, match="already holds other files"), new_folder(late):
        appear()
    (late / "thesis.tex").unlink()
    late.rmdir()
    with pytest.raises(ArtifactError, match="is a file; choose a new folder"), new_folder(file):
        pass
    for out in (other, single, file):
        with pytest.raises(ArtifactError, match="choose a new folder"):
            decompress(single, out, codecs=codecs)
    assert contents(tmp_path) == before


def refusals(*lines):
    """What the lines of a program say, of which each is refused; root may write everywhere, so it is no root here."""
    code = ["import ctypes, os, resource, torch", "from sparsehooks import ArtifactError, decompress, save_pretrained"]
    for line in lines:
        code += ["try:", f"    {line}", "except ArtifactError as error:", "    print(error)"]

    def without_privilege():
        import ctypes

        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE

    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=without_privilege,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_no_room(single, tmp_path):
    before = contents(tmp_path)
    out = tmp_path / "new" / "dense"
    lines = refusals(
        *(
            line
            for limit in (40_000, 2000)
            for line in (
                f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))",
                f"decompress({str(single)!r}, {str(out)!r})",
                f"save_pretrained(torch.nn.Linear(200, 200), {str(out)!r})",
                f"save_pretrained(torch.nn.Linear(200, 200), {str(single)!r})",
            )
        )
    )
    assert contents(tmp_path) == before
    assert [line.split(": ")[0] for line in lines] == 2 * [f"cannot write '{path}'" for path in (out, out, single)]
    assert all("File too large" in line and line.endswith("; nothing was changed") for line in lines)


def test_folders_that_cannot_be_written(single, tmp_path):
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    out = tmp_path / "new" / "dense"
    try:
        lines = refusals(
            f"decompress({str(single)!r}, {str(out)!r})",
            f"save_pretrained(torch.nn.Linear(2, 2), {str(out)!r})",
            f"save_pretrained(torch.nn.Linear(2, 2), {str(single)!r})",
        )
    finally:
        tmp_path.chmod(0o755)
    assert contents(tmp_path) == before
    assert lines == [f"cannot write '{path}': Permission denied; nothing was changed" for path in (out, out, single)]


def test_a_place_where_nothing_can_be_written(single, codecs):
    with pytest.raises(ArtifactError, match="cannot write '/proc/none/dense': "):
        decompress(single, "/proc/none/dense", codecs=codecs)


def test_a_damaged_artifact_leaves_no_dense_folder(single, tmp_path, codecs):
    path = single / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(b"\x89SPHK1") + 1000] ^= 1
    path.write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        decompress(single, tmp_path / "dense", codecs=codecs)
    assert contents(tmp_path) == before


def test_a_replacement_that_was_killed_between_its_steps_is_undone(tmp_path, monkeypatch):
    """Where folders cannot change places at once."""
    monkeypatch.setattr("sparsehooks.artifact.atomic._exchange", lambda first, second: False)
    save_pretrained(nn.Linear(64, 64), tmp_path / "model")
    before = contents(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.0123abcd.old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model"):
        raise RuntimeError
    assert contents(tmp_path / "model") == before
    save_pretrained(nn.Linear(64, 64), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_of_inner_folders_stay(tmp_path):
    save_pretrained(nn.Linear(64, 64), tmp_path / "model")
    (tmp_path / "model" / "inner").mkdir()
    (tmp_path / "model" / "inner" / "mine.txt").write_text("mine")
    (tmp_path / "model" / "inner" / "both.txt").write_text("old")
    with new_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "both.txt").write_text("new")
    assert (tmp_path / "model" / "inner" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "model" / "inner" / "both.txt").read_text() == "new"


def test_what_cannot_be_moved_is_not_lost(tmp_path, monkeypatch):
    save_pretrained(nn.Linear(64, 64), tmp_path / "model")

    def full(old, new, place):
        if place is os.rename:
            raise OSError(28, "No space left on device", str(new))

    monkeypatch.setattr("sparsehooks.artifact.atomic._keep_others", full)
    with pytest.raises(ArtifactError, match="is written, but other files of the old folder are still in"):
        save_pretrained(nn.Linear(64, 64), tmp_path / "model")
    monkeypatch.undo()
    for _ in range(2):
        assert len(list(tmp_path.glob(".model.*.kept"))) == 1
        assert len(list(tmp_path.iterdir())) == 2
        save_pretrained(nn.Linear(64, 64), tmp_path / "model")


def test_decompress_compares_checksums(tmp_path):
    save_pretrained(nn.Linear(64, 64), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        decompress(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- other processes


def rewrite(folder, which):
    """Save a model of two files that all say which one it is."""
    shards = {
        "model-00001-of-00002.safetensors": {"a.weight": which * torch.eye(200), "a.bias": torch.tensor([which])},
        "model-00002-of-00002.safetensors": {"b.weight": which * torch.eye(100), "b.bias": torch.tensor([which])},
    }
    codecs = installed_codecs()
    with new_folder(folder) as temporary:
        tensors = {file: encoded(some, codecs) for file, some in shards.items()}
        save(temporary, tensors, config=CONFIG | {"which": which})


def look(folder):
    """Which model lies there, whole, with the file that a user put beside it."""
    opened, codecs = Folder.open(folder), installed_codecs()
    tensors = [Stored(shard, entry, codecs).tensor() for shard, entry in opened.entries()]
    assert [int(tensor.max()) for tensor in tensors] == [opened.config["which"]] * 4
    again = load_state_dict(folder)  # perhaps the next model
    assert len(again) == 4
    assert len({int(tensor.max()) for tensor in again.values()}) == 1
    assert len(verify(folder).tensors) == 4
    assert (folder / "mine.txt").read_text() == "mine"
    return opened.config["which"]


def forked(action):
    """Another process that does something and ends."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except Exception:  # noqa: BLE001 - a failed assertion, for example
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def begin(root):
    folder = root / "model"
    rewrite(folder, 1)
    (folder / "mine.txt").write_text("mine")
    return folder


def kill_at_random_points(root):
    folder, counts = begin(root), Counter()
    started = time.monotonic()
    os.waitpid(forked(lambda: rewrite(folder, 2)), 0)
    duration = time.monotonic() - started
    for point in range(20):
        before = look(folder)
        process = forked(lambda wanted=3 - before: rewrite(folder, wanted))
        time.sleep(random.Random(point).uniform(0, duration))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        counts["old" if look(folder) == before else "new"] += 1
    return folder, counts


def kill_at_every_line(root):
    """Of the module that moves folders."""
    folder, counts = begin(root), Counter()
    point, status = 0, signal.SIGKILL
    while os.WIFSIGNALED(status):
        point, before, seen = point + 1, look(folder), set()

        def trace(frame, event, _, seen=seen, point=point):
            if frame.f_code.co_filename != atomic.__file__:
                return None
            if event == "line":
                seen.add(frame.f_lineno)
                if len(seen) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        def traced(wanted=3 - before, trace=trace):
            sys.settrace(trace)
            rewrite(folder, wanted)

        _, status = os.waitpid(forked(traced), 0)
        counts["old" if look(folder) == before else "new"] += 1
    return folder, counts


def read_meanwhile(root):
    folder, counts = begin(root), Counter()

    def read(number):
        seen = Counter()
        while not (root / "stop").exists():
            seen[str(look(folder))] += 1
        (root / f"seen{number}").write_text(json.dumps(seen))

    readers = [forked(lambda number=number: read(number)) for number in range(2)]
    for number in range(100):
        rewrite(folder, 1 + number % 2)
    (root / "stop").touch()
    for number, process in enumerate(readers):
        assert os.waitpid(process, 0)[1] == 0
        counts.update(json.loads((root / f"seen{number}").read_text()))
    for path in root.glob("s*"):
        path.unlink()
    return folder, counts


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places at once on Linux only")
@pytest.mark.parametrize("what", ["kill_at_random_points", "kill_at_every_line", "read_meanwhile"])
def test_what_others_see_is_the_old_folder_or_the_new_one(what, tmp_path):
    command = [sys.executable, __file__, what, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    counts = json.loads(ran.stdout)
    assert min(counts.values()) > (10 if what == "read_meanwhile" else 0)
    assert len(counts) == 2 or what == "kill_at_random_points"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


if __name__ == "__main__":
    model, seen = globals()[sys.argv[1]](Path(sys.argv[2]))
    rewrite(model, 3)  # removes what killed runs left
    assert look(model) == 3
    print(json.dumps(seen))
