"""Adapters on an opened artifact: the base stays sparse, and what is saved of the adapter stays plain."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import copied, linear_weights, prune, same_state, sentences, tiny_llama
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import peft

import sparsehooks

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.stack([row["input_ids"] for row in sentences(4)])
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def saved(tmp_path):
    """The model and the folder of an artifact."""
    return sparsehooks.compress(tiny_llama(), prune(0.8), out=tmp_path / "a"), tmp_path / "a"


@pytest.fixture
def adapted(saved, tmp_path):
    """An opened artifact with a trained adapter, and the folder of the adapter."""
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(saved[1]), LoraConfig(**LORA))
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted.eval(), tmp_path / "adapter"


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_the_base_stays_sparse_under_an_adapter(saved, adapted, tmp_path):
    model, _ = saved
    assert not torch.equal(logits(adapted[0]), logits(model))
    base = adapted[0].unload()
    assert same_state(model, base)
    base.save_pretrained(tmp_path / "b")
    assert sparsehooks.inspect(tmp_path / "b") == sparsehooks.inspect(saved[1])
    assert same_state(model, LlamaForCausalLM.from_pretrained(tmp_path / "b"))


def test_adapters_are_saved_and_loaded_by_every_door(saved, adapted):
    expected, folder = logits(adapted[0]), adapted[1]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(saved[1])
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    opened = [
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(saved[1]), folder),
        AutoPeftModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    ]
    assert all(torch.equal(logits(model), expected) for model in opened)


def test_a_merged_model_is_saved_in_the_sparse_form(saved, adapted, tmp_path):
    model, _ = saved
    expected = logits(adapted[0])
    merged = adapted[0].merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path / "b")
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "b")
    assert same_state(merged, opened)
    for name, weight in linear_weights(opened).items():
        adapted_too = "q_proj" in name or "down_proj" in name
        assert torch.equal(weight, linear_weights(model)[name]) != adapted_too
    assert 0.3 < sparsehooks.inspect(tmp_path / "b").ratio < 0.9


def test_the_adapters_of_transformers_are_saved_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "0.18")  # transformers asks for one that is not released
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=2048
    )
    sparsehooks.save_pretrained(LlamaForCausalLM(config), tmp_path / "a")
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    opened.add_adapter(LoraConfig(r=32, target_modules=["up_proj"]))  # half of its weights are zeros, worth encoding
    opened.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {(tensor.dtype, tensor.dim()) for tensor in tensors.values()} == {(torch.float32, 2)}
    again = LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    again.load_adapter(tmp_path / "adapter")
    assert {weight.dtype for weight in again.parameters()} == {torch.bfloat16}
    assert same_state({name: weight.to(torch.bfloat16) for name, weight in copied(opened).items()}, again)


def test_an_adapter_stays_beside_layers_that_a_backend_runs(adapted):
    model, _ = adapted
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        verdicts = sparsehooks.accelerate_model(model, "dense_packed", exclude=["*lora*", "*lm_head"])
        assert verdicts.stays == {}
        assert any("base_layer" in name for name in verdicts)
        after = model(input_ids=TOKENS).logits
        sparsehooks.restore_model(model)
        assert torch.equal(model(input_ids=TOKENS).logits, before)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
