"""Saved folders: read strictly, verified to the bit, undone exactly, written whole or not at all."""

import json
import os
import random
import stat
import struct
import subprocess
import sys
import textwrap
import zlib

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsehooks import ArtifactError, from_codes, row_scales, to_codes
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
from sparsehooks.artifact.shards import Shard, write_shard

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
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt", **checksums(tensors)})
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
    assert codecs_of == {"a.weight": ("bitmap", "raw"), "b.weight": ("bitmap", "raw"), "b.codes": (None, "int8")}
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
    stored = {entry.name: shard.read(entry) for shard, entry in folder.entries()}
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


def test_checksums_of_the_whole_model_may_stand_in_every_shard(tmp_path, codecs):
    tensors = encoded(state_dict(), codecs)
    folder = tmp_path / "m"
    names = list(tensors)
    save(folder, {f"{part}.safetensors": {name: tensors[name] for name in names[part::2]} for part in (0, 1)})
    for part in (0, 1):
        some = {name: tensors[name] for name in names[part::2]}
        save_file(some, folder / f"{part}.safetensors", metadata=checksums(tensors))
    verify(folder, codecs=codecs)
    extra = checksums(tensors | {"gone": torch.ones(1)})
    save_file(some, folder / "1.safetensors", metadata=extra)
    with pytest.raises(ArtifactError, match="'gone', which no file holds"):
        verify(folder, codecs=codecs)


def test_installed_codecs_are_the_default(single, tmp_path):
    assert inspect(single) == verify(single)
    decompress(single, tmp_path / "dense")


def test_a_missing_codec_is_named(single, codecs):
    fewer = {name: codec for name, codec in codecs.items() if name != "int8"}
    with pytest.raises(ArtifactError, match=r"tensor 'b.codes': .*'int8'; install the plugin"):
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
        shard.read(shard.entries[0])


def test_a_file_that_shrinks_while_it_is_read(single):
    folder = Folder.open(single)
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="became shorter"):
        [shard.read(entry) for shard, entry in folder.entries()]


def test_write_shard_is_what_safetensors_writes(tmp_path):
    state = state_dict()
    names = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}
    some = {name: tensor for name, tensor in state.items() if tensor.dtype in names}
    contents = {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in sorted(some.items())}
    write_shard(tmp_path / "ours.safetensors", contents, some.__getitem__, {"format": "pt"})
    save_file(some, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    loaded = load_file(tmp_path / "ours.safetensors")
    assert all(same(loaded[name], some[name]) for name in some)
    ours, theirs = (Shard.open(tmp_path / f"{which}.safetensors") for which in ("ours", "theirs"))
    assert ours.entries == theirs.entries


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


@pytest.mark.parametrize("limit", [2000, 40_000])
def test_no_room(single, tmp_path, limit):
    code = f"""
        import resource, sys
        from sparsehooks import ArtifactError, decompress
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            decompress({str(single)!r}, {str(tmp_path / "new" / "dense")!r})
        except ArtifactError as error:
            print(error)
    """
    before = contents(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=100
    )
    assert ran.stdout == f"cannot write '{tmp_path / 'new' / 'dense'}': File too large; nothing was changed\n"
    assert contents(tmp_path) == before


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
