"""Calibration: what is collected equals what a few lines compute, padding does not count, and a block at a time."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from sparsehooks import PlanError, SessionError, compress
from sparsehooks.batches import Batches, measuring
from sparsehooks.collecting import Collector, tokens_of, unsupported
from sparsehooks.components import Need
from sparsehooks.targets import find
from sparsehooks.walking import Blocks, block_lists
from tests.helpers import tiny_bert, tiny_classifier, tiny_llama

EXCLUDE = ["*embed*", "*pooler*", "lm_head", "classifier"]
SPARSEGPT = {"prune": "sparsegpt", "sparsity": 0.5, "solver": "sparsegpt", "exclude": EXCLUDE}
WANDA = {
    "prune": "wanda",
    "sparsity": 0.5,
    "pattern": {"use": "unstructured", "per": "row"},
    "exclude": EXCLUDE,
}


def batches(count=3, *, labels=False, padded=True):
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(8, 12, dtype=torch.long)
        if padded:
            mask[4:, 8:] = 0
        batch = {"input_ids": torch.randint(1, 50, (8, 12), generator=generator), "attention_mask": mask}
        found.append({**batch, "labels": torch.arange(8) % 2} if labels else batch)
    return found


def collect(model, targets, data, *, gram=True):
    runs, collector = Batches(model, data), Collector(model, targets, {Need.GRAM} if gram else ())
    with measuring(model), torch.no_grad(), collector.hooked():
        for index in range(len(runs)):
            collector.batch(runs.padding(index))
            runs.forward(index)
    return collector


def test_padding_does_not_count_and_query_key_and_value_share():
    model = tiny_bert()
    targets, _ = find(model, ["Linear"], EXCLUDE)
    seen = []
    module = model.get_submodule("encoder.layer.0.attention.self.key")
    with measuring(model), torch.no_grad():
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for batch in batches():
            model(**batch)
        handle.remove()
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches(), strict=True)])
    collector = collect(model, targets, batches())
    by_name = {target.modules[0]: target for target in targets}
    evidence = collector.evidence(by_name["encoder.layer.0.attention.self.key"])
    assert torch.allclose(evidence["gram"], rows.t() @ rows / len(rows), atol=1e-5)
    assert torch.allclose(evidence["input_norm"], rows.square().mean(dim=0).sqrt(), atol=1e-5)
    moments = [collector._moments[f"encoder.layer.0.attention.self.{n}"] for n in ("query", "key", "value")]
    assert moments[0] is moments[1] is moments[2]
    only = collect(model, targets, batches(), gram=False).evidence(by_name["encoder.layer.0.attention.self.key"])
    assert torch.allclose(only["input_norm"], evidence["input_norm"], atol=1e-5)
    assert "gram" not in only


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_blocks_give_what_the_model_gives(build):
    model = build()
    targets, _ = find(model, ["Linear"], EXCLUDE)
    names = block_lists(Batches(model, batches()), targets)
    assert len(names) == 1
    expected = []
    with measuring(model), torch.no_grad():
        handle = model.get_submodule(names[0])[-1].register_forward_hook(
            lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out)
        )
        for batch in batches():
            model(**batch)
        handle.remove()
        walk = Blocks(Batches(model, batches()), names[0])
        for block in range(len(walk.blocks)):
            walk.advance(walk.run(block))
    for mine, other in zip(walk._hidden, expected, strict=True):
        assert torch.equal(mine, other)


def test_the_decoder_has_a_padding_of_its_own():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    encoder = torch.tensor([[1] * 3 + [0] * 5, [1] * 8])
    decoder = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": encoder, "decoder_input_ids": ids, "decoder_attention_mask": decoder}
    targets, _ = find(model, ["Linear"], ["lm_head"])
    runs, collector = Batches(model, [batch]), Collector(model, targets)
    with measuring(model), torch.no_grad(), collector.hooked():
        collector.batch(runs.padding(0))
        runs.forward(0)
    for name, moments in collector._moments.items():
        from_encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert moments.tokens == (11 if from_encoder else 14), name


def test_an_encoder_is_walked_before_a_longer_decoder(monkeypatch):
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=2, num_decoder_layers=3)).eval()
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    model.encoder = model._modules.pop("encoder")  # neither the length nor the place in the model decides
    walked, build = [], Blocks.__init__

    def noting(self, runs, name):
        walked.append(name)
        build(self, runs, name)

    monkeypatch.setattr(Blocks, "__init__", noting)
    data = [{"input_ids": ids, "decoder_input_ids": ids}]
    compress(model, {"stage": [{**WANDA, "exclude": ["lm_head"]}]}, calibration=data)
    assert walked == ["encoder.block", "decoder.block"]
    assert model.config.use_cache
    assert model.decoder.config.use_cache


@pytest.mark.parametrize("first", ["left", "scattered"])
def test_a_solver_counts_only_what_an_earlier_run_left(first):
    model, name = tiny_bert(), "encoder.layer.0.attention.self.query.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        if first == "left":
            weight[:, : weight.shape[1] // 2] = 0.0
    stage = {"targets": ["*0.attention.self.query"], "pattern": "unstructured"}
    compress(model, {"stage": [{**stage, "prune": "magnitude", "sparsity": 0.5}]})
    gone = weight == 0
    compress(
        model,
        {"stage": [{**stage, "prune": "sparsegpt", "solver": "sparsegpt", "sparsity": 0.75}]},
        calibration=batches(),
    )
    assert int((weight == 0).sum()) == weight.numel() * 3 // 4
    assert (weight[gone] == 0).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_unfolded(stride):
    conv = nn.Conv2d(3, 5, 3, stride=stride, padding=1, padding_mode="reflect", bias=False)
    image = torch.randn(2, 3, 8, 8)
    rows = tokens_of(conv, image, None)
    expected = conv(image).flatten(2).transpose(1, 2).reshape(-1, 5)
    assert torch.allclose(rows @ conv.weight.flatten(1).t(), expected, atol=1e-5)


def test_what_calibration_does_not_see_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(5, 4), nn.Linear(4, 4))
    targets, _ = find(model, ["Conv2d", "Embedding", "Linear"], [])
    said = unsupported(model, targets)
    assert len(said) == 2
    assert "'0' is a convolution of 2 groups" in said[0]
    assert "'1' is a Embedding" in said[1]


@pytest.mark.parametrize("stage", [WANDA, SPARSEGPT], ids=["wanda", "sparsegpt"])
def test_half_of_each_layer_goes(stage):
    model = tiny_bert()
    model.train()
    compress(model, {"stage": [stage]}, calibration=batches())
    targets, _ = find(model, ["Linear"], EXCLUDE)
    for target in targets:
        weight = model.get_parameter(target.parameter)
        assert int((weight == 0).sum()) == weight.numel() // 2
    assert model.training


def test_models_without_blocks_go_layer_by_layer():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    stage = {**SPARSEGPT, "exclude": []}
    with contextlib.suppress(AttributeError):  # a plain module has no config to save; its weights are pruned by then
        compress(model, {"stage": [stage]}, calibration=data)
    assert [int((model[i].weight == 0).sum()) for i in (0, 2)] == [64, 32]


def test_gradients_of_the_loss_and_a_sentence_without_one():
    stage = {"prune": "taylor", "sparsity": 0.5, "exclude": EXCLUDE}
    compress(tiny_classifier(), {"stage": [stage]}, calibration=batches(labels=True))
    with pytest.raises(SessionError, match="outputs have no loss; put labels into the calibration batches"):
        compress(tiny_classifier(), {"stage": [stage]}, calibration=batches())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("texts.txt", "calibration: got a str; give a list of batches"),
        (Path("texts.txt"), "calibration: got a PosixPath; give a list of batches"),
        (batches()[0], "calibration: got a dict; give a list of batches"),
        (["a text", "another"], "calibration: batch 0 is a str; give dicts of tensors, such as tokenizer"),
        (
            [batches()[0], {"input_ids": [[1, 2]]}],
            "batch 1 holds no tensor ('input_ids' as list); tokenize with",
        ),
    ],
)
def test_what_is_no_batches_is_said(given, said):
    with pytest.raises(PlanError, match=re.escape(said)):
        compress(tiny_bert(), {"stage": [WANDA]}, calibration=given)


def test_batches_that_the_forward_does_not_take():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(SessionError, match=r"calibration: batch 0 does not fit the model's forward: .*'pixels'"):
        compress(model, {"stage": [{**WANDA, "exclude": []}]}, calibration=[{"pixels": torch.zeros(1, 8)}])


def test_a_solver_is_refused_where_units_reach_over_layers():
    stage = {**SPARSEGPT, "pattern": "head"}
    with pytest.raises(PlanError, match=r"recipe.stage\[0\].solver: the pattern 'head' takes slices of several layers"):
        compress(tiny_bert(), {"stage": [stage]}, calibration=batches())


def test_missing_empty_and_broken_calibration():
    with pytest.raises(PlanError, match=r"stage\[0\] prune wanda: needs calibration batches"):
        compress(tiny_bert(), {"stage": [WANDA]})
    with pytest.raises(PlanError, match="there is no batch in it"):
        compress(tiny_bert(), {"stage": [WANDA]}, calibration=[])
    model = tiny_bert()
    with torch.no_grad():
        model.encoder.layer[0].attention.output.LayerNorm.weight.fill_(float("inf"))
    with pytest.raises(SessionError, match=r"activations that enter 'encoder.layer.0.intermediate.dense'"):
        compress(model, {"stage": [WANDA]}, calibration=batches())
