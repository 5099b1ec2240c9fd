import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import sparsehooks
from sparsehooks.testing import check_component

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

import sparsehooks_compressed_tensors as plugin
from sparsehooks_compressed_tensors import exporter as module
from sparsehooks_compressed_tensors.search import find_grid

GROUPS = {"use": "int4", "per": "group", "group": 32}
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
PERS = ("tensor", "channel", "group")


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch):
    monkeypatch.setenv("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("SPARSEHOOKS_PLUGINS", raising=False)


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config).eval()


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def save(model, folder, *stages):
    stages = [stage if "quantize" in stage or "prune" in stage else {"quantize": stage} for stage in stages]
    sparsehooks.compress(
        model, {"stage": [{"exclude": ["lm_head", "classifier"], **stage} for stage in stages]}, folder
    )
    return folder


def export(folder, out, name="compressed-tensors"):
    return sparsehooks.export(folder, out, name, plugins=[plugin])


def quantization(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


@torch.no_grad()
def logits(folder, cls, **options):
    return cls.from_pretrained(folder, **options).eval()(input_ids=IDS).logits


CASES = {
    "int4 in groups": (llama, GROUPS, "compressed-tensors", "pack-quantized", 4, True, "group"),
    "int4 in groups with zero points": (
        *(llama, {**GROUPS, "symmetric": False}, "compressed-tensors"),
        *("pack-quantized", 8, True, "group"),
    ),
    "int8 with zero points": (
        *(llama, {"use": "int8", "symmetric": False}, "compressed-tensors"),
        *("int-quantized", 8, False, "channel"),
    ),
    "int8": (bert, "int8", "int-quantized", "int-quantized", 8, True, "channel"),
    "int8, packed": (bert, "int8", "pack-quantized", "pack-quantized", 8, True, "channel"),
    "int8 per tensor": (bert, {"use": "int8", "per": "tensor"}, "int-quantized", "int-quantized", 8, True, "tensor"),
    "int3": (bert, "int3", "compressed-tensors", "pack-quantized", 4, True, "channel"),
    "int6": (bert, "int6", "compressed-tensors", "pack-quantized", 8, True, "channel"),
    "int5, unpacked": (bert, GROUPS | {"use": "int5"}, "int-quantized", "int-quantized", 8, True, "group"),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_it_with_equal_outputs(tmp_path, case):
    make, quantizer, name, form, bits, symmetric, per = CASES[case]
    if case.startswith("int4 in groups with") and module._opens_packed_zeros():
        bits, symmetric = 4, False
    folder = save(make(), tmp_path / "saved", {"use": quantizer} if isinstance(quantizer, str) else quantizer)
    said = export(folder, tmp_path / "out", name)
    assert f"with {bits} bits" in said
    assert "1 ignored; weights equal bit for bit" in said

    marks = quantization(tmp_path / "out")
    assert (marks["quant_method"], marks["format"]) == ("compressed-tensors", form)
    assert marks["ignore"] == ["lm_head" if make is llama else "classifier"]
    (group,) = marks["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights = group["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["strategy"]) == (bits, symmetric, per)
    assert group["input_activations"] is None

    cls = AutoModelForCausalLM if make is llama else BertForSequenceClassification
    assert torch.equal(logits(tmp_path / "out", cls), logits(folder, cls))
    opened = cls.from_pretrained(tmp_path / "out")
    opened(input_ids=IDS)  # which unpacks it
    expected = cls.from_pretrained(folder).state_dict()
    assert all(torch.equal(opened.state_dict()[key], tensor) for key, tensor in expected.items())


def test_it_is_small(tmp_path):
    folder = save(llama(), tmp_path / "saved", GROUPS)
    export(folder, tmp_path / "out")
    dense = sparsehooks.inspect(folder).dense_bytes
    with sparsehooks.safe_open(tmp_path / "out" / "model.safetensors") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    packed = sum(tensor.nbytes for key, tensor in held.items() if "packed" in key)
    assert packed == sum(tensor.numel() for tensor in linear(folder)) // 2
    assert {tensor.dtype for key, tensor in held.items() if key.endswith("scale")} == {torch.float32}
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.45 * dense


def linear(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).model
    return [child.weight for child in model.modules() if isinstance(child, torch.nn.Linear)]


def test_layers_of_two_kinds_and_pruned_ones(tmp_path):
    folder = save(
        llama(),
        tmp_path / "saved",
        {"prune": "magnitude", "sparsity": 0.5},
        {"quantize": GROUPS, "targets": ["*mlp*"]},
        {"quantize": "int8", "targets": ["*self_attn*"]},
    )
    said = export(folder, tmp_path / "out")
    assert "6 layers pack-quantized with 4 bits per group of 32" in said
    assert "8 layers pack-quantized with 8 bits per channel" in said
    assert len(quantization(tmp_path / "out")["config_groups"]) == 2
    cls = AutoModelForCausalLM
    assert torch.equal(logits(tmp_path / "out", cls), logits(folder, cls))


def test_tied_weights_stay(tmp_path):
    model = llama(tie_word_embeddings=True)
    folder = tmp_path / "saved"
    sparsehooks.compress(model, {"stage": [{"quantize": "int8", "targets": ["*self_attn*"]}]}, folder)
    export(folder, tmp_path / "out")
    marks = quantization(tmp_path / "out")
    assert "lm_head" in marks["ignore"]
    assert len(marks["ignore"]) == 7
    cls = AutoModelForCausalLM
    assert torch.equal(logits(tmp_path / "out", cls), logits(folder, cls))


def test_scales_are_rounded_in_bfloat16_and_the_line_says_so(tmp_path):
    folder = save(llama(torch.bfloat16), tmp_path / "saved", GROUPS)
    said = export(folder, tmp_path / "out")
    assert "because transformers rounds scales" in said
    cls = AutoModelForCausalLM
    expected = logits(folder, cls)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(logits(tmp_path / "out", cls), expected, rtol=0.05, atol=0.01)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        exact = logits(tmp_path / "out", cls, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(exact, expected)


def test_packed_zero_points_on_request(tmp_path):
    folder = save(llama(), tmp_path / "saved", {**GROUPS, "symmetric": False})
    said = export(folder, tmp_path / "out", "pack-quantized")
    assert "4 bits with zero points" in said
    assert ("dequantize=True" in said) != module._opens_packed_zeros()
    cls = AutoModelForCausalLM
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        exact = logits(tmp_path / "out", cls, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(exact, logits(folder, cls))


def test_activations_of_the_config_are_written(tmp_path):
    scheme = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    folder, kept = tmp_path / "saved", ["classifier", "*pooler*"]
    stages = [{"quantize": "int8", "exclude": kept}, {"activation": "int8", "exclude": kept}]
    sparsehooks.compress(bert(), {"stage": stages}, folder)
    export(folder, tmp_path / "out")
    (group,) = quantization(tmp_path / "out")["config_groups"].values()
    assert scheme.items() <= group["input_activations"].items()
    assert quantization(tmp_path / "out")["format"] == "int-quantized"
    cls = BertForSequenceClassification
    found, plain = logits(tmp_path / "out", cls), logits(folder, cls)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=0.1, atol=0.05)
    with pytest.raises(sparsehooks.ArtifactError, match="use int-quantized"):
        export(folder, tmp_path / "packed", "pack-quantized")


def test_activations_that_the_format_cannot_carry_are_refused(tmp_path):
    for name, activation, said in (
        ("one", {"activation": {"use": "int8", "per": "tensor"}}, "fitted to each token"),
        ("two", {"activation": "teal", "sparsity": 0.5}, "has activations of 'teal'"),
        ("three", {"activation": "int8", "exclude": ["*query"]}, "quantizes its weight or its inputs but not both"),
    ):
        folder = tmp_path / name
        data = [{"input_ids": torch.arange(1, 9)[None]}] if "sparsity" in activation else None
        sparsehooks.compress(bert(), {"stage": [{"quantize": "int8"}, activation]}, folder, calibration=data)
        with pytest.raises(sparsehooks.ArtifactError, match=said):
            export(folder, tmp_path / f"{name}-out")
        assert not (tmp_path / f"{name}-out").exists()


@pytest.mark.parametrize("quantizer", ["kmeans", "nf4"])
def test_other_grids_are_refused_by_the_name_of_the_layer(tmp_path, quantizer):
    folder = save(llama(), tmp_path / "saved", {"use": quantizer})
    with pytest.raises(sparsehooks.ArtifactError, match=rf"'model\.layers.*' was quantized with '{quantizer}'.*'int4'"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_quantized_is_refused(tmp_path):
    folder = save(llama(), tmp_path / "saved", {"prune": "magnitude", "sparsity": 0.5})
    with pytest.raises(sparsehooks.ArtifactError, match=r"no Linear weight of .* quantize it first"):
        export(folder, tmp_path / "out")


def test_a_model_that_only_sparsehooks_opens_is_refused(tmp_path):
    stages = [{"prune": "magnitude", "pattern": "head", "sparsity": 0.5, "targets": ["*attention*"]}, {"shrink": True}]
    sparsehooks.compress(bert(), {"stage": stages}, tmp_path / "saved")
    with pytest.raises(sparsehooks.ArtifactError, match="has shrunk, which only sparsehooks can open"):
        export(tmp_path / "saved", tmp_path / "out")


def test_a_model_of_an_unknown_type_is_refused(tmp_path):
    folder = save(bert(), tmp_path / "saved", {"use": "int8"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    with pytest.raises(sparsehooks.ArtifactError, match=r"no model that transformers knows: .* the type 'mine'"):
        export(folder, tmp_path / "out")
    (folder / "config.json").unlink()
    with pytest.raises(sparsehooks.ArtifactError, match=r"has no config\.json"):
        export(folder, tmp_path / "out")


def test_other_folders_are_refused(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(sparsehooks.ArtifactError, match="was not saved by sparsehooks"):
        export(tmp_path / "dense", tmp_path / "out")
    folder = save(bert(), tmp_path / "saved", {"use": "int8"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(sparsehooks.ArtifactError, match="already holds other files"):
        export(folder, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_without_compressed_tensors(tmp_path, monkeypatch):
    folder = save(bert(), tmp_path / "saved", {"use": "int8"})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sparsehooks.PluginError, match="'pip install compressed-tensors'"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_beside_the_weights_come_along(tmp_path):
    folder = save(bert(), tmp_path / "saved", {"use": "int8"})
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    export(folder, tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"1_Pooling/config.json", "tokenizer.json", "config.json", "model.safetensors"}


def test_a_random_weight_lies_on_no_grid():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        assert find_grid(torch.randn(32, 64, generator=generator).to(dtype), (4, 8), PERS) is None


@pytest.mark.parametrize("name", ["compressed-tensors", "pack-quantized", "int-quantized"])
def test_it_keeps_the_contract(name):
    check_component(sparsehooks.PluginManager([plugin]).catalog, "exporter", name)


def test_the_command_line(tmp_path):
    folder = save(bert(), tmp_path / "saved", {"use": "int8"})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def command(*arguments):
        line = [sys.executable, "-m", "sparsehooks", "export", folder, *arguments, "-p", plugin.__name__]
        return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False)

    done = command("--format", "int-quantized", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'out'}: 13 layers int-quantized with 8 bits per channel")
    assert AutoModel.from_pretrained(tmp_path / "out") is not None
    done = command("--format", "gguf", "--out", tmp_path / "other")
    assert done.returncode == 2
    assert "error: no plugin offers the exporter 'gguf'; known: compressed-tensors, dense; " in done.stderr


def test_importing_it_imports_neither_torch_nor_compressed_tensors():
    code = (
        "import sys, sparsehooks_compressed_tensors\n"
        "from sparsehooks import PluginManager\n"
        "manager = PluginManager([sparsehooks_compressed_tensors], autoload=False)\n"
        "assert not manager.broken(), manager.broken()\n"
        "print([m for m in ('torch', 'compressed_tensors', 'numpy') if m in sys.modules])"
    )
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert run.stdout.strip() == "[]"
