"""Activations on grids: closed forms, and real runs."""

import copy

import pytest
import torch
from helpers import arguments, labelled, tiny_bert, tiny_classifier, tiny_llama
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer

import sparsehooks
from sparsehooks import ArtifactError, CompressionCallback, PlanError, SessionError, compress
from sparsehooks.builtin.activations.quantized import (
    Dynamic,
    DynamicOptions,
    Pact,
    PactOptions,
    Static,
    StaticOptions,
)
from sparsehooks.sites import recorded


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1:, 8:] = 0
    return [
        {"input_ids": torch.randint(1, 128, (4, 12), generator=generator), "attention_mask": mask} for _ in range(count)
    ]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tokens_have_scales_of_their_own(bits):
    values = normal(3, 5, 16) * torch.logspace(-3, 3, 5)[:, None]
    found = Dynamic(DynamicOptions(bits)).apply(values, 1.0)
    most = 2 ** (bits - 1) - 1
    scales = values.abs().amax(dim=-1, keepdim=True) / most
    assert bool(((found - values).abs() <= scales / 2 * (1 + 2**-12)).all())
    assert int((found / scales).round().abs().max()) == most


def test_of_images_each_has_a_scale():
    values = normal(3, 2, 4, 4) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1, 1)
    values[:, 1] *= 1e-3
    found = Dynamic().apply(values, 1.0)
    scales = values.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    torch.testing.assert_close(found, (values / scales).round() * scales, rtol=2**-15, atol=0)


def test_nothing_happens_before_the_schedule_begins():
    values = normal(2, 8)
    assert Dynamic().apply(values, 0.0) is values


def test_the_gradient_passes_and_stops_where_a_static_grid_clips():
    values = torch.tensor([[-3.0, -1.0, 0.3, 1.0, 2.0]], requires_grad=True)
    Static(StaticOptions(4)).apply(values, 1.0).backward(torch.ones(1, 5))
    assert values.grad.tolist() == [[0, 1, 1, 1, 0]]
    values.grad = None
    Dynamic().apply(values, 1.0).backward(torch.ones(1, 5))
    assert values.grad.tolist() == [[1] * 5]


def test_codes_without_a_sign():
    values = torch.tensor([[-1.0, 0.0, 0.26, 0.5, 1.5]])
    found = Static(StaticOptions(2, signed=False)).apply(values, 0.75)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.25, 0.5, 0.75]]), rtol=2**-15, atol=0)


def test_how_far_a_static_grid_reaches():
    peaks, magnitudes = torch.tensor([2.0, 4.0, 3.0]), torch.linspace(0, 4, 10_001)
    reach = lambda **options: Static(StaticOptions(**options)).reach(magnitudes, peaks)  # noqa: E731
    assert reach() == 4
    assert reach(range="moving_average", averaging=0.5) == 0.5 * (0.5 * 2 + 0.5 * 4) + 0.5 * 3
    assert abs(reach(range="percentile", percentile=99.0) - 3.96) < 2e-3
    assert reach(range="mse", bits=2) <= 4
    assert 0 < reach(range="entropy") <= 4


def test_a_normal_sample_is_clipped_where_the_error_is_least():
    magnitudes = normal(200_000).abs().sort().values
    reach = Static(StaticOptions(4, range="mse")).reach(magnitudes, magnitudes[-1:])
    assert 2.4 < reach < 2.8, "about 2.6 deviations for 4 bits"


def test_the_gradient_of_pact():
    inputs = torch.tensor([[-1.0, 0.0, 0.2, 0.99, 1.0, 3.0]], requires_grad=True)
    alpha = torch.ones((), requires_grad=True)
    found = Pact(PactOptions(4)).apply(inputs, alpha)
    found.backward(torch.arange(1.0, 7.0)[None])
    torch.testing.assert_close(found.detach() * 15, torch.tensor([[0.0, 0, 3, 15, 15, 15]]), rtol=0, atol=1e-3)
    assert inputs.grad.tolist() == [[0, 0, 3, 4, 0, 0]]
    assert alpha.grad.item() == 5 + 6


@pytest.mark.parametrize("start", [0.0, -0.5])
def test_a_level_of_pact_that_fell_below_zero_rises_again(start):
    alpha = torch.tensor(start, requires_grad=True)
    inputs = torch.tensor([[-1.0, -0.2, 0.0, 0.5, 2.0]])
    found = Pact().apply(inputs, alpha)
    assert bool(((found >= 0) & (found < 1e-5)).all())
    found.backward(torch.ones(1, 5))
    assert alpha.grad == 2, "the positive values move it, and no other one"
    assert torch.equal(Pact().apply(inputs, 0.0), found), "as it will be saved"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DynamicOptions(9), "'bits' = 9 is outside 2 to 8"),
        (lambda: StaticOptions(percentile=float("nan")), "'percentile' = nan"),
        (lambda: StaticOptions(percentile=99.0), "'percentile' = 99.0 has no effect with range = \"min_max\""),
        (lambda: StaticOptions(averaging=0.0), "'averaging' = 0.0"),
        (lambda: StaticOptions(batches=0), "'batches' must be at least 1"),
        (lambda: PactOptions(start=0.0), "'start' = 0.0 is not a positive number"),
        (lambda: PactOptions(learning_rate=float("inf")), "'learning_rate' = inf"),
    ],
)
def test_bad_options_are_said(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("use", ["int8", "static_int8", {"use": "static", "bits": 4, "range": "moving_average"}])
def test_a_model_opens_with_its_grids(tmp_path, use):
    model = tiny_bert().eval()
    before = model(**batches(1)[0])[0]
    data = None if use == "int8" else batches()
    recipe = {"stage": [{"quantize": "int8"}, {"activation": use, "exclude": ["*pooler*"]}]}
    compress(model, recipe, tmp_path / "out", calibration=data)
    opened = AutoModel.from_pretrained(tmp_path / "out").eval()
    ours = model(**batches(1)[0])[0]
    assert torch.equal(opened(**batches(1)[0])[0], ours)
    assert 0 < float((ours - before).detach().abs().max()) < (0.05 if use != "static" else 1)
    assert type(opened.encoder.layer[0].output.dense).__name__ == "SparseLinear"


def test_a_model_with_grids_opens_as_what_it_was_saved(tmp_path):
    compress(tiny_llama(), {"stage": [{"activation": "int8"}]}, tmp_path / "out")
    assert recorded(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    with pytest.raises(ArtifactError, match="; it was saved as LlamaForCausalLM, open it with that class and not with"):
        AutoModel.from_pretrained(tmp_path / "out")


def test_a_static_grid_needs_data():
    with pytest.raises(PlanError, match="needs calibration batches"):
        compress(tiny_bert(), {"stage": [{"activation": "static_int8"}]})
    with pytest.raises(PlanError, match="'sparsity' does not apply"):
        compress(tiny_bert(), {"stage": [{"activation": "int8", "sparsity": 0.5}]})


def test_a_grid_that_never_saw_data_is_said(tmp_path):
    layer = nn.Sequential(nn.Linear(4, 4))
    recipe = {"stage": [{"activation": "static_int8"}]}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attached = sparsehooks.attach(layer, optimizer, recipe, total_steps=1)
    attached.__enter__()
    layer[0].weight.grad = torch.zeros(4, 4)
    optimizer.step()
    with pytest.raises(SessionError, match="nothing has passed '0' yet"):
        attached.__exit__(None, None, None)


def run(folder, model, recipe, **options):
    trainer = Trainer(
        model,
        arguments(folder, max_steps=8, **options),
        train_dataset=labelled(),
        callbacks=[CompressionCallback(recipe)],
    )
    trainer.train()


def test_pact_trains_its_level_and_resumes_exactly(tmp_path):
    recipe = {
        "stage": [{"activation": {"use": "pact", "batches": 2, "learning_rate": 0.05}, "targets": ["*output.dense"]}]
    }
    model = tiny_classifier()
    twin = copy.deepcopy(model)
    run(tmp_path / "one", model, recipe, save_steps=4, save_strategy="steps")
    found = recorded(model)
    assert len(found) == 4
    assert all(entry["use"] == "pact" and entry["amount"] > 0 for entry in found.values())
    trainer = Trainer(
        twin,
        arguments(tmp_path / "two", max_steps=8, save_steps=4, save_strategy="steps"),
        train_dataset=labelled(),
        callbacks=[CompressionCallback(recipe)],
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    assert recorded(twin) == found
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, twin.state_dict()[name]), name


def test_recomputed_activations_count_once(tmp_path):
    recipe = {"stage": [{"activation": {"use": "static", "batches": 2, "range": "moving_average"}}]}
    found = []
    for checkpointing in (False, True):
        model = tiny_classifier()
        run(tmp_path / str(checkpointing), model, recipe, activation_checkpointing=checkpointing)
        found.append(recorded(model))
    assert found[0] == found[1]
