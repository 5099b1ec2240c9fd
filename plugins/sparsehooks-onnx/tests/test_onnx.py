import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import sparsehooks
from sparsehooks.testing import check_component

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx
import onnxruntime
import sparsehooks_onnx as plugin
from sparsehooks_onnx import exporter as module

pytestmark = [
    # of torch.onnx and onnxscript themselves
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch):
    monkeypatch.setenv("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("SPARSEHOOKS_PLUGINS", raising=False)


SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=128, max_position_embeddings=32, **SIZES)).eval()


def llama(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, num_key_value_heads=2, max_position_embeddings=32, **SIZES)
    return LlamaForCausalLM(config).to(dtype).eval()


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SIZES)).eval()


def save(model, folder, *stages):
    sparsehooks.compress(model, {"stage": list(stages)}, folder)
    return folder


def export(folder, out, **options):
    return sparsehooks.export(folder, out, {"use": "onnx", **options}, plugins=[plugin])


def run(folder, **inputs):
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(found)


def axes(folder):
    graph = onnx.load(folder / "model.onnx").graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }


@torch.no_grad()
def test_a_classifier_with_masks_and_grids(tmp_path):
    stages = [{"prune": "magnitude", "sparsity": 0.8, "exclude": ["classifier"]}, {"quantize": "int8"}]
    folder = save(bert(), tmp_path / "saved", *stages)
    (folder / "tokenizer.json").write_text("{}")
    said = export(folder, tmp_path / "out", opset=18)
    assert said.startswith("BertForSequenceClassification, input_ids, attention_mask, token_type_ids to logits; ")
    assert "onnxruntime is within " in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "tokenizer.json"]
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert axes(tmp_path / "out") == {**{name: ["batch", "sequence"] for name in names}, "logits": ["batch", 2]}
    assert onnx.load(tmp_path / "out" / "model.onnx").opset_import[0].version == 18
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    for batch, sequence in ((1, 1), (5, 17)):
        inputs = {name: torch.ones(batch, sequence, dtype=torch.long) for name in names}
        inputs["input_ids"] = torch.randint(0, 128, (batch, sequence))
        torch.testing.assert_close(run(tmp_path / "out", **inputs), model(**inputs).logits, rtol=1e-5, atol=1e-6)
    held = [onnx.numpy_helper.to_array(part) for part in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer]
    weight = model.bert.encoder.layer[0].intermediate.dense.weight.detach().numpy()
    assert any(part.shape in (weight.shape, weight.T.shape) and np.mean(part == 0) > 0.7 for part in held)


@torch.no_grad()
def test_a_decoder_in_bfloat16(tmp_path):
    folder = save(llama(), tmp_path / "saved", {"quantize": {"use": "int4", "per": "group", "group": 32}})
    said = export(folder, tmp_path / "out")
    assert said.startswith("LlamaForCausalLM, input_ids, attention_mask to logits; onnxruntime is within ")
    assert axes(tmp_path / "out")["logits"] == ["batch", "sequence", 128]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {"input_ids": torch.randint(0, 128, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    torch.testing.assert_close(run(tmp_path / "out", **inputs), model(**inputs).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_of_images_that_has_shrunk(tmp_path):
    stages = [{"prune": "magnitude", "pattern": "head", "sparsity": 0.5, "targets": ["*attention*"]}, {"shrink": True}]
    folder = save(vit(), tmp_path / "saved", *stages)
    export(folder, tmp_path / "out")
    assert axes(tmp_path / "out") == {"pixel_values": ["batch", 3, 32, 32], "logits": ["batch", 2]}
    model = ViTForImageClassification.from_pretrained(folder).eval()
    assert sum(weight.numel() for weight in model.parameters()) < sum(weight.numel() for weight in vit().parameters())
    pixels = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(
        run(tmp_path / "out", pixel_values=pixels), model(pixel_values=pixels).logits, rtol=1e-4, atol=1e-6
    )


def test_what_cannot_be_exported_is_said_in_one_sentence(tmp_path, monkeypatch):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    folder = save(T5ForConditionalGeneration(T5Config(**sizes)), tmp_path / "t5", {"quantize": "int8"})
    with pytest.raises(sparsehooks.ArtifactError, match="does not take 'input_ids' or 'pixel_values' alone"):
        export(folder, tmp_path / "out")
    folder = save(bert(), tmp_path / "bert", {"quantize": "int8"})
    with pytest.raises(sparsehooks.ArtifactError, match="transformers has no class 'BertForNothing'"):
        export(folder, tmp_path / "out", architecture="BertForNothing")
    with pytest.raises(sparsehooks.RecipeError, match="unknown key 'opst'; did you mean 'opset'"):
        export(folder, tmp_path / "out", opst=20)
    with pytest.raises(sparsehooks.RecipeError, match="use 18 or more"):
        export(folder, tmp_path / "out", opset=9)

    def fails(*args, **kwargs):
        raise RuntimeError("no such operator\nand a lot more")

    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", fails)
        with pytest.raises(
            sparsehooks.ArtifactError, match=r"cannot export BertForSequenceClassification .* operator;"
        ):
            export(folder, tmp_path / "out")
    sparsehooks.save_pretrained(torch.nn.Linear(4, 4), tmp_path / "plain")
    with pytest.raises(sparsehooks.ArtifactError, match="is no model of transformers"):
        export(tmp_path / "plain", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(sparsehooks.PluginError, match="run 'pip install onnx onnxscript'"):
            export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_wrong_is_not_kept(tmp_path, monkeypatch):
    folder = save(bert(), tmp_path / "saved", {"quantize": "int8"})
    monkeypatch.setattr(module, "TOLERANCE", dict.fromkeys(module.TOLERANCE, -1.0))
    with pytest.raises(sparsehooks.ArtifactError, match="too far, so nothing is written"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(folder, tmp_path / "out", check=False).endswith("; not compared with the model")


def test_it_keeps_the_contract():
    check_component(sparsehooks.PluginManager([plugin]).catalog, "exporter", "onnx")


def test_the_command_line(tmp_path):
    folder = save(bert(), tmp_path / "saved", {"quantize": "int8"})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = ("--format", "onnx", "--set", "architecture=BertModel", "--set", "check=false", "-p", plugin.__name__)
    line = [sys.executable, "-m", "sparsehooks", "export", folder, "--out", tmp_path / "out", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "BertModel, input_ids, attention_mask, token_type_ids to last_hidden_state, pooler_output" in done.stdout


def test_importing_it_imports_neither_torch_nor_onnx():
    code = (
        "import sys, sparsehooks_onnx\n"
        "from sparsehooks import PluginManager\n"
        "manager = PluginManager([sparsehooks_onnx], autoload=False)\n"
        "assert not manager.broken(), manager.broken()\n"
        "print([m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    )
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert run.stdout.strip() == "[]"


def test_grids_of_inputs_are_refused(tmp_path):
    folder = save(bert(), tmp_path / "saved", {"quantize": "int8"}, {"activation": "int8"})
    with pytest.raises(sparsehooks.ArtifactError, match="puts its inputs on a grid, which"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
