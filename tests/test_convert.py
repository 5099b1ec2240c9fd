"""Models that are there already become artifacts, from whatever form, bit for bit or with one sentence."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import copied, linear_weights, same_state, tiny_bert, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_folder import contents, same, weights_file
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModel, AutoModelForCausalLM

from sparsehooks import ArtifactError, convert, decompress, inspect, save_pretrained, verify
from sparsehooks.artifact.container import encode
from sparsehooks.artifact.folder import installed_codecs
from sparsehooks.artifact.shards import CHECKSUMS, Shard, ShardWriter
from sparsehooks.artifact.stored import holds_blob
from sparsehooks.cli import main

DATA = Path(__file__).parent / "data"
PEERS = ("bitmask", "bitmask24", "bitmask_ct081", "bitmask_ct060")


def sparse_llama(**options):
    """A causal language model of which 80 % of the matrices are zeros, some of them negative."""
    model = tiny_llama(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape) < 0.8] = 0
    return model


def dense(folder, tmp_path):
    """The tensors that an artifact stands for."""
    shutil.rmtree(tmp_path / "decompressed", ignore_errors=True)
    loaded = {}
    for file in sorted(decompress(folder, tmp_path / "decompressed").glob("*.safetensors")):
        loaded |= load_file(file)
    return loaded


def write(folder, tensors, config=None):
    """A folder with ``model.safetensors`` or, of more than one file, with an index."""
    folder.mkdir(exist_ok=True)
    shards = tensors if all(isinstance(value, dict) for value in tensors.values()) else {"model.safetensors": tensors}
    for file, some in shards.items():
        if file.endswith(".bin"):
            torch.save(some, folder / file)
        else:
            save_file(some, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        name = "pytorch_model.bin" if file.endswith(".bin") else "model.safetensors"
        weight_map = {key: file for file, some in shards.items() for key in some}
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"more": 1}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def halves(state, pattern):
    names = sorted(state)
    return {pattern.format(number): {name: state[name] for name in names[number - 1 :: 2]} for number in (1, 2)}


def refused(source, out, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        convert(source, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".*.tmp"))


# ------------------------------------------------------------------------------------------------- dense models


def as_safetensors(model, folder):
    model.save_pretrained(folder)


def as_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_bin(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_legacy_bin(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_bin_shards(model, folder):
    model.config.save_pretrained(folder)
    write(folder, halves(copied(model), "pytorch_model-0000{}-of-00002.bin"))


def as_artifact(model, folder):
    save_pretrained(model, folder)


FORMS = (as_safetensors, as_shards, as_bin, as_legacy_bin, as_bin_shards, as_artifact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_any_form_opens_bit_for_bit(form, dtype, tmp_path):
    model = sparse_llama(dtype=dtype)
    source = tmp_path / "source"
    form(model, source)
    (source / "tokenizer.json").write_text("{}")
    (source / "training_args.bin").write_bytes(b"pickle")
    before, seen = contents(source), []
    out = convert(source, tmp_path / "x" / "out", progress=lambda done, total: seen.append((done, total)))
    assert out == tmp_path / "x" / "out"
    assert contents(source) == before
    assert same_state(AutoModelForCausalLM.from_pretrained(out), model)
    found = verify(out)
    assert found.bytes < found.dense_bytes / 2
    assert found.dense_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert seen == sorted(seen)
    assert seen[-1] == (found.dense_bytes, found.dense_bytes)
    weights = sorted(file.name for file in out.glob("*.safetensors"))
    others = {file.name for file in out.iterdir()} - {*weights, "generation_config.json"}
    if form in {as_shards, as_bin_shards}:
        assert weights == [f"model-{i:05}-of-{len(weights):05}.safetensors" for i in range(1, len(weights) + 1)]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == found.bytes
        assert len(index["metadata"]) == 2
        assert index["weight_map"] == {row.name: row.file for row in found.tensors}
        assert others == {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    else:
        assert weights == ["model.safetensors"]
        assert others == {"config.json", "tokenizer.json"}
    files = [Shard.open(out / name) for name in weights]
    assert {file.metadata[CHECKSUMS] for file in files} == {files[0].metadata[CHECKSUMS]}
    assert files[0].checksums().keys() == {row.name for row in found.tensors}


@pytest.mark.parametrize("size", ["60KB", "1GB"])
def test_the_same_as_save_pretrained_writes(tmp_path, size):
    model = sparse_llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size=size)
    ours, theirs = convert(tmp_path / "dense", tmp_path / "ours"), save_pretrained(model, tmp_path / "theirs")
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    (whole,) = [Shard.open(theirs / "model.safetensors")]
    stored = {entry.name: whole.read_bytes(entry, 0, entry.length) for entry in whole.entries}
    for file in ours.glob("*.safetensors"):
        shard = Shard.open(file)
        assert all(shard.read_bytes(entry, 0, entry.length) == stored[entry.name] for entry in shard.entries)
        assert shard.checksums() == whole.checksums()
        assert shard.metadata.keys() == whole.metadata.keys()


@pytest.mark.parametrize("form", [as_safetensors, as_bin])
def test_tied_weights(form, tmp_path):
    model = sparse_llama(tied=True)
    form(model, tmp_path / "dense")
    out = convert(tmp_path / "dense", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert same_state(loaded, model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert ("lm_head.weight" in {row.name for row in inspect(out).tensors}) == (form is as_bin)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights.pt", "weights.pth"])
def test_one_file_is_a_model(name, tmp_path):
    state = copied(sparse_llama())
    state["scalar"], state["empty"], state["flags"] = torch.tensor(2.5), torch.zeros(0, 3), torch.eye(80).bool()
    state["nested.float8"] = torch.eye(80).to(torch.float8_e4m3fn)
    (tmp_path / "readme.txt").write_text("not a part of it")
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    out = convert(tmp_path / name, tmp_path / "out")
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]
    assert same_state(dense(out, tmp_path), state)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)


def test_levels(tmp_path):
    weight = torch.randn(500, 300)
    weight[torch.rand(500, 300) < 0.9] = 0
    write(tmp_path / "dense", {"w": weight, "b": torch.randn(500)})
    sizes = []
    for level in ("fast", "balanced", "small"):
        out = convert(tmp_path / "dense", tmp_path / level, level=level)
        assert same(dense(out, tmp_path)["w"], weight)
        sizes.append(inspect(out).bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1]
    with pytest.raises(ArtifactError, match="there is no level 'smal'; did you mean 'small'"):
        convert(tmp_path / "dense", tmp_path / "x", level="smal")


def test_negative_zeros(tmp_path):
    weight = torch.randn(100, 300)
    weight = weight * (torch.rand(100, 300) < 0.2)
    assert torch.signbit(weight[weight == 0]).any()
    state = {"w": weight, "small": torch.tensor([[-0.0, 1.0]])}
    write(tmp_path / "dense", state)
    found = dense(convert(tmp_path / "dense", tmp_path / "plain"), tmp_path)
    assert same(found["w"], weight + 0.0)
    assert same(found["small"], state["small"])
    out = convert(tmp_path / "dense", tmp_path / "signed", signed_zeros=True)
    assert same_state(dense(out, tmp_path), state)
    assert inspect(out).bytes > inspect(tmp_path / "plain").bytes


def test_what_is_copied(tmp_path):
    source = write(tmp_path / "dense", {"w": torch.eye(100)}, {"model_type": "bert"})
    for name in (
        "README.md",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        ".gitattributes",
        ".git/objects/a",
        "checkpoint-5/optimizer.pt",
        "checkpoint-5/config.json",
        "sparsehooks-start/model.safetensors",
        "optimizer.pt",
        "tf_model.h5",
        "flax_model.msgpack.index.json",
        "pytorch_model.bin",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out = convert(source, tmp_path / "out")
    copies = {"README.md", "1_Pooling/config.json", "2_Dense/model.safetensors", ".gitattributes"}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == copies | {"config.json", "model.safetensors"}
    assert all((out / name).read_text() == name for name in copies)


def test_a_snapshot_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    source = write(tmp_path / "dense", {"w": torch.eye(100)}, {"model_type": "bert"})
    for file in source.iterdir():
        (blobs / f"hash-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    out = convert(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.iterdir())
    assert same(dense(out, tmp_path)["w"], torch.eye(100))
    (snapshot / "vocab.txt").symlink_to("/etc/passwd")
    refused(snapshot, tmp_path / "again", r"vocab.txt' leads out of its folder")


# ------------------------------------------------------------------------------------------------- bad folders


def test_what_is_no_model(tmp_path):
    refused(tmp_path / "missing", tmp_path / "out", "there is no folder or file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "holds no model: there is neither model.safetensors nor")
    (tmp_path / "weights.h5").write_text("x")
    refused(tmp_path / "weights.h5", tmp_path / "out", r"is neither a .safetensors file nor one of .bin, .pt, .pth")
    for single in ("model.safetensors", "pytorch_model.bin"):
        both = tmp_path / single.replace(".", "_")
        both.mkdir()
        (both / single).write_text("x")
        (both / f"{single}.index.json").write_text("{}")
        refused(both, tmp_path / "out", f"holds both {single} and {single}.index.json")
    (tmp_path / "damaged.safetensors").write_text("x" * 100)
    refused(tmp_path / "damaged.safetensors", tmp_path / "out", "truncated or not a safetensors file")
    weights_file(tmp_path / "dims.safetensors", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234")
    refused(tmp_path / "dims.safetensors", tmp_path / "out", "another size than its shape says")


@pytest.mark.parametrize("pattern", ["model-0000{}.safetensors", "pytorch_model-0000{}.bin"])
def test_an_index_that_is_wrong(tmp_path, pattern):
    state = {"a": torch.eye(50), "b": torch.eye(60), "c": torch.eye(70)}
    source = write(tmp_path / "dense", halves(state, pattern))
    assert same_state(dense(convert(source, tmp_path / "good"), tmp_path), state)
    (path,) = source.glob("*.index.json")
    right, first, second = path.read_text(), pattern.format(1), pattern.format(2)
    weight_map = json.loads(right)["weight_map"]
    outside = tmp_path / f"x.{pattern.rpartition('.')[2]}"
    outside.write_bytes((source / first).read_bytes())
    for change, message in (
        ({"a": f"../{outside.name}"}, "which is not a .* file of this folder"),
        ({"a": str(outside)}, "which is not a .* file of this folder"),
        ({"a": "x.exe"}, "which is not a .* file of this folder"),
        ({"a": 3}, "which is not a .* file of this folder"),
        ({"a": second}, "disagree on tensor"),
        ({"d": first}, "disagree on tensor 'd'"),
        ({"a": pattern.format(3)}, "is missing or not a file|disagree"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map | change}))
        refused(source, tmp_path / "out", message)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"a": 1, "a": 2}'):
        path.write_text(text)
        refused(source, tmp_path / "out", "is damaged|has no weight_map|key twice")
    path.write_text(json.dumps({"weight_map": {name: file for name, file in weight_map.items() if name != "c"}}))
    refused(source, tmp_path / "out", "disagree on tensor 'c'")
    path.write_text(right)
    (source / second).rename(tmp_path / "away")
    refused(source, tmp_path / "out", "is missing or not a file")
    (source / second).symlink_to(tmp_path / "away")
    refused(source, tmp_path / "out", "leads out of its folder")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "is quantized with 'gptq'"),
        ("quantization_config", {"load_in_8bit": True, "quant_method": "bitsandbytes"}, "with 'bitsandbytes'"),
        ("quantization_config", {"quant_method": ["x"]}, "is quantized with"),
        (
            "quantization_config",
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}, "format": "pack-quantized"},
            "takes only the sparse formats of compressed-tensors",
        ),
        (
            "compression_config",
            {"config_groups": {"group_0": {}}, "sparsity_config": {"format": "sparse-bitmask"}},
            "takes only the sparse formats",
        ),
        ("compression_config", {"kv_cache_scheme": {"num_bits": 8}}, "takes only the sparse formats"),
        ("compression_config", {"sparsity_config": {"format": "marlin-24"}}, "sparse format 'marlin-24' is not known"),
        ("compression_config", {"sparsity_config": {"format": ["sparse-bitmask"]}}, "is not known"),
        ("compression_config", {"sparsity_config": "sparse-bitmask, made up"}, "is not known"),
        ("compression_config", 3, "compression_config is not a table"),
        ("quantization_config", ["sparsehooks"], "quantization_config is not a table"),
        ("quantization_config", {"load_in_8bit": True}, "is quantized with 'an unknown method'"),
        ("compression_config", {"transform_config": {"config_groups": {"R1": {}}}}, "takes only the sparse formats"),
        ("quantization_config", {"quant_method": "sparsehooks", "version": "9"}, "format version '9' is not known"),
        ("quantization_config", {"quant_method": "sparsehooks", "pruned": 3}, "quantization_config is damaged"),
        ("quantization_config", {"quant_method": "sparsehooks", "self": 3}, "quantization_config is damaged"),
    ],
)
def test_what_the_config_says_of_other_forms(tmp_path, key, value, message):
    source = write(tmp_path / "dense", {"w": torch.eye(100)}, {"model_type": "bert", key: value})
    refused(source, tmp_path / "out", message)


def test_a_config_that_says_nothing_of_it(tmp_path):
    config = {"model_type": "bert", "quantization_config": None, "compression_config": {"sparsity_config": {}}}
    out = convert(write(tmp_path / "dense", {"w": torch.eye(100)}, config), tmp_path / "out")
    found = json.loads((out / "config.json").read_text())
    assert found.keys() == {"model_type", "quantization_config"}
    assert found["quantization_config"]["quant_method"] == "sparsehooks"


@pytest.mark.parametrize("shape", [[2], [1, 2]])
def test_truth_values_are_zero_or_one(shape, tmp_path):
    weights_file(tmp_path / "x.safetensors", {"a": {"dtype": "BOOL", "shape": shape, "data_offsets": [0, 2]}}, b"\1\2")
    refused(tmp_path / "x.safetensors", tmp_path / "out", "neither true nor false")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    source = write(tmp_path / "dense", {"w": torch.eye(100)})
    (source / "notes.txt").write_text("x")
    original = Path.open

    def opened(path, *arguments, **options):
        if path.name == "notes.txt" and path.parent == source:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    refused(source, tmp_path / "out", r"cannot read '.*notes.txt': Permission denied")


# ------------------------------------------------------------------------------------------------- torch.save


class Hostile:
    """Leaves a trace when it is unpickled."""

    def __init__(self, function, *arguments):
        self.pickled = function, arguments

    def __reduce__(self):
        return self.pickled


def test_a_pickled_object_is_refused_and_not_made(tmp_path):
    for legacy in (False, True):
        torch.save(
            {"w": torch.eye(100), "x": Hostile(os.mkdir, str(tmp_path / "trace"))},
            tmp_path / "weights.bin",
            _use_new_zipfile_serialization=not legacy,
        )
        refused(tmp_path / "weights.bin", tmp_path / "out", "is damaged, or holds other objects than tensors")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([torch.ones(3)], "does not hold a dict of tensors"),
        (torch.ones(3), "does not hold a dict of tensors"),
        ({}, "does not hold a dict of tensors"),
        ({"state_dict": {"w": torch.ones(3)}}, "'state_dict' is a dict; save the model's state dict alone"),
        ({"w": torch.ones(3), "epoch": 4}, "'epoch' is a int"),
        ({"w": None}, "'w' is a NoneType"),
        ({3: torch.ones(3)}, "'3' cannot be the name of a tensor"),
        ({"../w": torch.ones(3)}, "'../w' cannot be the name of a tensor"),
        ({"\x1b[2J": torch.ones(3)}, "cannot be the name of a tensor"),
        ({"__metadata__": torch.ones(3)}, "cannot be the name of a tensor"),
        ({"w": torch.eye(3).to_sparse()}, "tensor 'w' is not an ordinary dense tensor"),
        ({"w": torch.ones(3, device="meta")}, "tensor 'w' is not an ordinary dense tensor"),
        ({"w": torch.ones(3, dtype=torch.complex128)}, "tensor 'w' is not an ordinary dense tensor"),
        ({"w": torch.ones(3, dtype=torch.complex64).conj()}, "tensor 'w' is not an ordinary dense tensor"),
        ({"w": torch.ones(1, 1).expand(1 << 20, 1 << 20)}, "tensor 'w' is not an ordinary dense tensor"),
        ({"w": torch.ones([1] * 9)}, "tensor 'w' is not an ordinary dense tensor"),
        ({"w": encode(torch.eye(200), installed_codecs())}, "tensor 'w' starts like an encoded one"),
    ],
)
def test_what_is_no_state_dict(tmp_path, saved, message):
    torch.save(saved, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", tmp_path / "out", message)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_that_claims_more_than_the_file_has(tmp_path, legacy):
    storage = torch.ones(10)._typed_storage()
    rebuild = torch._utils._rebuild_tensor_v2
    for size in (1 << 20, 1 << 50):
        torch.save(
            {"w": Hostile(rebuild, storage, 0, (size,), (1,), False, {})},
            tmp_path / "weights.bin",
            _use_new_zipfile_serialization=not legacy,
        )
        refused(tmp_path / "weights.bin", tmp_path / "out", "is damaged")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_and_damaged_pickles(tmp_path, legacy):
    path = tmp_path / "weights.bin"
    torch.save({"w": torch.eye(100)}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    for other in (b"", b"x", data[:100], data[: len(data) // 2], data[:-30], b"PK\3\4" + bytes(100), b"\x80\2."):
        path.write_bytes(other)
        refused(path, tmp_path / "out", "is damaged, or holds other objects than tensors")


def test_views_parameters_and_shared_memory(tmp_path):
    base = torch.randn(100, 200)
    base[torch.rand(100, 200) < 0.9] = 0
    state = {"a": base, "b": base.t(), "c": base[10:60, ::2], "d": nn.Parameter(base[:80])}
    torch.save(state, tmp_path / "weights.pt")
    out = convert(tmp_path / "weights.pt", tmp_path / "out")
    assert all(row.values is not None for row in inspect(out).tensors)
    found = dense(out, tmp_path)
    assert all(same(found[name], tensor.detach().contiguous()) for name, tensor in state.items())


# ------------------------------------------------------------------------------------------------- torch prune


def pruned_bert():
    """A model under torch.nn.utils.prune, and what remains of it."""
    model, expected = tiny_bert(), tiny_bert()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "pooler" not in name:
            prune.l1_unstructured(module, "weight", amount=0.8)
            prune.random_unstructured(module, "bias", amount=0.5)
            other = expected.get_submodule(name)
            with torch.no_grad():
                other.weight[module.weight_mask == 0] = 0
                other.bias[module.bias_mask == 0] = 0
    return model, expected


@pytest.mark.parametrize("form", [as_bin, as_bin_shards, "safetensors", "shards"])
def test_masks_of_torch_prune(form, tmp_path):
    model, expected = pruned_bert()
    source = tmp_path / "source"
    model.config.save_pretrained(source)
    state = copied(model)
    if form == "safetensors":
        write(source, state)
    elif form == "shards":
        write(source, halves(state, "model-0000{}-of-00002.safetensors"))  # parts of a tensor in different files
    else:
        form(model, source)
    out = convert(source, tmp_path / "out")
    assert same_state(AutoModel.from_pretrained(out), expected)
    names = {*linear_weights(expected), *(name.replace("weight", "bias") for name in linear_weights(expected))}
    assert set(json.loads((out / "config.json").read_text())["quantization_config"]["pruned"]) == names
    assert inspect(out).dense_bytes == sum(tensor.nbytes for tensor in expected.state_dict().values())
    kept = dense(out, tmp_path)
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.signbit(kept[name][kept[name] == 0]).any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.uint8])
def test_masks_of_any_dtype(dtype, mask_dtype, tmp_path):
    weight = torch.randn(60, 100).mul(10).to(dtype)
    mask = torch.rand(60, 100) < 0.1
    write(tmp_path / "dense", {"w_orig": weight, "w_mask": mask.to(mask_dtype or dtype)})
    found = dense(convert(tmp_path / "dense", tmp_path / "out", signed_zeros=True), tmp_path)
    assert same_state(found, {"w": torch.where(mask, weight, torch.zeros((), dtype=dtype))})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.weight_orig": torch.ones(3, 3)}, "'a.weight_orig' is one part of a pruned tensor, and the other is"),
        ({"a.weight_mask": torch.ones(3, 3)}, "'a.weight_mask' is one part of a pruned tensor, and the other is"),
        ({"bias_ih_l0_mask": torch.ones(3)}, "'bias_ih_l0_mask' is one part of a pruned tensor, and the other is"),
        ({"w_orig": torch.ones(3, 3), "w_mask": torch.ones(3)}, "'w_mask' has another shape"),
        ({"w_orig": torch.ones(()), "w_mask": torch.ones(())}, "'w_mask' has another shape"),
        ({"w_orig": torch.ones(3, 3), "w_mask": torch.ones(3, 3) / 2}, "'w_mask' .* values other than 0 and 1"),
        ({"w_orig": torch.ones(9), "w_mask": -torch.ones(9)}, "'w_mask' .* values other than 0 and 1"),
        ({"w_orig": torch.ones(9), "w_mask": torch.full((9,), torch.nan)}, "'w_mask' .* values other than 0 and 1"),
        ({"w_orig": torch.ones(9), "w_mask": torch.full((9,), 255).byte()}, "'w_mask' .* values other than 0 and 1"),
        ({"w_orig": torch.ones(3), "w_mask": torch.ones(3), "w": torch.ones(3)}, "is a part of 'w', which is there"),
    ],
)
@pytest.mark.parametrize("form", ["weights.safetensors", "weights.bin"])
def test_masks_that_do_not_fit(form, state, message, tmp_path):
    save_file(state, tmp_path / form) if form.endswith("safetensors") else torch.save(state, tmp_path / form)
    refused(tmp_path / form, tmp_path / "out", message)


def test_a_wrong_mask_far_down_leaves_nothing(tmp_path):
    mask = torch.ones(3000, 1000, dtype=torch.int8)
    mask[-1, -1] = 2
    write(tmp_path / "dense", {"a": torch.eye(300), "w_orig": torch.ones(3000, 1000), "w_mask": mask})
    refused(tmp_path / "dense", tmp_path / "out", "'w_mask' .* values other than 0 and 1")


def test_other_tensors_may_have_such_names(tmp_path):
    layer = nn.utils.spectral_norm(nn.Linear(8, 8))
    state = {"attn_mask": torch.randn(4, 4), "position_orig": torch.ones(3), **layer.state_dict()}
    assert "weight_orig" in state
    torch.save(state, tmp_path / "weights.bin")
    assert same_state(dense(convert(tmp_path / "weights.bin", tmp_path / "out"), tmp_path), state)


# ------------------------------------------------------------------------------------------------- bitmasks


@pytest.mark.parametrize("name", PEERS)
def test_folders_that_compressed_tensors_wrote(name, tmp_path):
    out = convert(DATA / name, tmp_path / "out")
    expected = json.loads((DATA / "bitmask_crc32.json").read_text())[name]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    for state in (model.state_dict(), dense(out, tmp_path)):
        found = {key: zlib.crc32(tensor.view(torch.uint8).numpy().tobytes()) for key, tensor in state.items()}
        assert found == expected
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sparsehooks"
    assert "compression_config" not in config
    assert config["quantization_config"]["pruned"] == sorted(linear_weights(model))
    assert inspect(out).bytes < (DATA / name / "model.safetensors").stat().st_size


def packed(weight, prefix="m", *, keep=None, offsets=True):
    """The parts that compressed-tensors makes of a tensor."""
    keep = (weight != 0) if keep is None else keep
    bitmask = np.packbits(keep.numpy(), axis=-1, bitorder="little")
    counts = keep.sum(dim=-1).flatten()
    parts = {
        f"{prefix}.compressed": weight[keep],
        f"{prefix}.bitmask": torch.from_numpy(bitmask),
        f"{prefix}.shape": torch.tensor(weight.shape),
    }
    if offsets:
        parts[f"{prefix}.row_offsets"] = (torch.cumsum(counts, 0) - counts) if weight.dim() > 1 else torch.tensor(0)
    return parts


def sparse(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator).mul(10).to(dtype)
    return torch.where(torch.rand(*shape, generator=generator) < 0.8, torch.zeros((), dtype=dtype), weight)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 100), (100, 64), (5, 0), (0, 9), (4, 5, 13), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64])
def test_bitmasks_of_any_shape_and_dtype(tmp_path, shape, dtype):
    weight = sparse(*shape, dtype=dtype)
    write(tmp_path / "dense", packed(weight))
    assert same_state(dense(convert(tmp_path / "dense", tmp_path / "out"), tmp_path), {"m.weight": weight})


def test_very_many_rows_of_nothing(tmp_path):
    empty = torch.zeros(1 << 43, 0, dtype=torch.uint8)
    parts = {"m.compressed": torch.zeros(0), "m.bitmask": empty, "m.shape": torch.tensor([1 << 43, 0])}
    out = convert(write(tmp_path / "dense", {**parts, "a_orig": empty, "a_mask": empty}), tmp_path / "out")
    shapes = {entry.name: entry.shape for entry in Shard.open(out / "model.safetensors").entries}
    assert shapes == {"m.weight": (1 << 43, 0), "a": (1 << 43, 0)}


def test_bitmasks_of_vectors_and_older_names(tmp_path):
    state = {"a.weight": sparse(30, 50), "a.bias": sparse(50), "norm.scale": torch.ones(9), "weight": torch.zeros(8)}
    parts = {}
    for name, tensor in state.items():
        parts |= packed(tensor, name)
    parts["position_ids"] = state["position_ids"] = torch.arange(5)
    out = convert(write(tmp_path / "dense", parts, {"model_type": "bert"}), tmp_path / "out")
    assert same_state(dense(out, tmp_path), state)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["pruned"] == ["a.weight"]


def test_kept_values_come_back_bit_for_bit(tmp_path):
    bits = torch.tensor([0x7FC1, -0x8000, 0x7F80, 0x0001, 0x3F80], dtype=torch.int16)  # a NaN, -0.0, inf, a subnormal
    weight, keep = torch.zeros(100, 50, dtype=torch.bfloat16), torch.zeros(100, 50, dtype=torch.bool)
    weight[7, :5], keep[7, :5] = bits.view(torch.bfloat16), True
    write(tmp_path / "dense", packed(weight, keep=keep))
    assert same(dense(convert(tmp_path / "dense", tmp_path / "a", signed_zeros=True), tmp_path)["m.weight"], weight)
    weight[7, 1] = 0.0
    assert same(dense(convert(tmp_path / "dense", tmp_path / "b"), tmp_path)["m.weight"], weight)


def packed24(weight, keep):
    parts = packed(weight, keep=keep, offsets=False)
    parts["m.compressed"] = parts["m.compressed"].reshape(weight.shape[0], -1)
    parts["m.shape"] = parts["m.shape"].reshape(-1, 1)
    return parts


@pytest.mark.parametrize("shape", [(1, 4), (2, 6), (30, 100), (4, 1022), (2000, 2304)])
def test_two_of_four(tmp_path, shape):
    weight = torch.randn(shape)
    keep = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool)
    keep.scatter_(1, torch.rand(keep.shape).argsort(dim=1)[:, :2], value=True)
    keep = keep.reshape(shape)
    weight = torch.where(keep, weight, 0.0)
    weight[0, :4] = 0  # kept all the same
    write(tmp_path / "dense", packed24(weight, keep))
    assert same_state(dense(convert(tmp_path / "dense", tmp_path / "out"), tmp_path), {"m.weight": weight})
    other = keep.clone().reshape(-1)
    last = other[-4:].nonzero().flatten()
    other[-4:] = True
    other[:4] = False
    assert len(last) == 2
    if shape != (1, 4):
        write(tmp_path / "dense", packed24(weight, other.reshape(shape)))
        refused(tmp_path / "dense", tmp_path / "bad", "'m.compressed' .* does not keep two of each four")


def spoiled(**changes):
    """The parts of a tensor of 5 x 13 with other ones in their place; None leaves one out."""
    parts = packed(sparse(5, 13))
    for part, change in changes.items():
        found = parts.pop(f"m.{part}")
        if change is not None:
            parts[f"m.{part}"] = change(found) if callable(change) else change
    return parts


def with_bit(row, column, *, value):
    def change(bitmask):
        data = bitmask.clone()
        data[row, column // 8] = (data[row, column // 8] & ~(1 << column % 8)) | (value << column % 8)
        return data

    return change


SPOILED = {
    "more bits": (spoiled(bitmask=torch.full((5, 2), 255) & torch.tensor([255, 31])), "values, but a bitmask of 65"),
    "fewer bits": (spoiled(bitmask=torch.zeros(5, 2)), "values, but a bitmask of 0"),
    "padding": (spoiled(bitmask=with_bit(2, 14, value=1)), "bits beyond its columns"),
    "fewer values": (spoiled(compressed=lambda values: values[:-1]), "values, but a bitmask of"),
    "no values": (spoiled(compressed=lambda values: values[:0]), "has 0 values, but a bitmask of"),
    "values 3d": (spoiled(compressed=lambda values: values.reshape(1, 1, -1)), "does not fit the shape"),
    "values 2d": (spoiled(compressed=lambda values: values.reshape(1, -1)), "does not fit the shape"),
    "value scalar": (spoiled(compressed=lambda values: values[0]), "values, but a bitmask of"),
    "more values": (spoiled(compressed=torch.ones(66)), "does not fit the shape"),
    "values of nothing": (
        spoiled(shape=torch.tensor([1 << 43, 0]), bitmask=torch.zeros(1 << 43, 0, dtype=torch.uint8)),
        "does not fit the shape",
    ),
    "transposed": (spoiled(shape=torch.tensor([13, 5])), "does not fit the shape"),
    "more rows": (spoiled(shape=torch.tensor([6, 13])), "does not fit the shape"),
    "huge": (spoiled(shape=torch.tensor([1 << 40, 1 << 40])), "does not fit the shape"),
    "negative": (spoiled(shape=torch.tensor([-5, -13])), "'m.shape' is not the shape of a tensor"),
    "overflow": (spoiled(shape=torch.tensor([5, 2**62])), "'m.shape' is not the shape of a tensor"),
    "no sizes": (spoiled(shape=torch.tensor([], dtype=torch.int64)), "'m.shape' is not the shape of a tensor"),
    "many sizes": (spoiled(shape=torch.ones(9, dtype=torch.int64)), "'m.shape' is not the shape of a tensor"),
    "float sizes": (spoiled(shape=torch.tensor([5.0, 13.0])), "'m.shape' is not the shape of a tensor"),
    "bits as words": (spoiled(bitmask=lambda bits: bits.to(torch.int32)), "'m.bitmask' does not fit the shape"),
    "bits 1d": (spoiled(bitmask=lambda bits: bits.flatten()), "'m.bitmask' does not fit the shape"),
    "no bits": (spoiled(bitmask=None), "has no '.bitmask' beside it"),
    "no shape": (spoiled(shape=None), "has no '.shape' beside it"),
    "no compressed": (spoiled(compressed=None), "'m.bitmask' has no '.compressed' beside it"),
    "offsets": (spoiled(row_offsets=lambda offsets: offsets + 1), "row offsets that do not fit"),
    "few offsets": (spoiled(row_offsets=lambda offsets: offsets[:-1]), "row offsets that do not fit"),
    "float offsets": (spoiled(row_offsets=lambda offsets: offsets.double()), "row offsets that do not fit"),
    "twice": ({**spoiled(), "m.weight": torch.ones(5, 13)}, "is a part of 'm.weight', which is there too"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_bitmasks_that_do_not_fit(case, tmp_path):
    parts, message = SPOILED[case]
    bitmask = parts.get("m.bitmask")
    if bitmask is not None and bitmask.dtype in {torch.int64, torch.float32}:
        parts = {**parts, "m.bitmask": bitmask.to(torch.uint8)}
    refused(write(tmp_path / "dense", parts), tmp_path / "out", message)


def test_flipped_bits_of_a_bitmask_folder(tmp_path):
    """Any one flipped bit of masks, shapes and offsets is found; those of the values cannot be."""
    parts = packed(sparse(20, 32))
    for part in ("bitmask", "shape", "row_offsets"):
        data = parts[f"m.{part}"].contiguous().view(torch.uint8)
        for position in range(8 * data.numel()):
            flipped = data.clone()
            flipped.view(-1)[position // 8] ^= 1 << position % 8
            changed = {**parts, f"m.{part}": flipped.view(parts[f"m.{part}"].dtype)}
            refused(write(tmp_path / "dense", changed), tmp_path / "out", "tensor 'm.(compressed|bitmask|shape)'")


# ------------------------------------------------------------------------------------------------- artifacts


def test_an_artifact_at_another_level_and_in_place(tmp_path):
    model = sparse_llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    fast = convert(tmp_path / "dense", tmp_path / "fast", level="fast")
    config = json.loads((fast / "config.json").read_text())
    said = {"recipe": {"stage": [{"prune": "magnitude"}]}, "plugins": {"p": {"a": "b"}}, "pruned": ["lm_head.weight"]}
    config["quantization_config"] |= said
    (fast / "config.json").write_text(json.dumps(config))
    (fast / "notes.txt").write_text("mine")
    small = convert(fast, tmp_path / "small", level="small")
    assert inspect(small).bytes < inspect(fast).bytes
    assert same_state(AutoModelForCausalLM.from_pretrained(small), model)
    found = json.loads((small / "config.json").read_text())["quantization_config"]
    assert said.items() <= found.items()
    again = contents(convert(small, tmp_path / "again", level="fast"))
    assert again == contents(convert(fast, tmp_path / "same", level="fast"))
    assert convert(small, small, level="fast") == small
    assert contents(small) == again


def test_a_damaged_artifact_is_not_converted(tmp_path):
    state = {"a": sparse(100, 100), "b": torch.randn(30)}
    out = convert(write(tmp_path / "dense", state), tmp_path / "out")
    path = out / "model.safetensors"
    data, shard = path.read_bytes(), Shard.open(path)
    for entry in shard.entries:
        for at in (0, entry.length // 2, entry.length - 1):
            path.write_bytes(
                data[: entry.offset + at] + bytes([data[entry.offset + at] ^ 64]) + data[entry.offset + at + 1 :]
            )
            refused(
                out,
                tmp_path / "again",
                f"tensor '{entry.name}'.*damaged|damaged: tensor '{entry.name}'|tensor '{entry.name}'",
            )


def test_files_of_two_models_are_not_mixed(tmp_path):
    for seed in (0, 1):
        state = {name: sparse(90, 90, seed=seed) for name in "abcd"}
        convert(write(tmp_path / f"dense{seed}", halves(state, "model-{}.safetensors")), tmp_path / f"out{seed}")
    name = "model-00002-of-00002.safetensors"
    (tmp_path / "out0" / name).write_bytes((tmp_path / "out1" / name).read_bytes())
    refused(tmp_path / "out0", tmp_path / "again", "were not saved together")


def test_metadata_of_the_files_is_kept(tmp_path):
    save_file({"w": torch.eye(100)}, tmp_path / "dense.safetensors", metadata={"format": "pt", "license": "mine"})
    found = Shard.open(convert(tmp_path / "dense.safetensors", tmp_path / "out") / "model.safetensors").metadata
    assert found.items() >= {"license": "mine", "format": "pt", "sparsehooks.format": "1"}.items()
    again = Shard.open(convert(tmp_path / "out", tmp_path / "again") / "model.safetensors").metadata
    assert again == found


def test_an_artifact_may_hold_other_forms(tmp_path):
    """A module whose masks of torch prune are still there, with one tensor encoded."""
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    prune.l1_unstructured(model[0], "weight", amount=0.9)
    with pytest.raises(ArtifactError, match=r"'0.weight' is still a pair of torch.nn.utils.prune"):
        save_pretrained(model, tmp_path / "saved")
    state = model.state_dict()
    write(tmp_path / "saved", {**state, "0.weight_mask": encode(state["0.weight_mask"], installed_codecs())})
    shard = Shard.open(tmp_path / "saved" / "model.safetensors")
    assert any(holds_blob(shard, entry) for entry in shard.entries)
    found = dense(convert(tmp_path / "saved", tmp_path / "out"), tmp_path)
    prune.remove(model[0], "weight")
    assert same_state(found, {name: tensor + 0.0 for name, tensor in model.state_dict().items()})


# ------------------------------------------------------------------------------------------------- failures, memory


def test_out_is_not_taken_from_others(tmp_path):
    source = write(tmp_path / "dense", {"w": torch.eye(100)})
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    for out in (other, source):
        with pytest.raises(ArtifactError, match="already holds other files; choose a new folder"):
            convert(source, out)
    with pytest.raises(ArtifactError, match="is a file; choose a new folder"):
        convert(source, source / "model.safetensors")
    with pytest.raises(ArtifactError, match="cannot write '/proc/none/out': "):
        convert(source, "/proc/none/out")
    assert contents(tmp_path) == before


def in_another_process(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("limit", [1000, 30_000])
def test_no_room(tmp_path, limit):
    source = write(tmp_path / "dense", {"w": torch.randn(200, 200), "v": sparse(300, 300)})
    before = contents(tmp_path)
    done = in_another_process(f"""
        import resource
        from sparsehooks import ArtifactError, convert
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            convert({str(source)!r}, {str(tmp_path / "new" / "out")!r})
        except ArtifactError as error:
            print(error)
    """)
    assert done.stdout == f"cannot write '{tmp_path / 'new' / 'out'}': File too large; nothing was changed\n", (
        done.stderr
    )
    assert contents(tmp_path) == before


def test_stopped_or_killed_in_the_middle(tmp_path):
    source = write(tmp_path / "dense", halves({name: sparse(90, 90) for name in "abcd"}, "model-{}.safetensors"))
    before = contents(tmp_path)

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=stop)
    assert contents(tmp_path) == before
    killed = in_another_process(f"""
        import os
        from sparsehooks import convert
        convert({str(source)!r}, {str(tmp_path / "out")!r}, progress=lambda done, total: os.kill(os.getpid(), 9))
    """)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert same(dense(convert(source, tmp_path / "out"), tmp_path)["a"], sparse(90, 90))


@pytest.mark.parametrize("form", ["dense", "prune", "artifact"])
def test_memory_stays_below_one_tensor(tmp_path, form):
    weight = torch.zeros(4096, 4096)  # 64 MiB
    weight.view(-1)[torch.randperm(weight.numel())[: weight.numel() // 10]] = 1.5
    state = {"w_orig": weight, "w_mask": (weight != 0).to(torch.uint8)} if form == "prune" else {"w": weight}
    source, small = write(tmp_path / "big", state), write(tmp_path / "small", {"w": torch.eye(300)})
    if form == "artifact":
        source = convert(source, tmp_path / "artifact", level="fast")
    done = in_another_process(f"""
        import re
        from sparsehooks import convert
        def memory(which):
            return int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
        convert({str(small)!r}, {str(tmp_path / "warm")!r})
        before = memory("VmRSS")
        convert({str(source)!r}, {str(tmp_path / "out")!r})
        print(memory("VmHWM") - before)
    """)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 48
    assert same(dense(tmp_path / "out", tmp_path)["w"], weight)


# ------------------------------------------------------------------------------------------------- the writer


def test_a_shard_is_what_safetensors_reads(tmp_path):
    tensors = {
        "a.matrix": torch.randn(30, 41),
        'b."quoted"\\ä': torch.randn(7).double(),
        "c.scalar": torch.tensor(3.5, dtype=torch.float16),
        "d.empty": torch.zeros(0, 5, dtype=torch.bfloat16),
        "e.flags": torch.tensor([True, False, True]),
        "f.turned": torch.randn(3, 4, 5).permute(2, 0, 1),
        "g.large": torch.arange(3_000_000, dtype=torch.int64).view(3, -1),
        "h.bytes": torch.arange(200, dtype=torch.uint8),
    }
    kinds = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
    kinds |= {torch.bool: "BOOL", torch.int64: "I64", torch.uint8: "U8"}
    contents_ = {name: (kinds[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    blob = encode(torch.eye(200), installed_codecs())
    contents_["i.encoded"] = ("F32", (200, 200))
    metadata = {"format": "pt", "more": "x" * 100}
    writer = ShardWriter(tmp_path / "x.safetensors", contents_, metadata)
    writer.write({**tensors, "i.encoded": blob}.__getitem__)
    writer.finish({"format": "pt", "more": "y"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == writer.checksums.keys() == contents_.keys()
    assert all(same(loaded[name], tensor.contiguous()) for name, tensor in tensors.items())
    assert same(loaded["i.encoded"], blob)
    shard = Shard.open(tmp_path / "x.safetensors")
    assert shard.metadata == {"format": "pt", "more": "y"}
    assert writer.bytes == sum(entry.length for entry in shard.entries)
    for entry in shard.entries:
        assert entry.offset % loaded[entry.name].dtype.itemsize == 0
        checked = shard.read_bytes(entry, 0, entry.length) if entry.length else b"[0, 5]"
        assert writer.checksums[entry.name] == zlib.crc32(checked)
    with (tmp_path / "x.safetensors").open("rb") as file:
        assert struct.unpack("<Q", file.read(8))[0] % 8 == 0


def test_what_is_equal_becomes_the_same_file(tmp_path):
    """Whatever the order of the metadata, which the safetensors library leaves to chance."""
    files = set()
    for number, metadata in enumerate(({"format": "pt", "more": "x"}, {"more": "x", "format": "pt"})):
        source = tmp_path / f"{number}.safetensors"
        fields = {"dtype": "F32", "shape": [300], "data_offsets": [0, 1200]}
        weights_file(source, {"__metadata__": metadata, "w": fields}, bytes(1200))
        converted = convert(source, tmp_path / f"sparse-{number}")
        again = decompress(converted, tmp_path / f"dense-{number}")
        files |= {(converted / "model.safetensors").read_bytes(), (again / "model.safetensors").read_bytes()}
    assert len(files) == 2


def test_an_unfinished_shard_is_no_shard(tmp_path):
    writer = ShardWriter(tmp_path / "x.safetensors", {"a": ("F32", (3,))}, {})
    writer.write(lambda name: torch.ones(3))
    with pytest.raises(ArtifactError, match="truncated or not a safetensors file"):
        Shard.open(tmp_path / "x.safetensors")
    writer.finish({})
    assert same(load_file(tmp_path / "x.safetensors")["a"], torch.ones(3))


def test_a_header_that_nobody_would_read(tmp_path):
    with pytest.raises(ArtifactError, match=r"would need a header of \d+ bytes; 16777216 is the limit"):
        ShardWriter(tmp_path / "x.safetensors", {}, {"x": "y" * (16 << 20)})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- the command line


def test_the_command(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "sparsehooks", "convert", DATA / "bitmask", "--out", tmp_path / "a"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert re.fullmatch(
        rf"{tmp_path}/a: [\d.]+ kB of [\d.]+ kB \(\d+\.\d%\), 4\d\.\d% zeros, .* s; look inside .*", line
    )
    assert contents(tmp_path / "a") == contents(convert(DATA / "bitmask", tmp_path / "b"))


def test_the_options_of_the_command(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparsehooks", "convert", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr()

    source = write(tmp_path / "dense", {"w": sparse(200, 200) * -1})
    status, printed = run(source, "--out", tmp_path / "a", "--level", "small", "--signed-zeros", "--json")
    assert status == 0
    found = inspect(tmp_path / "a")
    expected = {"out": str(tmp_path / "a"), "bytes": found.bytes, "dense_bytes": 160_000, "sparsity": found.sparsity}
    assert expected.items() <= json.loads(printed.out).items()
    assert contents(tmp_path / "a") == contents(convert(source, tmp_path / "b", level="small", signed_zeros=True))
    for arguments, message in (
        ((source, "--out", tmp_path / "c", "--level", "smal"), "did you mean 'small'?"),
        ((tmp_path / "none", "--out", tmp_path / "c"), "there is no folder or file"),
        ((source, "--out", source), "already holds other files"),
    ):
        status, printed = run(*arguments)
        assert status == 2
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        assert message in line
