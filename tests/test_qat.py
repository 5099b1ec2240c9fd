"""Quantization while a model trains: real Trainer runs."""

import copy

import pytest
import torch
from helpers import arguments, copied, labelled, same_state, tiny_classifier
from transformers import Trainer, TrainerCallback

import sparsehooks
from sparsehooks import CompressionCallback, Steps, read_grid, row_scales
from sparsehooks.builtin.quantizers.lsq import Lsq
from sparsehooks.builtin.quantizers.uniform import Uniform
from sparsehooks.targets import find

LSQ = {"quantize": {"use": "lsq", "bits": 4, "learning_rate": 0.01}, "schedule": {"use": "oneshot", "start": 0.25}}
KMEANS = {"quantize": {"use": "kmeans", "bits": 3, "learning_rate": 0.01}, "schedule": LSQ["schedule"]}
APOT = {"quantize": {"use": "apot", "learning_rate": 0.01}, "schedule": LSQ["schedule"]}


def train(folder, recipe, *more, model=None, resume=None, **options):
    model = tiny_classifier() if model is None else model
    trainer = Trainer(
        model,
        arguments(folder, max_steps=8, **options),
        train_dataset=labelled(),
        callbacks=[CompressionCallback({"stage": recipe}), *more],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model


def weights(model):
    return {t.parameter: model.get_parameter(t.parameter).detach() for t in find(model, ["Linear"], [])[0]}


def test_scales_follow_the_weights_until_they_freeze(tmp_path):
    class Scales(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found = {name: row_scales(weight) for name, weight in weights(kwargs["model"]).items()}
            seen.append(found)

    seen = []
    model = train(tmp_path / "one", [{"quantize": "int8", "freeze": 4}], Scales())
    for name, weight in weights(model).items():
        codes = weight / seen[3][name]  # after 4 steps
        assert torch.equal(codes.round() * seen[3][name], weight), "on the grid of step 4"
    seen.clear()
    model = train(tmp_path / "two", [{"quantize": "int8"}], Scales())
    assert all(torch.equal(row_scales(weight), seen[-1][name]) for name, weight in weights(model).items())


@pytest.mark.parametrize("stage", [LSQ, KMEANS, APOT], ids=["lsq", "kmeans", "apot"])
def test_what_grids_learn_is_trained_and_resumes_exactly(tmp_path, stage):
    twin = tiny_classifier()
    model = train(tmp_path / "one", [stage], save_strategy="steps", save_steps=4)
    train(tmp_path / "two", [stage], model=twin, resume=str(tmp_path / "one" / "checkpoint-4"))
    assert same_state(copied(model), copied(twin))
    still = train(tmp_path / "three", [{**stage, "freeze": 3}])
    assert not same_state(copied(model), copied(still)), "a grid that freezes soon learns little"


def test_lsq_ends_on_an_integer_grid(tmp_path):
    model = train(tmp_path, [LSQ])
    assert all(read_grid(weight, Steps(4)) is not None for weight in weights(model).values())


def test_codebooks_keep_zeros_and_have_few_values(tmp_path):
    prune = {"prune": "magnitude", "sparsity": 0.7, "schedule": {"use": "cubic", "end": 2}}
    model = train(tmp_path, [prune, {**KMEANS, "schedule": {"use": "oneshot", "start": 4}}])
    for weight in weights(model).values():
        assert int((weight == 0).sum()) == round(0.7 * weight.numel())
        assert len(weight.unique()) <= 8 + 1


@pytest.mark.parametrize(
    "stage",
    [{**LSQ, "schedule": {"use": "oneshot", "start": 4}}, {"quantize": "int8", "freeze": 4}],
    ids=["begins", "freezes"],
)
def test_a_grid_is_found_for_what_is_masked(tmp_path, monkeypatch, stage):
    def grid(self, weight):
        shares.append(float((weight == 0).float().mean()))
        return original(self, weight)

    shares, quantizer = [], Lsq if stage["quantize"] != "int8" else Uniform
    original = quantizer.grid
    prune = {"prune": "magnitude", "sparsity": 0.75, "allocation": "uniform", "schedule": {"use": "oneshot"}}
    monkeypatch.setattr(quantizer, "grid", grid)
    model = train(tmp_path, [prune, stage])
    assert len(shares) >= len(weights(model))
    assert min(shares) >= 0.74, "what an optimizer's step puts in masked places is no part of a weight"


@pytest.mark.parametrize("decay", [0.0, 10.0])
def test_only_the_codebook_learns_once_the_codes_are_fixed(tmp_path, decay):
    class Codes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                seen.update({name: weight.clone() for name, weight in weights(kwargs["model"]).items()})

    seen = {}
    stage = {**KMEANS, "schedule": {"use": "oneshot", "start": 4}}
    model = train(tmp_path, [stage], Codes(), weight_decay=decay)
    for name, weight in weights(model).items():
        for value in weight.unique():
            before = seen[name][weight == value]
            others = seen[name][weight != value]
            inside = (others > before.min()) & (others < before.max())
            assert not inside.any(), "a value stands for weights that lay side by side when the stage began"


@pytest.mark.parametrize("stage", [{"quantize": "int8"}, {"activation": "int8"}], ids=["weights", "activations"])
def test_gradient_checkpointing_changes_nothing(tmp_path, stage):
    plain = train(tmp_path / "one", [stage])
    again = train(tmp_path / "two", [stage], activation_checkpointing=True)
    assert same_state(copied(plain), copied(again))


@pytest.mark.parametrize(
    "stages",
    [
        [{"quantize": "int8"}, {"activation": "int8"}],
        [{"quantize": {"use": "int4", "per": "group", "group": 8, "symmetric": False}}],
        [{"quantize": {"use": "lsq", "bits": 4}}],
        [{"quantize": "kmeans"}],
        [{"quantize": {"use": "nf4", "block": 8}}],
        [{"quantize": "apot"}],
    ],
    ids=["int8", "groups", "lsq", "kmeans", "nf4", "apot"],
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that itself
def test_training_compiles_into_one_graph(stages):
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"input_ids": torch.randint(1, 128, (4, 12)), "labels": torch.tensor([0, 1, 0, 1])}
    torch._dynamo.reset()
    with sparsehooks.attach(model, optimizer, {"stage": stages}, total_steps=0):
        model.eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, found = model(**batch), compiled(**batch)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(
            torch.autograd.grad(found.loss, model.bert.encoder.layer[0].output.dense.weight, allow_unused=True),
            torch.autograd.grad(expected.loss, model.bert.encoder.layer[0].output.dense.weight, allow_unused=True),
        )


def test_a_copy_computes_the_same_while_training():
    model = tiny_classifier().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"input_ids": torch.randint(1, 128, (4, 12))}
    before = model(**batch).logits
    with sparsehooks.attach(model, optimizer, {"stage": [{"quantize": "int4"}, {"activation": "int4"}]}, total_steps=0):
        during = model(**batch).logits
        assert torch.equal(copy.deepcopy(model)(**batch).logits, during)
    assert not torch.equal(before, during)
    assert torch.equal(model(**batch).logits, during), "what was trained on is what stays"
