"""Shrinking: what is masked as a whole leaves the model, the outputs stay, and the folder opens again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import VOCABULARY, same_state, tiny_bert, tiny_llama
from torch import nn
from torch.nn import functional as F

import sparsehooks
from sparsehooks import targets
from sparsehooks.artifact.quantizer import SparseHooksConfig, arm
from sparsehooks.builtin.patterns.coupled import Channel, Head, Layer
from sparsehooks.builtin.patterns.tiles import Column, Row
from sparsehooks.errors import ArtifactError
from sparsehooks.shrinking import resize, shrink

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
PATTERNS = {"head": Head, "channel": Channel, "layer": Layer}
POST_NORM = {"bert", "roberta", "distilbert"}


def _bert():
    return tiny_bert(transformers.BertForSequenceClassification)


def _roberta():
    config = transformers.RobertaConfig(**TEXT, **SIZES, pad_token_id=1)
    return transformers.RobertaForMaskedLM(config)


def _distilbert():
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=VOCABULARY, dim=64, n_heads=4, n_layers=3, hidden_dim=96)
    )


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True
    )
    return transformers.GPT2LMHeadModel(config)


def _qwen(version):
    config = getattr(transformers, f"Qwen{version}Config")(
        **TEXT,
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=4,
    )
    return getattr(transformers, f"Qwen{version}ForCausalLM")(config)


def _mistral():
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**TEXT, **SIZES, num_key_value_heads=2, sliding_window=4)
    )


def _vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=4))


def _t5(gated):
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _phi3():
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**TEXT, **SIZES, pad_token_id=0))


def _modernbert():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return transformers.ModernBertModel(transformers.ModernBertConfig(**TEXT, **SIZES, **special))


def _bart():
    config = transformers.BartConfig(
        **TEXT,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        pad_token_id=1,
    )
    return transformers.BartModel(config)


OTHERS = {"phi3": _phi3, "modernbert": _modernbert, "bart": _bart}
MODELS = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": tiny_llama,
    "qwen2": lambda: _qwen(2),
    "qwen3": lambda: _qwen(3),
    "mistral": _mistral,
    "vit": _vit,
    "t5": lambda: _t5(gated=False),
    "t5-gated": lambda: _t5(gated=True),
}


def made(name):
    torch.manual_seed(0)
    return randomized({**MODELS, **OTHERS}[name]())


def randomized(model):
    """Biases that are not zero, norms that are not one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += torch.rand(module.running_mean.shape, generator=generator)
            module.running_var += torch.rand(module.running_var.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def outputs(model):
    generator = torch.Generator().manual_seed(2)
    if not isinstance(model, transformers.PreTrainedModel):
        return model(torch.randn((2, 3, 8, 8), generator=generator))
    if model.main_input_name == "pixel_values":
        return model(torch.randn((2, 3, 16, 16), generator=generator))[0]
    ids = torch.randint(2, VOCABULARY, (3, 10), generator=generator)
    mask = (torch.arange(10) < torch.tensor([[10], [8], [7]])).long()
    extra = {"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {}
    result = model(input_ids=ids, attention_mask=mask, **extra)
    return (result.logits if hasattr(result, "logits") else result.last_hidden_state)[:, :6]


def masked(model, pattern, chosen, exclude=("lm_head", "*classifier", "*pooler*", "lm_head.decoder")):
    """Mask units of a pattern in the model: ``chosen`` makes the bool mask of a number of units."""
    named = {type(module).__name__ for module in model.modules()}
    kinds = [kind for kind in ("Linear", "Conv1D", "Conv2d") if kind in named]
    found, _ = targets.find(model, kinds, exclude)
    assert pattern.couple(model, found) == []
    weights = dict(model.named_parameters())
    scores = {target.parameter: target.matrix(weights[target.parameter].detach()).abs() for target in found}
    units = pattern.units(scores)
    assert units
    keep = {key: chosen(unit.numel()).reshape(unit.shape) for key, unit in units.items()}
    by_name = {target.parameter: target for target in found}
    masks = {
        name: by_name[name].restore(mask).contiguous() if name in by_name else mask
        for name, mask in pattern.expand(keep, scores).items()
    }
    for name, mask in masks.items():
        assert mask.shape == weights[name].shape
        weights[name].data *= mask
    return masks


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def all_but_first_and_fourth(count):
    return ~torch.isin(torch.arange(count), torch.tensor([0, 3]))


def skipped(model, name, indices):
    """The same model without some of its blocks, which hand on what they get."""

    def skip(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    blocks = model.get_submodule(name)
    return [blocks[index].register_forward_hook(skip, with_kwargs=True) for index in indices]


@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay(name, kind, tmp_path):
    model = made(name)
    whole, parameters = size(model), {id(parameter) for parameter in model.parameters()}
    masks = masked(model, PATTERNS[kind](), all_but_first_and_fourth)
    before = outputs(model)
    shrunk = shrink(model, masks)
    assert size(model) < whole
    assert {id(parameter) for parameter in model.parameters()} == parameters
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="cut nothing"):
        again = shrink(model, {})
    assert again == json.loads(json.dumps(shrunk))  # the description is of the model, not of the change
    reopened(model, shrunk, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_layers_go(name, tmp_path):
    model = made(name)
    whole = size(model)
    pattern = Layer()
    reference = made(name)
    masks = masked(model, pattern, all_but_first_and_fourth)
    expected = outputs(model)
    if name in POST_NORM:
        for coupling in pattern.couplings:
            skipped(reference, coupling.name, [0])
        expected = outputs(reference)
    shrunk = shrink(model, masks)
    assert size(model) < whole
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    assert shrunk["layers"] == {coupling.name: coupling.units - 1 for coupling in pattern.couplings}
    reopened(model, shrunk, tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_factors_in_one_layer_and_an_encoder_with_a_decoder(name, tmp_path):
    test_outputs_stay(name, "channel", tmp_path)


def reopened(model, shrunk, folder):
    arm(model, SparseHooksConfig(shrunk=shrunk))
    sparsehooks.save_pretrained(model, folder / "model")
    opened = type(model).from_pretrained(folder / "model")
    assert same_state(opened, model)
    assert torch.equal(outputs(opened), outputs(model))
    transformers.AutoModel.from_pretrained(folder / "model")
    return opened


# ------------------------------------------------------------------------------------------ plain modules


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class TinyResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 12, 2), Block(12, 12))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class TinyLeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(8 * 4, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(torch.sigmoid(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc2(torch.tanh(self.fc1(x)))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(F.silu(self.point(self.deep(self.first(x))))).mean((2, 3))


PLAIN = {"resnet": TinyResNet, "lenet": TinyLeNet, "depthwise": Depthwise}


def plain(name):
    torch.manual_seed(0)
    return randomized(PLAIN[name]())


@pytest.mark.parametrize("name", PLAIN)
def test_channels_of_plain_modules(name, tmp_path):
    model, pattern = plain(name), Channel()
    whole = size(model)
    masks = masked(model, pattern, all_but_first_and_fourth, exclude=())
    before = outputs(model)
    shrunk = shrink(model, masks)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    assert size(model) < whole
    other = PLAIN[name]()
    resize(other, shrunk)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other.eval()), outputs(model))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == module.weight.shape[:2]
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean) == len(module.weight)
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()


def test_sums_join_channels():
    pattern = Channel()
    model = plain("resnet")
    found, _ = targets.find(model, ["Conv2d", "Linear"], [])
    assert pattern.couple(model, found) == []
    assert [coupling.name for coupling in pattern.couplings] == [
        "stem.0",
        "blocks.0.conv1",
        "blocks.1.conv1",
        "blocks.1.conv2",
        "blocks.2.conv1",
    ]
    assert {member.parameter for member in pattern.couplings[0].weights} == {
        "stem.0.weight",
        "blocks.0.conv1.weight",
        "blocks.0.conv2.weight",
        "blocks.1.conv1.weight",
        "blocks.1.shortcut.0.weight",
    }


def test_grouped_convolutions_stay_whole():
    pattern = Channel()
    model = plain("depthwise")
    found, _ = targets.find(model, ["Conv2d"], [])
    assert pattern.couple(model, found) == []
    assert [coupling.name for coupling in pattern.couplings] == ["point"]


# ----------------------------------------------------------------------------------------- rows and columns


def some(count):
    return torch.arange(count) % 4 != 1


@pytest.mark.parametrize("pattern", [Row, Column])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "vit", "t5", "llama"])
def test_rows_and_columns_of_feed_forward_layers_go(name, pattern):
    model = made(name)
    whole = size(model)
    names = {"bert": "intermediate", "distilbert": "lin1", "gpt2": "c_fc", "vit": "fc1", "t5": "wi", "llama": "up_proj"}
    consumers = {"bert": "output", "distilbert": "lin2", "gpt2": "mlp.c_proj", "vit": "fc2", "t5": "wo"}
    place = names[name] if pattern is Row else consumers.get(name, "down_proj")
    masks = {}
    for parameter, value in model.named_parameters():
        wide = (96, 128, 256)  # features inside the feed-forward layers
        if f"{place}." not in parameter or value.dim() != 2:
            continue
        transposed = name == "gpt2"
        matrix = value.data.t() if transposed else value.data
        if matrix.shape[0 if pattern is Row else 1] not in wide:
            continue
        keep = some(matrix.shape[0 if pattern is Row else 1])
        mask = (keep[:, None] if pattern is Row else keep[None]).expand(matrix.shape)
        masks[parameter] = (mask.t() if transposed else mask).contiguous()
        value.data *= masks[parameter]
    assert masks
    before = outputs(model)
    assert shrink(model, masks)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    assert size(model) < whole


def test_constants_move_into_the_bias_of_plain_layers():
    model = plain("lenet")
    masks = {}
    for name in ("conv1", "conv2", "fc1"):
        weight = model.get_submodule(name).weight
        mask = some(len(weight)).reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight).contiguous()
        weight.data *= mask
        masks[f"{name}.weight"] = mask
    before = outputs(model)
    shrink(model, masks)
    assert [len(model.get_submodule(name).weight) for name in ("conv1", "conv2", "fc1")] == [4, 8, 7]
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)


def test_constants_pass_the_threshold_of_the_next_layer():
    def compressed(*more):
        model = tiny_bert()
        for layer in model.encoder.layer:
            torch.nn.init.normal_(layer.intermediate.dense.bias, std=0.5)
        stages = [
            {"prune": "magnitude", "pattern": "row", "sparsity": 0.5, "targets": ["*intermediate.dense"]},
            {"activation": "teal", "sparsity": 0.6, "targets": ["*.output.dense"], "exclude": ["*attention*"]},
            *more,
        ]
        ids = torch.randint(2, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
        model = sparsehooks.compress(model, {"stage": stages}, calibration=[{"input_ids": ids}])
        return model.eval()(input_ids=ids).last_hidden_state

    torch.testing.assert_close(compressed({"shrink": True}), compressed(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- sessions


def recipe(pattern, **options):
    stage = {
        "prune": "magnitude",
        "pattern": pattern,
        "sparsity": 0.5,
        "exclude": ["lm_head", "*pooler*", "classifier"],
    }
    stage |= {"schedule": {"use": "cubic", "start": 0.0, "end": 0.75, "every": 1}, **options}
    return {"stage": [stage, {"shrink": True}]}


def trained(model, recipe, steps=6):
    """Train a causal model; the session."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with sparsehooks.attach(model, optimizer, recipe, total_steps=steps) as session:
        for step in range(steps):
            ids = torch.randint(2, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return session


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_session_shrinks_and_saves(pattern, tmp_path):
    model = made("llama")
    whole = size(model)
    trained(model, recipe(pattern))
    assert size(model) < whole
    model.save_pretrained(tmp_path / "model")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same_state(opened, model)
    assert torch.equal(outputs(opened.eval()), outputs(model.eval()))


def test_what_was_shrunk_is_trained_and_saved_again(tmp_path):
    model = made("llama")
    trained(model, recipe("head"))
    model.save_pretrained(tmp_path / "model")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trained(opened, {"stage": recipe("unstructured")["stage"][:1]})  # a recipe that does not shrink
    opened.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same_state(again, opened)
    assert size(again) == size(model)


# --------------------------------------------------------------------------------------------------- edges


def none(count):
    return torch.zeros(count, dtype=torch.bool)


@pytest.mark.parametrize("kind", PATTERNS)
def test_one_of_everything_stays(kind):
    model = made("llama")
    masks = masked(model, PATTERNS[kind](), none)
    before = outputs(model)
    shrink(model, masks)
    attention = model.model.layers[0].self_attn
    assert len(model.model.layers) == (1 if kind == "layer" else 2)
    assert attention.k_proj.out_features == (32 if kind == "channel" else 16)
    if kind != "layer":
        torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)


def test_nothing_to_cut():
    model = made("bert")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    half = {"bert.encoder.layer.0.attention.self.query.weight": torch.zeros(64, 64, dtype=torch.bool)}
    for masks in ({}, half):  # without its queries' rows a head still gives its values' mean
        with pytest.warns(UserWarning, match="cut nothing: no block, head or channel is masked as a whole"):
            assert shrink(model, masks) == {}
    assert same_state(model, state)
    assert "shrunk" not in SparseHooksConfig(shrunk={}).to_dict()


def test_everything_together_and_twice(tmp_path):
    model = made("qwen3")
    masks = masked(model, Layer(), lambda count: torch.arange(count) != 1)
    masks |= masked(model, Head(), lambda count: torch.arange(count) != 0, exclude=("lm_head", "model.layers.1.*"))
    before = outputs(model)
    first = shrink(model, masks)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    assert model.config.layer_types == ["full_attention", "full_attention"]
    model = reopened(model, first, tmp_path)
    model.eval()
    masks = masked(model, Channel(), all_but_first_and_fourth)
    before = outputs(model)
    second = shrink(model, masks)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    assert second["layers"] == first["layers"]
    assert first["modules"].keys() < second["modules"].keys()
    reopened(model, second, tmp_path / "again")


def test_generation_with_a_cache():
    model = made("llama")
    masks = masked(model, Head(), all_but_first_and_fourth)
    masks |= masked(model, Layer(), lambda count: torch.arange(count) > 0)
    prompt = torch.arange(2, 8)[None]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **settings)
    shrink(model, masks)
    assert torch.equal(model.generate(prompt, **settings), before)


OPEN = """
import sys, torch, sparsehooks, transformers
for place, name in zip(sys.argv[1::2], sys.argv[2::2]):
    given = torch.load(place + ".pt")
    for cls in (transformers.AutoModel, getattr(transformers, name)):
        model = cls.from_pretrained(place).eval()
        with torch.no_grad():
            outputs = model(**given["inputs"], output_hidden_states=True)
        states = outputs.decoder_hidden_states if model.config.is_encoder_decoder else outputs.hidden_states
        assert torch.equal(states[-1], given["states"]), name
"""


@pytest.mark.parametrize("kinds", [("head", "channel"), ("layer", "head", "channel")])
def test_opens_in_another_process(kinds, tmp_path):
    places = []
    for name in MODELS:
        model = made(name)
        masks = {}
        for kind in kinds:
            for key, mask in masked(model, PATTERNS[kind](), all_but_first_and_fourth).items():
                masks[key] = masks[key] & mask if key in masks else mask
        shrunk = shrink(model, masks)
        arm(model, SparseHooksConfig(shrunk=shrunk))
        place = tmp_path / name
        sparsehooks.save_pretrained(model, place)
        inputs = {"input_ids": torch.arange(2, 12)[None]}
        if model.main_input_name == "pixel_values":
            inputs = {"pixel_values": torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.arange(5)[None]
        with torch.no_grad():
            result = model(**inputs, output_hidden_states=True)
        states = result.decoder_hidden_states if model.config.is_encoder_decoder else result.hidden_states
        torch.save({"inputs": inputs, "states": states[-1]}, f"{place}.pt")
        places += [str(place), type(model).__name__]
    result = subprocess.run([sys.executable, "-c", OPEN, *places], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    "shrunk",
    [
        [],
        {"more": {}},
        {"modules": []},
        {"layers": {"bert.encoder.layer": 0}},
        {"modules": {QUERY: []}},
        {"modules": {QUERY: {"code": {}}}},
        {"modules": {QUERY: {"shapes": []}}},
        {"modules": {QUERY: {"shapes": {"weight": 32}}}},
        {"modules": {QUERY: {"shapes": {"weight": [32, -1]}}}},
        {"modules": {QUERY: {"shapes": {"weight": [32, True]}}}},
        {"modules": {QUERY: {"attributes": {"forward": 1}}}},
        {"modules": {QUERY: {"attributes": {"out_features": "32"}}}},
        {"modules": {QUERY: {"attributes": {"out_features": 0}}}},
    ],
)
def test_damaged_descriptions(shrunk):
    with pytest.raises(ArtifactError, match=r"config.json: quantization_config is damaged: .*shrunk.*; get the file"):
        SparseHooksConfig(shrunk=shrunk)


@pytest.mark.parametrize(
    "shrunk",
    [
        {"layers": {"bert.encoder.layer": 1}},
        {"layers": {"bert.encoder": 1}},
        {"modules": {QUERY: {"shapes": {"weight": [32]}}}},
        {"modules": {QUERY: {"shapes": {"weight": [1 << 40, 64]}}}},
        {"modules": {QUERY: {"shapes": {"else": [32, 64]}}}},
        {"modules": {QUERY: {"attributes": {"num_heads": 1}}}},
    ],
)
def test_descriptions_that_do_not_fit(shrunk, tmp_path):
    model = made("bert")
    sparsehooks.save_pretrained(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["shrunk"] = shrunk
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"config.json is damaged: .*'shrunk'.*; get the file again"):
        type(model).from_pretrained(tmp_path / "model")


def test_a_decompressed_folder_of_a_shrunk_model_opens(tmp_path):
    model, recipe = made("llama"), {"stage": [{"prune": "magnitude", "pattern": "head", "sparsity": 0.5}]}
    recipe["stage"] += [{"shrink": True}]
    recipe["stage"][0]["targets"] = ["*self_attn*"]
    sparsehooks.compress(model, recipe, out=tmp_path / "sparse")
    sparsehooks.decompress(tmp_path / "sparse", tmp_path / "dense")
    opened = type(model).from_pretrained(tmp_path / "dense")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.state_dict().items())
    assert sum(weight.numel() for weight in opened.parameters()) < sum(w.numel() for w in made("llama").parameters())


@pytest.mark.parametrize("quantize", [{"use": "kmeans", "bits": 3}, {"use": "lsq", "bits": 4}, "int4"], ids=str)
def test_what_was_trained_on_a_grid_stays_there_when_the_model_shrinks(quantize):
    model = tiny_bert().eval()
    recipe = {
        "stage": [
            {"prune": "magnitude", "pattern": "channel", "sparsity": 0.3, "targets": ["*intermediate.dense"]},
            {"quantize": quantize, "exclude": ["*pooler*"]},
            {"shrink": True},
        ]
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = {"input_ids": torch.arange(1, 13)[None]}
    with sparsehooks.attach(model, optimizer, recipe, total_steps=3):
        for _ in range(3):
            model(**batch)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            during = model(**batch)[0]
    assert model.encoder.layer[0].intermediate.dense.out_features < 128
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], during, rtol=1e-5, atol=1e-5)
