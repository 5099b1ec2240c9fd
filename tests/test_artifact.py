"""Artifacts at the boundary that users touch: ``from_pretrained``, ``save_pretrained`` and other processes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import copied, prune, same_state, tiny_bert, tiny_classifier, tiny_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import sparsehooks
from sparsehooks import ArtifactError, SparseHooksError

RECIPE = {"stage": [*prune(0.8)["stage"], {"quantize": "int8", "targets": ["Linear", "Embedding"]}]}

MODELS = {
    "bert": (AutoModelForSequenceClassification, tiny_classifier),
    "bert bf16": (AutoModelForSequenceClassification, lambda: tiny_classifier().to(torch.bfloat16)),
    "llama": (AutoModelForCausalLM, tiny_llama),
    "llama bf16": (AutoModelForCausalLM, lambda: tiny_llama(dtype=torch.bfloat16)),
    "tied llama": (AutoModelForCausalLM, lambda: tiny_llama(tied=True)),
    "tied llama bf16": (AutoModelForCausalLM, lambda: tiny_llama(tied=True, dtype=torch.bfloat16)),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A compressed model, the class that opens it, and the folder."""
    cls, make = MODELS[request.param]
    recipe = RECIPE
    if request.param.startswith("tied"):  # the embedding is quantized together with the head it is tied to
        recipe = {"stage": [RECIPE["stage"][0], {"quantize": "int8", "targets": ["Linear", "Embedding"]}]}
    model = sparsehooks.compress(make(), recipe)
    sparsehooks.save_pretrained(model, tmp_path / "artifact")
    return model, cls, tmp_path / "artifact"


def test_it_reopens_bit_for_bit_and_saves_again(saved, tmp_path):
    model, cls, folder = saved
    opened = cls.from_pretrained(folder)
    assert same_state(model, opened)
    assert all(parameter.requires_grad for parameter in opened.parameters())
    opened.save_pretrained(tmp_path / "again")
    assert sparsehooks.inspect(tmp_path / "again").bytes == sparsehooks.inspect(folder).bytes
    assert same_state(model, cls.from_pretrained(tmp_path / "again"))


def test_it_reopens_from_shards(saved, tmp_path):
    model, cls, _ = saved
    sparsehooks.save_pretrained(model, tmp_path / "shards", max_shard_size="8kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same_state(model, cls.from_pretrained(tmp_path / "shards"))
    sparsehooks.verify(tmp_path / "shards")


def test_it_decompresses_to_a_dense_folder(saved, tmp_path):
    model, cls, folder = saved
    sparsehooks.decompress(folder, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert same_state(dense, {name: model.state_dict()[name] for name in dense})
    assert same_state(model, cls.from_pretrained(tmp_path / "dense"))


def test_it_is_smaller_than_the_dense_file(tmp_path):
    model = tiny_classifier()
    model.save_pretrained(tmp_path / "dense")
    sparsehooks.compress(model, RECIPE, out=tmp_path / "sparse")
    dense = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert (tmp_path / "sparse" / "model.safetensors").stat().st_size < dense


def test_without_sparsehooks_it_fails_loudly(tmp_path):
    for name, (_, make) in MODELS.items():
        sparsehooks.compress(make(), RECIPE, out=tmp_path / name)
    experts = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    sparsehooks.compress(MixtralForCausalLM(experts), RECIPE, out=tmp_path / "mixtral")
    code = f"""
from pathlib import Path
import accelerate, torch, transformers
from safetensors.torch import load_file
tried = 0
for folder in Path({str(tmp_path)!r}).iterdir():
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        model = cls(config)
    for door in (
        lambda: cls.from_pretrained(folder),
        lambda: transformers.AutoModel.from_pretrained(folder),
        lambda: model.load_state_dict(load_file(folder / "model.safetensors"), strict=False, assign=True),
        lambda: accelerate.load_checkpoint_in_model(model, folder, device_map={{"": "cpu"}}),
    ):
        tried += 1
        try:
            door()
        except (RuntimeError, ValueError):
            continue
        print("opened", folder)
print(tried)"""
    done = _python(code)
    assert done.stdout.strip() == str(4 * len(list(tmp_path.iterdir()))), done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import sparsehooks, transformers",
        "import transformers, sparsehooks",
        "import transformers; transformers.AutoModel; import sparsehooks",
        "import transformers.quantizers; import sparsehooks; import sparsehooks.artifact.register as r; r.register()",
    ],
)
def test_any_order_of_imports_opens_it(tmp_path, imports):
    model = sparsehooks.compress(tiny_bert(), RECIPE, out=tmp_path / "artifact")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    code = f"""{imports}
import torch
from transformers import AutoModel
opened = AutoModel.from_pretrained({str(tmp_path / "artifact")!r}).state_dict()
state = torch.load({str(tmp_path / "state.pt")!r})
assert opened.keys() == state.keys() and all(torch.equal(opened[k], state[k]) for k in state)
print("equal")"""
    done = _python(code)
    assert done.stdout.strip() == "equal", done.stderr


def test_importing_sparsehooks_imports_neither_torch_nor_transformers():
    code = "import sys, sparsehooks; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert _python(code).stdout.strip() == "set()"


def test_a_failing_registration_is_one_warning_and_never_a_broken_transformers():
    code = """
import sys, warnings
import sparsehooks
sys.modules['sparsehooks.artifact.quantizer'] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import transformers.quantizers
    from transformers import AutoModel
print(sum('could not register' in str(w.message) for w in caught))"""
    done = _python(code)
    assert done.stdout.strip() == "1", done.stderr


def test_the_opened_model_is_an_ordinary_one(tmp_path):
    sparsehooks.compress(tiny_classifier(), RECIPE, out=tmp_path / "a")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert type(opened) is BertForSequenceClassification
    assert opened.half().dtype == torch.float16
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    state = copied(dense)
    dense.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    assert same_state(load_file(tmp_path / "dense" / "model.safetensors"), state)
    mapped = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", device_map="cpu")
    assert same_state(mapped, state)


def test_the_base_model_opens_from_a_task_model(tmp_path):
    model = sparsehooks.compress(tiny_classifier(), RECIPE, out=tmp_path / "a")
    assert same_state(AutoModel.from_pretrained(tmp_path / "a"), model.bert)


def test_a_plain_module_is_saved_and_decompressed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    sparsehooks.compress(model, {"stage": [{"prune": "magnitude", "sparsity": 0.9}]}, out=tmp_path / "a")
    sparsehooks.decompress(tmp_path / "a", tmp_path / "dense")
    assert same_state(load_file(tmp_path / "dense" / "model.safetensors"), dict(model.state_dict()))
    assert sparsehooks.inspect(tmp_path / "a").ratio < 0.3


def lenet_300_100():
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def lenet_5():
    convolutions = nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*convolutions, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


@pytest.mark.parametrize(
    ("make", "parameters", "densities", "times"),
    [
        (lenet_300_100, 266_610, (0.05, 0.05, 0.05), 50),
        (lenet_300_100, 266_610, (0.02, 0.02, 0.02), 100),
        (lenet_5, 431_080, (0.3, 0.08, 0.01, 0.1), 100),
    ],
)
def test_a_small_model_takes_little_more_than_the_entropy_of_its_weights(make, parameters, densities, times, tmp_path):
    """Sparse weights with a codebook of 4 bits, biases, checksums and all names are in the file."""
    torch.manual_seed(0)
    model, least = make(), 0.0
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    for weight, density in zip(weights, densities, strict=True):
        kept = torch.randperm(weight.numel())[: round(density * weight.numel())]
        index = torch.randn(len(kept)).mul_(3).add_(8).clamp_(0, 15).long()
        weight.data = torch.zeros(weight.numel()).index_copy_(0, kept, torch.randn(16)[index]).view(weight.shape)
        counts = torch.unique(weight.data, return_counts=True)[1].double()
        least += float((counts * torch.log2(weight.numel() / counts)).sum()) / 8
    sparsehooks.save_pretrained(model, tmp_path / "small", level="small")
    assert same_state(sparsehooks.load_state_dict(tmp_path / "small"), model.state_dict())
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert 4 * parameters / size >= times
    vectors = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    # the header has about 100 bytes a tensor, a blob 100 and a table of 64
    assert size <= 1.02 * least + vectors + 120 * len(list(model.parameters())) + 170 * len(weights)


def test_negative_zeros_of_pruned_weights_become_positive(tmp_path):
    model = tiny_bert()
    weight = model.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.mul_(weight.abs() > weight.abs().median())
    assert (torch.signbit(weight) & (weight == 0)).any()
    sparsehooks.save_pretrained(model, tmp_path / "a")
    opened = AutoModel.from_pretrained(tmp_path / "a").encoder.layer[0].output.dense.weight
    assert torch.equal(opened, weight)
    model = sparsehooks.compress(tiny_bert(), prune())
    zero = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert not any((torch.signbit(t) & (t == 0)).any() for name, t in zero.items() if "dense.weight" in name)


def test_hooks_add_metadata_that_the_artifact_keeps(tmp_path):
    class Signed:
        @sparsehooks.hookimpl
        def artifact_metadata(self, session):
            return {"sparsity": f"{session.sparsity:.2f}"}

    sparsehooks.compress(tiny_bert(), RECIPE, out=tmp_path / "a", plugins=[Signed()])
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["plugins"] == {"Signed": {"sparsity": "0.80"}}
    opened = AutoModel.from_pretrained(tmp_path / "a")
    opened.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"] == config


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "version"])
def test_a_damaged_artifact_is_refused(tmp_path, damage):
    sparsehooks.compress(tiny_bert(), RECIPE, out=tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        tensors = load_file(path)
        name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.uint8)
        at = data.find(tensors[name].numpy().tobytes())
        data[at + tensors[name].numel() - 100] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "remove":
        path.unlink()
    else:
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        config["quantization_config"]["version"] = "99"
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises((ArtifactError, RuntimeError, OSError, SafetensorError)):
        AutoModel.from_pretrained(tmp_path / "a")
    if damage != "version":
        with pytest.raises(ArtifactError):
            sparsehooks.verify(tmp_path / "a")
        with pytest.raises(ArtifactError):
            sparsehooks.decompress(tmp_path / "a", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_tensor_swapped_between_two_artifacts_is_found(tmp_path):
    for seed in (1, 2):
        sparsehooks.compress(tiny_bert(seed=seed), RECIPE, out=tmp_path / str(seed))
    first = load_file(tmp_path / "1" / "model.safetensors")
    second = load_file(tmp_path / "2" / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    first[name] = second[name]
    from safetensors import safe_open

    with safe_open(tmp_path / "1" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(first, tmp_path / "1" / "model.safetensors", metadata=metadata)
    with pytest.raises(ArtifactError, match=name):
        sparsehooks.verify(tmp_path / "1")


def test_outputs_that_hold_something_else_stay_untouched(tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="already holds"):
        sparsehooks.compress(tiny_bert(), RECIPE, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (out / "notes.txt").read_text() == "keep me"


def test_an_earlier_artifact_is_replaced_as_a_whole(tmp_path):
    sparsehooks.compress(tiny_llama(), prune(0.5), out=tmp_path / "a")
    model = sparsehooks.compress(tiny_bert(), RECIPE, out=tmp_path / "a")
    assert same_state(model, AutoModel.from_pretrained(tmp_path / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError) as raised:
        sparsehooks.compress(tiny_bert(), RECIPE, out=tmp_path / "file" / "model")
    assert "\n" not in str(raised.value)


def test_compress_takes_the_tokenizers_files_along(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "1_Pooling").mkdir()
    (tmp_path / "dense" / "1_Pooling" / "config.json").write_text("{}")
    sparsehooks.compress(tmp_path / "dense", RECIPE, out=tmp_path / "a")
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "a" / "1_Pooling" / "config.json").is_file()


def test_compress_names_what_it_cannot_open(tmp_path):
    with pytest.raises(SparseHooksError, match="no-such-model"):
        sparsehooks.compress(tmp_path / "no-such-model", RECIPE)
    with pytest.raises(sparsehooks.PlanError, match="distillation needs training"):
        sparsehooks.compress(tiny_bert(), {"stage": [{"distill": "hidden"}]})
    with pytest.warns(UserWarning, match="calibration"):
        sparsehooks.compress(tiny_bert(), RECIPE, calibration=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    scored = {"stage": [{"prune": "wanda", "sparsity": 0.5}]}
    with pytest.raises(sparsehooks.PlanError, match="there is no batch in it"):
        sparsehooks.compress(tiny_bert(), scored, calibration=[])


def _python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_every_flipped_byte_of_the_data_is_found_when_it_opens(tmp_path):
    sparsehooks.compress(tiny_bert(), RECIPE, out=tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(start, len(whole), (40,), generator=generator).tolist():
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ArtifactError, match="is damaged"):
            AutoModel.from_pretrained(tmp_path / "a")
    path.write_bytes(whole)
    AutoModel.from_pretrained(tmp_path / "a")


def test_a_broken_codec_plugin_stops_nothing_that_does_not_need_it(tmp_path):
    model = sparsehooks.compress(tiny_bert(), RECIPE, out=tmp_path / "a")
    (tmp_path / "mine.py").write_text(
        "from sparsehooks import Component, hookimpl\n"
        "@hookimpl\n"
        "def register_components(registry):\n"
        "    registry.add(Component('codec', 'mine', 'nowhere:Codec', 'broken'))\n"
    )
    torch.save(model.state_dict(), tmp_path / "state.pt")
    code = f"""import torch, warnings, sparsehooks
from transformers import AutoModel
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    opened = AutoModel.from_pretrained({str(tmp_path / "a")!r}).state_dict()
assert any("the codec 'mine' is not used" in str(w.message) for w in caught)
state = torch.load({str(tmp_path / "state.pt")!r})
assert all(torch.equal(opened[k], state[k]) for k in state)
print("equal")"""
    done = _python(code, SPARSEHOOKS_PLUGINS=f"{tmp_path / 'mine.py'},no:backends")
    assert done.stdout.strip() == "equal", done.stderr


def test_what_else_lies_in_a_replaced_folder_stays(tmp_path):
    out = tmp_path / "a"
    sparsehooks.compress(tiny_bert(), RECIPE, out=out)
    (out / "train.py").write_text("mine")
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config.json").write_text("{}")
    sparsehooks.save_pretrained(tiny_llama(), out)
    assert (out / "train.py").read_text() == "mine"
    assert (out / "1_Pooling" / "config.json").is_file()
    assert same_state(tiny_llama(), AutoModelForCausalLM.from_pretrained(out))


def test_a_plain_module_with_tied_weights_is_saved(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    sparsehooks.save_pretrained(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert same_state(stored, dict(model.state_dict()))


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path):
    model = sparsehooks.compress(tiny_llama(), prune(0.5))
    other = {name: tensor + 1.0 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=other)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path), other)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(tmp_path, copies):
    model = sparsehooks.compress(tiny_llama(), prune(0.5))
    other = copies(model)
    with torch.no_grad():
        other.lm_head.weight.fill_(1.0)
    other.save_pretrained(tmp_path)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path), other)
    assert not same_state(model, other)
