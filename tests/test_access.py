"""Weight files without transformers: tensor by tensor, by slices, as 2:4 pairs and for plain modules."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import pytest
import torch
from blob_helpers import bits, n_of_m, pruned, same_bits
from helpers import same_state, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets,
    sparse_semi_structured_from_dense_cutlass,
)

import sparsehooks
from sparsehooks import ArtifactError
from sparsehooks.artifact.blob import Blob
from sparsehooks.artifact.shards import Shard
from sparsehooks.components import LEVELS

TENSORS = {
    "matrix": pruned((300, 200), 0.9),
    "halves": pruned((300, 200), 0.6, torch.bfloat16, seed=1),
    "image": pruned((30, 8, 5, 5), 0.8, seed=2),
    "dense": pruned((64, 32), 0.0, seed=3),
    "bias": pruned((32,), 0.0, seed=4),
    "scalar": torch.tensor(7),
    "flags": torch.arange(6).view(2, 3) % 2 == 0,
    "empty": torch.zeros(0, 4),
}


class Tensors(nn.Module):
    """A plain module that holds some tensors."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.clone())


@pytest.fixture
def folder(tmp_path):
    return sparsehooks.save_pretrained(Tensors(TENSORS), tmp_path / "a")


@pytest.fixture
def read_bytes(monkeypatch):
    """The lengths of all that is read of tensors."""
    lengths, read = [], Shard.read_bytes

    def counting(self, entry, offset, length):
        data = read(self, entry, offset, length)
        lengths.append(len(data))
        return data

    monkeypatch.setattr(Shard, "read_bytes", counting)
    return lengths


def saved(tmp_path, tensor, level="balanced"):
    sparsehooks.save_pretrained(Tensors({"w": tensor}), tmp_path / "one", level=level)
    return sparsehooks.safe_open(tmp_path / "one")


# -------------------------------------------------------------------------------------------------- whole tensors


def test_a_file_and_a_folder_give_every_tensor(folder):
    stored = load_file(folder / "model.safetensors")
    assert {name for name in TENSORS if stored[name].dtype != TENSORS[name].dtype} == {"matrix", "halves", "image"}
    for path in (folder, folder / "model.safetensors", str(folder)):
        with sparsehooks.safe_open(path, framework="pt", device="cpu") as file:
            assert file.keys() == sorted(TENSORS)
            assert file.metadata() == {"format": "pt"}
            assert all(same_bits(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())


def test_a_file_that_somebody_else_wrote_opens_too(tmp_path):
    save_file(TENSORS, tmp_path / "plain.safetensors", metadata={"made": "by hand"})
    with sparsehooks.safe_open(tmp_path / "plain.safetensors") as file:
        assert file.metadata() == {"made": "by hand"}
        assert all(same_bits(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())


def test_a_sharded_folder_is_one_model(tmp_path):
    model = tiny_llama()
    sparsehooks.save_pretrained(model, tmp_path / "a", max_shard_size="20kB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    assert same_state(sparsehooks.load_state_dict(tmp_path / "a"), model)


def test_a_plain_module_takes_what_was_loaded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    sparsehooks.compress(model, {"stage": [{"prune": "magnitude", "sparsity": 0.9}]}, out=tmp_path / "a")
    other = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    other.load_state_dict(sparsehooks.load_state_dict(tmp_path / "a"))
    assert same_state(model, other)
    other.load_state_dict(sparsehooks.load_state_dict(tmp_path / "a" / "model.safetensors"))
    assert same_state(model, other)


def test_tensors_come_on_the_device_that_is_asked_for(folder):
    with sparsehooks.safe_open(folder, device="meta") as file:
        assert file.get_tensor("matrix").is_meta
        assert file.get_slice("bias")[2:].shape == (30,)
    assert all(tensor.is_meta for tensor in sparsehooks.load_state_dict(folder, torch.device("meta")).values())


# ---------------------------------------------------------------------------------------------------------- slices

INDICES = [
    (),
    ...,
    None,
    0,
    -1,
    299,
    slice(None),
    slice(10, 20),
    slice(20, 10),
    slice(-7, None),
    slice(5, 290, 17),
    slice(250, 9999),
    (3, 4),
    (slice(2, 9), 5),
    (slice(None, None, 3), slice(1, 100, 9)),
    (..., 7),
    (4, ...),
    (None, 4),
    (-300, slice(-5, None)),
    [1, 5, 299],
    (slice(3, 6), [0, 1]),
    torch.tensor([2, 4]),
    torch.arange(300) % 7 == 0,
]


@pytest.mark.parametrize("name", ["matrix", "halves"])
def test_a_slice_is_that_of_the_tensor(folder, name):
    with sparsehooks.safe_open(folder) as file:
        part = file.get_slice(name)
        assert part.get_shape() == [300, 200]
        assert part.get_dtype() == {"matrix": "F32", "halves": "BF16"}[name]
        for index in INDICES:
            assert same_bits(part[index], TENSORS[name][index])


def test_slices_are_those_of_safetensors(folder, tmp_path):
    save_file(TENSORS, tmp_path / "plain.safetensors")
    with sparsehooks.safe_open(folder) as ours, safe_open(tmp_path / "plain.safetensors", "pt") as theirs:
        for name in ("matrix", "image", "dense", "bias", "flags"):
            first, second = ours.get_slice(name), theirs.get_slice(name)
            assert first.get_shape() == second.get_shape()
            assert first.get_dtype() == second.get_dtype()
            for index in (0, slice(1, 2), slice(None, None, 2), slice(0, 0), ...):
                assert same_bits(first[index], second[index])
        assert same_bits(ours.get_slice("image")[2:9:2, 1, :, 3:], theirs.get_slice("image")[2:9:2, 1, :, 3:])


def test_a_wrong_index_is_an_error_as_for_tensors(folder):
    with sparsehooks.safe_open(folder) as file:
        for name, index in (("matrix", 300), ("matrix", -301), ("bias", (0, 0)), ("scalar", 0), ("matrix", (0, 0, 0))):
            with pytest.raises(IndexError):
                file.get_slice(name)[index]
        assert file.get_slice("scalar")[()] == file.get_slice("scalar")[...] == 7
        for index in (slice(None, None, -1), slice(None, None, 0)):
            with pytest.raises(ValueError, match="step"):
                file.get_slice("matrix")[index]


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_few_rows_of_a_large_tensor_read_a_few_bytes(tmp_path, read_bytes, sparsity):
    tensor = pruned((4000, 1000), sparsity)
    with saved(tmp_path, tensor) as file:
        part = file.get_slice("w")
        read_bytes.clear()
        assert same_bits(part[1234:1238], tensor[1234:1238])
        stored = (tmp_path / "one" / "model.safetensors").stat().st_size
        assert sum(read_bytes) < stored / 10
        read_bytes.clear()
        assert same_bits(part[-1, 5:], tensor[-1, 5:])
        assert sum(read_bytes) < stored / 10
        file.get_tensor("w")
        assert sum(read_bytes) > stored / 2


# ------------------------------------------------------------------------------------------------------------ 2:4


def two_of_four(tensor):
    """The values and the positions of each group, one at a time."""
    flat = bits(tensor).view(-1, 4).tolist()
    values, nibbles = [], []
    for group in flat:
        places = [place for place, value in enumerate(group) if value]
        free = [place for place in (2, 3, 1, 0) if place not in places]
        first, second = sorted((places + free)[:2])
        values += [group[first], group[second]]
        nibbles.append(first | second << 2)
    packed = torch.tensor(nibbles, dtype=torch.uint8).view(len(tensor), -1)
    values = torch.tensor(values, dtype=torch.int64).to(bits(tensor).dtype)
    return values.view(len(tensor), -1).view(tensor.dtype), packed[:, 0::2] | packed[:, 1::2] << 4


def expanded(values, places):
    nibbles = torch.stack([places & 15, places >> 4], -1).view(len(places), -1)
    positions = torch.stack([nibbles & 3, nibbles >> 2], -1).long() + 4 * torch.arange(nibbles.shape[1])[None, :, None]
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}[values.itemsize]
    dense = torch.zeros(len(values), 2 * values.shape[1], dtype=signed)
    return dense.scatter_(1, positions.view(len(values), -1), values.view(signed)).view(values.dtype)


def pruned_2_4(shape, dtype, missing=0.0, seed=0):
    """2:4 sparsity, with some more zeros if asked for, and bits that are no ordinary numbers."""
    if dtype is torch.int8:
        return (n_of_m(shape, 2, 4, seed=seed, missing=missing) * 50).round().clamp(-127, 127).to(torch.int8)
    weight = n_of_m(shape, 2, 4, dtype, seed=seed, missing=missing)
    row = weight[0].nonzero()[:3, 0].tolist()
    weight[0, row] = torch.tensor([float("nan"), float("inf"), 1e-7]).to(dtype)
    return weight


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("missing", [0.0, 0.02, 0.6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float32], ids=str)
def test_2_4_pairs_are_those_of_a_loop_over_the_groups(tmp_path, dtype, missing, level):
    tensor = pruned_2_4((96, 256), dtype, missing)
    with saved(tmp_path, tensor, level) as file:
        values, places = file.get_semi_structured("w")
    assert (values.shape, places.shape) == ((96, 128), (96, 32))
    expected = two_of_four(tensor)
    assert same_bits(values, expected[0])
    assert torch.equal(places, expected[1])
    assert same_bits(expanded(values, places), tensor)


@pytest.mark.parametrize("missing", [0.0, 0.02, 0.6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_2_4_pairs_are_those_of_torch(tmp_path, dtype, missing):
    tensor = pruned_2_4((96, 256), dtype, missing)
    with saved(tmp_path, tensor) as file:
        values, places = file.get_semi_structured("w")
    packed, reordered = sparse_semi_structured_from_dense_cutlass(tensor)
    meta = places.view(reordered.dtype)  # nibbles side by side
    offsets = _calculate_meta_reordering_scatter_offsets(*meta.shape, meta.dtype, "cpu")
    assert same_bits(values, packed)
    assert torch.equal(
        torch.empty_like(meta).view(-1).scatter_(0, offsets, meta.reshape(-1)).view(meta.shape), reordered
    )


def test_2_4_pairs_are_made_without_the_dense_tensor(tmp_path, monkeypatch):
    tensor = pruned_2_4((2000, 4096), torch.float32)
    with saved(tmp_path, tensor) as file:
        monkeypatch.setattr(Blob, "rows", None)
        tracemalloc.start()
        try:
            values, places = file.get_semi_structured("w")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < values.nbytes + places.nbytes + tensor.nbytes
    assert same_bits(expanded(values, places), tensor)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (n_of_m((96, 256), 3, 8), "has a group of four with more than two values; it is not 2:4$"),
        (pruned((96, 256), 0.5), "it is not 2:4$"),
        (pruned((96, 256), 0.2), "it is not 2:4$"),
        (pruned((32, 32), 0.0), "is stored plain; it has no 2:4 form$"),
        (n_of_m((96, 252), 2, 4), "has no rows of whole pairs of groups$"),
        (n_of_m((96, 8, 32), 2, 4), "has no rows of whole pairs of groups$"),
    ],
)
def test_what_is_not_2_4_is_refused(tmp_path, tensor, message):
    with saved(tmp_path, tensor) as file, pytest.raises(ArtifactError, match=message):
        file.get_semi_structured("w")


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["matrix", "dense"])
def test_a_damaged_tensor_is_one_sentence(folder, name):
    path = folder / "model.safetensors"
    entry = next(entry for entry in Shard.open(path).entries if entry.name == name)
    whole = path.read_bytes()
    for at in (entry.offset, entry.offset + entry.length // 2, entry.offset + entry.length - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with sparsehooks.safe_open(path) as file:
            for other in TENSORS.keys() - {name}:
                file.get_tensor(other)
            with pytest.raises(ArtifactError, match=f"model.safetensors' is damaged: tensor '{name}'") as raised:
                file.get_tensor(name)
            assert "\n" not in str(raised.value)
        with pytest.raises(ArtifactError, match="is damaged"):
            sparsehooks.load_state_dict(path)


def test_a_slice_of_a_damaged_tensor_is_one_sentence(folder):
    path = folder / "model.safetensors"
    entry = next(entry for entry in Shard.open(path).entries if entry.name == "matrix")
    whole = path.read_bytes()
    at = entry.offset + entry.length - 1
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with (
        sparsehooks.safe_open(path) as file,
        pytest.raises(ArtifactError, match="tensor 'matrix': the file is damaged"),
    ):
        file.get_slice("matrix")[-1]


def test_errors_say_what_is_there(folder, tmp_path):
    with sparsehooks.safe_open(folder) as file:
        for get in (file.get_tensor, file.get_slice, file.get_semi_structured):
            with pytest.raises(ArtifactError, match=r"holds no tensor 'matrx'.*'matrix'"):
                get("matrx")
    with pytest.raises(ArtifactError, match="framework 'tf' is not offered; use 'pt'"):
        sparsehooks.safe_open(folder, "tf")
    with pytest.raises(ArtifactError, match="cannot read"):
        sparsehooks.safe_open(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="cannot read"):
        sparsehooks.load_state_dict(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("not a weight file")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        sparsehooks.safe_open(tmp_path / "text.safetensors")


def test_transformers_is_not_needed(folder):
    code = f"""import sys, sparsehooks
sys.modules["transformers"] = None
state = sparsehooks.load_state_dict({str(folder)!r})
with sparsehooks.safe_open({str(folder)!r}) as file:
    assert file.get_slice("matrix")[3].equal(state["matrix"][3])
print(sorted(name for name in sys.modules if name.split(".")[0] in ("transformers", "accelerate")))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.stdout.strip() == "['transformers']", done.stderr


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(ArtifactError, match="takes a module, not a dict"):
        sparsehooks.save_pretrained({}, tmp_path / "out")
    with pytest.raises(ArtifactError, match="without option 'signed_zero'"):
        sparsehooks.save_pretrained(torch.nn.Linear(8, 8), tmp_path / "out", signed_zero=True)
    with pytest.raises(ArtifactError, match=r"there is no level 'smal'; did you mean 'small'\?"):
        sparsehooks.save_pretrained(torch.nn.Linear(8, 8), tmp_path / "out", level="smal")
    assert not (tmp_path / "out").exists()
