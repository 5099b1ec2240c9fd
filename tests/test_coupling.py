"""Couplings: what goes together, how it is scored and masked, and what is said where nothing is known."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import VOCABULARY, tiny_bert, tiny_llama
from hypothesis import given, settings, strategies as st
from torch import nn

from sparsehooks import targets
from sparsehooks.builtin.patterns.coupled import Channel, Head, Layer
from sparsehooks.coupling import Coupling, Member, elementwise, find_couplings, keeps_zero
from sparsehooks.tracing import traced

GONE = float("-inf")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}


def coupled(model, pattern, kinds=("Linear",), exclude=()):
    found, _ = targets.find(model, kinds, exclude)
    said = pattern.couple(model, found)
    weights = dict(model.named_parameters())
    scores = {target.parameter: target.matrix(weights[target.parameter].detach()).abs() for target in found}
    return said, scores


def gpt2():
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    )


def t5():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def test_heads_with_grouped_keys():
    pattern = Head()
    said, scores = coupled(tiny_llama(), pattern, exclude=("lm_head",))
    assert said == []
    name = "model.layers.1.self_attn"
    assert [coupling.name for coupling in pattern.couplings] == ["model.layers.0.self_attn", name]
    assert pattern.couplings[1] == Coupling(
        name,
        2,
        (
            Member(f"{name}.q_proj.weight", 0, 32),
            Member(f"{name}.k_proj.weight", 0, 16),
            Member(f"{name}.v_proj.weight", 0, 16),
            Member(f"{name}.o_proj.weight", 1, 32),
        ),
        "head",
        (((Member(f"{name}.v_proj.weight", 0, 16),), (Member(f"{name}.o_proj.weight", 1, 32),)),),
    )
    units = pattern.units(scores)
    parts = [scores[f"{name}.{part}_proj.weight"] for part in "qkvo"]
    second = [parts[0][32:], parts[1][16:], parts[2][16:], parts[3][:, 32:]]
    assert units[name].shape == (2,)
    torch.testing.assert_close(units[name][1], torch.cat([part.flatten() for part in second]).mean())


def test_heads_of_a_fused_layer():
    pattern = Head()
    model = gpt2()
    said, scores = coupled(model, pattern, ("Conv1D",))
    assert said == []
    keep = {name: torch.tensor([True, False, True, True]) for name in pattern.units(scores)}
    masks = pattern.expand(keep, scores)
    rows = masks["h.0.attn.c_attn.weight"].reshape(3, 4, 16, 64)
    assert not rows[:, 1].any()
    assert rows[:, [0, 2, 3]].all()
    assert torch.equal(masks["h.0.attn.c_attn.bias"].reshape(3, 4, 16), rows[..., 0])
    assert torch.equal(masks["h.0.attn.c_proj.weight"].all(dim=0), keep["h.0.attn"].repeat_interleave(16))
    assert "h.0.attn.c_proj.bias" not in masks
    assert masks["h.0.mlp.c_fc.weight"].all()


def test_heads_that_share_a_position_bias_go_together():
    said, _ = coupled(t5(), pattern := Head(), exclude=("lm_head",))
    assert said == []
    assert [(coupling.name, coupling.units, len(coupling.weights)) for coupling in pattern.couplings] == [
        ("encoder.block.*.layer.0.SelfAttention", 4, 8),
        ("decoder.block.*.layer.0.SelfAttention", 4, 8),
        ("decoder.block.*.layer.1.EncDecAttention", 4, 8),
    ]
    followers = [member for member in pattern.couplings[0].members if member.role == "follower"]
    assert followers == [
        Member("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1, role="follower")
    ]


def test_masks_of_biases_belong_to_targets():
    pattern = Head()
    said, scores = coupled(tiny_bert(), pattern, exclude=("*query",))
    assert said == []
    masks = pattern.expand({name: torch.tensor([True, False]) for name in pattern.units(scores)}, scores)
    name = "encoder.layer.0.attention.self"
    assert f"{name}.query.bias" not in masks
    assert torch.equal(masks[f"{name}.key.bias"], torch.arange(64) < 32)


@pytest.mark.parametrize("pattern", [Head, Channel, Layer])
@pytest.mark.parametrize("model", [tiny_bert, tiny_llama, gpt2, t5])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_units_masks_and_spread_agree(model, pattern, seed):
    model, pattern = model(), pattern()
    kinds = ("Conv1D",) if isinstance(model, transformers.GPT2Model) else ("Linear",)
    said, scores = coupled(model, pattern, kinds, ("lm_head", "pooler*"))
    assert said == []
    generator = torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(unit.shape, generator=generator) < 0.5 for name, unit in pattern.units(scores).items()}
    masks = pattern.expand(keep, scores)
    assert all(masks[name].shape == score.shape for name, score in scores.items())
    after = pattern.units({name: score.masked_fill(~masks[name], GONE) for name, score in scores.items()})
    for name, unit in pattern.units(scores).items():
        assert torch.equal(after[name] == GONE, ~keep[name])
        torch.testing.assert_close(after[name][keep[name]], unit[keep[name]])
    flags = {name: kept.to(torch.float32) for name, kept in keep.items()}
    spread = pattern.spread(flags, scores)
    for name, mask in masks.items():
        if name in scores and name not in spread:
            assert mask.all()
        elif name in scores:
            assert spread[name].shape == mask.shape
            assert torch.equal(spread[name] > 0, mask)


def test_a_weight_in_two_units_takes_their_mean():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 5))
    said, scores = coupled(model, pattern := Channel())
    assert said == []
    spread = pattern.spread({"0": torch.tensor([1.0, 2.0, 3.0]), "2": torch.tensor([10.0, 20.0])}, scores)
    assert torch.equal(spread["2.weight"], (torch.tensor([[10.0], [20.0]]) + torch.tensor([1.0, 2.0, 3.0])) / 2)
    assert torch.equal(spread["4.weight"], torch.tensor([10.0, 20.0]).expand(5, 2))


def test_what_is_in_no_unit_never_goes():
    said, scores = coupled(tiny_bert(), pattern := Head())
    assert said == []
    name = "encoder.layer.0.intermediate.dense.weight"
    units = pattern.units(scores)
    assert pattern.expand({key: torch.zeros(2, dtype=torch.bool) for key in units}, scores)[name].all()
    assert name not in pattern.spread(units, scores)


def test_half_precision_is_summed_in_full():
    _, scores = coupled(tiny_bert(), pattern := Head())
    half = pattern.units({name: score.bfloat16() for name, score in scores.items()})
    assert all(unit.dtype == torch.float32 for unit in half.values())


def test_blocks():
    said, scores = coupled(tiny_bert(), pattern := Layer(), exclude=("pooler*",))
    assert said == []
    assert [(coupling.name, coupling.units) for coupling in pattern.couplings] == [("encoder.layer", 2)]
    masks = pattern.expand({"encoder.layer": torch.tensor([True, False])}, scores)
    for name, _ in tiny_bert().encoder.layer.named_parameters():
        assert bool(masks[f"encoder.layer.{name}"].all()) == bool(masks[f"encoder.layer.{name}"].any())
        assert bool(masks[f"encoder.layer.{name}"].any()) == name.startswith("0.")


# ------------------------------------------------------------------------------------------------- sentences


def deberta():
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**TEXT, **SIZES))


def gpt_oss():
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**TEXT, **SIZES, num_key_value_heads=2, head_dim=16, num_local_experts=2)
    )


def olmo2():
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**TEXT, **SIZES))


def mpnet():
    return transformers.MPNetModel(transformers.MPNetConfig(**TEXT, **SIZES))


def modernbert():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return transformers.ModernBertModel(transformers.ModernBertConfig(**TEXT, **SIZES, **special))


def phi3():
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**TEXT, **SIZES, pad_token_id=0))


def gated():
    class GatedMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    model = tiny_bert()
    model.encoder.layer[0] = GatedMLP()
    return model


def odd_heads():
    model = tiny_bert()
    model.encoder.layer[1].attention.self.num_attention_heads = 3
    return model


def torch_attention():
    class TorchAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    return TorchAttention()


@pytest.mark.parametrize(
    ("model", "pattern", "sentence"),
    [
        (deberta, Head, "the heads of 'encoder.layer.0.attention.self' stay whole: the layers of its Disentangled"),
        (gpt_oss, Head, "the heads of 'model.layers.0.self_attn' stay whole: it has a parameter 'sinks' of its own"),
        (olmo2, Head, "'model.layers.0.self_attn' stay whole: it is not known what its layer 'q_norm' does"),
        (mpnet, Head, "'encoder.layer.0.attention.attn' stay whole: 'encoder.relative_attention_bias' may be about"),
        (phi3, Head, "the heads of 'model.layers.0.self_attn' stay whole: the layers of its Phi3Attention are laid"),
        (odd_heads, Head, "'encoder.layer.1.attention.self' stay whole: heads of 32 features do not follow from"),
        (torch_attention, Head, "'attention' stay whole: the layers of its MultiheadAttention are laid out"),
        (gated, Channel, "the channels of 'encoder.layer.0' stay whole: its GatedMLP is laid out"),
        (modernbert, Layer, "the layers of 'layers' stay whole: they are not alike"),
        (torch_attention, Layer, "TorchAttention has no list of blocks with an attention each"),
        (torch_attention, Channel, "TorchAttention stay whole: torch.fx cannot trace it"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), Head, "Sequential has no heads among its targets"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), Channel, "Sequential has no channels among its targets"),
    ],
)
def test_what_is_not_understood_is_said(model, pattern, sentence):
    said, _ = coupled(model(), pattern(), exclude=("lm_head",) if hasattr(model, "lm_head") else ())
    assert sentence in said[0]


def test_nothing_is_said_of_what_is_no_target():
    model = odd_heads()
    said, _ = coupled(model, pattern := Head(), exclude=("encoder.layer.1.*",))
    assert said == []
    assert [coupling.name for coupling in pattern.couplings] == ["encoder.layer.0.attention.self"]


def test_what_would_not_go_is_said():
    said, _ = coupled(tiny_bert(), Head(), exclude=("*value", "*attention.output*"))
    name = "encoder.layer.0.attention.self"
    assert said[0] == f"the heads of '{name}' stay whole: '{name}.value.weight' is not a target"
    said, _ = coupled(tiny_bert(), Layer(), exclude=("*value", "pooler"))
    assert said == [f"the layers of 'encoder.layer' stay whole: '{name}.value.weight' is not a target"]


def test_tied_weights():
    model = tiny_bert()
    model.encoder.layer[1].intermediate.dense.weight = model.encoder.layer[0].intermediate.dense.weight
    said, _ = coupled(model, pattern := Channel())
    assert len(said) == 2
    assert "'encoder.layer.0.intermediate.dense.weight' is tied to another weight" in said[0]
    assert pattern.couplings == []


def test_a_norm_inside_a_feed_forward_layer():
    model = tiny_bert()
    model.encoder.layer[0].intermediate.norm = nn.LayerNorm(128)
    said, _ = coupled(model, pattern := Channel())
    assert len(said) == 1
    assert said[0].endswith(
        "0.intermediate.dense' stay whole: a norm or scale of as many features may lie between its layers"
    )
    assert [coupling.name for coupling in pattern.couplings] == ["encoder.layer.1.intermediate.dense"]


# --------------------------------------------------------------------------------------------------- tracing


class Graph(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.steps = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.steps(self, x)


def linears(*sizes):
    return {f"l{index}": nn.Linear(*size) for index, size in enumerate(sizes)}


@pytest.mark.parametrize(
    "steps",
    [
        lambda m, x: m.l1(torch.softmax(m.l0(x), -1)),  # channels mix
        lambda m, x: m.l1(m.l0(x)[:, [1, 0, 2, 3]]),  # channels move
        lambda m, x: m.l1(m.l0(x) + 1),
        lambda m, x: m.l1(m.l0(x) + x),  # the input has channels that stay
        lambda m, x: (m.l1(y := m.l0(x)), y),  # somebody else reads them
        lambda m, x: m.l1(m.l0(m.l1(x))),  # a layer that is used twice
        lambda m, x: m.l1(m.l0(x).reshape(-1, 4)),
        lambda m, x: m.l1(torch.cat([m.l0(x)[:, :2], x[:, :2]], 1)),
        lambda m, x: m.l1(m.l0(x) * m.l0.bias),
        lambda m, x: nn.functional.linear(m.l0(x), m.l1.weight),
        lambda m, x: (m.l1(m.l0(x)), x @ m.l0.weight),
    ],
)
def test_what_touches_channels_keeps_them(steps):
    found, notes = traced(Graph(steps, **linears((4, 4), (4, 4))))
    assert found == []
    assert notes == []


def test_spaces_of_sums_with_what_stays():
    model = Graph(
        lambda m, x: m.l3(torch.relu(m.l2(torch.relu(m.l0(x)) + m.l1(x)))), **linears((4, 6), (4, 6), (6, 5), (5, 2))
    )
    found, _ = traced(model)
    assert [(coupling.name, coupling.units) for coupling in found] == [("l0", 6), ("l2", 5)]
    assert [coupling.fold is not None for coupling in found] == [False, True]


def test_functions():
    assert elementwise(nn.GELU())
    assert not elementwise(nn.Softmax(-1))
    assert not elementwise(nn.PReLU(3))
    assert not elementwise(nn.GLU())
    assert keeps_zero(nn.SiLU())
    assert not keeps_zero(nn.Sigmoid())


def test_find_couplings_knows_three_kinds():
    with pytest.raises(KeyError):
        find_couplings(tiny_bert(), "width")
