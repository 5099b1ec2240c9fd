"""Models whose layers a backend runs."""

import copy

import pytest
import torch
from helpers import same_state, tiny_bert
from torch import nn
from transformers import AutoModel, T5Config, T5EncoderModel

from sparsehooks import (
    PlanError,
    PluginError,
    accelerate_model,
    compress,
    read_grid,
    restore_model,
    save_pretrained,
)
from sparsehooks.accelerated import Accelerated
from sparsehooks.builtin.backends.int8 import STEPS, has_vnni
from sparsehooks.grids import Steps


def batch():
    return {"input_ids": torch.randint(1, 128, (3, 12), generator=torch.Generator().manual_seed(0))}


@torch.no_grad()
def as_int8_does(layer, inputs):
    """The products of whole numbers, exactly."""
    steps = Steps(8 if has_vnni() else 7, symmetric=False)
    low, high = inputs.min().clamp(max=0).double(), inputs.max().clamp(min=0).double()
    scale = ((high - low) / steps.most).float().double()
    zero = (-low / scale).round().clamp(0, steps.most)
    codes = ((inputs.double() / scale).round() + zero).clamp(0, steps.most) - zero
    grid = read_grid(layer.weight, STEPS)
    whole = (layer.weight / grid["scales"]).round().double()
    return (codes @ whole.t()) * scale * grid["scales"].flatten().double() + layer.bias.double()


def test_int8_computes_with_the_codes():
    layer = nn.Linear(64, 24)
    compress(layer_model := nn.Sequential(layer), {"stage": [{"quantize": "int8"}]})
    inputs = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    expected = as_int8_does(layer, inputs)
    assert accelerate_model(layer_model, "int8").stays == {}
    found = layer_model(inputs)
    # a value on the edge of two codes may fall to either: a step of the input times the largest weight
    assert float((found.detach().double() - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def backend_of(layer):
    assert isinstance(layer, Accelerated)
    return layer._sparsehooks_engine.lanes[0].backend


def test_a_model_runs_nearly_the_same_and_is_saved_as_it_was(tmp_path):
    model = tiny_bert().eval()
    compress(model, {"stage": [{"quantize": "int8"}, {"activation": "int8"}]}, tmp_path / "saved")
    with torch.no_grad():
        before = model(**batch())[0]
        verdicts = accelerate_model(model, "int8", exclude=["*pooler*"])
        after = model(**batch())[0]
    assert len(verdicts) == 12
    assert verdicts.stays == {}
    assert 0 < float((after - before).abs().max()) < 0.05
    assert backend_of(model.encoder.layer[0].output.dense) == "int8", "the layer's own grid gives way"
    assert type(model.pooler.dense).__name__ == "SparseLinear"
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**batch())[0], after)
    save_pretrained(model, tmp_path / "again")
    opened = AutoModel.from_pretrained(tmp_path / "again")
    restore_model(model)
    with torch.no_grad():
        assert torch.equal(model(**batch())[0], before)
        assert torch.equal(opened(**batch())[0], before), "the grids of the inputs are saved too"
    assert same_state(opened, model)


def test_it_takes_what_linear_takes():
    model = nn.Sequential(nn.Linear(16, 8))
    compress(model, {"stage": [{"quantize": "int8"}]})
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    accelerate_model(model, "int8")
    inputs = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    expected = model(inputs)
    assert model(inputs[0, 0]).shape == (8,)
    assert model(inputs[:0]).shape == (0, 3, 8)
    half = model(inputs.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.05)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(inputs.reshape(2, 6, 8))
    layer = model[0]
    assert (layer.weight.shape, layer.weight.dtype) == ((8, 16), torch.float32)
    assert torch.equal(layer.weight.detach(), weight)
    assert torch.equal(
        nn.functional.linear(inputs, layer.weight, layer.bias), nn.functional.linear(inputs, weight, bias)
    )


def test_t5_reads_the_dtype_of_a_weight():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    model = T5EncoderModel(T5Config(vocab_size=128, num_layers=2, **sizes)).eval()
    compress(model, {"stage": [{"quantize": "int8"}]})
    with torch.no_grad():
        before = model(**batch())[0]
        assert accelerate_model(model, "int8").stays == {}
        after = model(**batch())[0]
    assert 0 < float((after - before).abs().max()) < 0.1 * float(before.abs().max())


def test_torchs_own_encoder_runs_the_layers():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    compress(model, {"stage": [{"quantize": "int8", "exclude": ["self_attn*"]}]})
    inputs = torch.randn(2, 5, 32)
    with torch.no_grad():
        before = model(inputs)
        accelerate_model(model, "int8", exclude=["self_attn*"])
        after = model(inputs)
        assert torch.equal(copy.deepcopy(model)(inputs), after)
        restore_model(model)
        assert torch.equal(model(inputs), before)
    assert 0 < float((after - before).abs().max()) < 0.1
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_torchs_own_encoder_of_several_layers(nested):
    torch.manual_seed(0)
    inputs, padding = torch.randn(3, 6, 32), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    before = model(inputs, src_key_padding_mask=padding).detach()
    if nested:  # padded inputs become nested tensors, which only the reading of weights understands
        with pytest.raises(PlanError, match="; build it with enable_nested_tensor=False"):
            accelerate_model(model, "dense_packed")
    else:
        assert len(accelerate_model(model, "dense_packed").stays) == 2, "the output projections of attention"
    with torch.no_grad():
        after = model(inputs, src_key_padding_mask=padding)
    torch.testing.assert_close(after[~padding], before[~padding], atol=1e-5, rtol=1e-4)


def test_a_threshold_stays():
    model = tiny_bert().eval()
    recipe = {"stage": [{"quantize": "int8"}, {"activation": "teal", "sparsity": 0.5}]}
    compress(model, recipe, calibration=[batch()])
    accelerate_model(model, "int8")
    dense = model.encoder.layer[0].output.dense
    assert backend_of(dense) == "int8"
    assert dense._sparsehooks_site.use == "teal"
    model(**batch())


def test_what_cannot_run_is_told_and_stays():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    compress(model, {"stage": [{"quantize": "int8", "targets": ["0"]}]})
    stays = accelerate_model(model, "int8").stays
    assert stays == {"1": {"int8": "its weight lies on no int8 grid of rows; quantize it by int8"}}
    assert type(model[1]) is nn.Linear
    with pytest.raises(PlanError, match="'int8' can run none of the 1 layers; '0': its weight lies on no int8 grid"):
        accelerate_model(nn.Sequential(nn.Linear(8, 8)), "int8")
    with pytest.raises(PluginError, match="no plugin offers the backend 'int7'"):
        accelerate_model(model, "int7")


@torch.no_grad()
def test_a_weight_that_is_no_number_stays_none():
    model = nn.Sequential(nn.Linear(64, 24)).eval()
    compress(model, {"stage": [{"quantize": "int8"}]})
    accelerate_model(model, "int8")
    model[0].weight[3, 5] = torch.nan
    with pytest.warns(UserWarning, match="'0' runs dense, no longer by 'int8': its weight lies on no int8 grid"):
        assert model(torch.ones(2, 64))[:, 3].isnan().all()
    with pytest.raises(PlanError, match="'int8' can run none of the 1 layers; '0': its weight lies on no int8 grid"):
        accelerate_model(model, "int8")
