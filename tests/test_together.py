"""One recipe that prunes, quantizes and distils: each part acts, in the right order, whatever order the recipe has."""

from __future__ import annotations

import itertools

import pytest
from helpers import (
    Ordered,
    arguments,
    expected_zeros,
    labelled,
    linear_weights,
    prune,
    same_state,
    tiny_classifier,
    zeros,
)
from transformers import AutoModelForSequenceClassification

from sparsehooks import CompressionCallback, Steps, read_grid

STAGES = {
    "prune": prune(0.7)["stage"][0],
    "quantize": {
        "quantize": "int8",
        "exclude": ["*pooler*", "classifier"],
        "schedule": {"use": "oneshot", "start": 0.5},
    },
    "distill": {"distill": {"use": "kl", "temperature": 2.0}, "weight": 2.0},
}


def run(folder, names):
    model = tiny_classifier()
    trainer = Ordered(model=model, args=arguments(folder, logging_steps=1), train_dataset=labelled())
    trainer.add_callback(CompressionCallback({"stage": [STAGES[name] for name in names]}))
    trainer.train()
    return trainer, [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return run(tmp_path_factory.mktemp("together"), STAGES)


def on_grid(model):
    return {name: read_grid(weight.detach(), Steps(8)) is not None for name, weight in linear_weights(model).items()}


def test_every_part_has_acted(together, tmp_path):
    trainer, losses = together
    assert zeros(trainer.model) == expected_zeros(trainer.model, 0.7)
    assert all(on_grid(trainer.model).values())
    trainer.save_model(tmp_path / "small")
    assert same_state(AutoModelForSequenceClassification.from_pretrained(tmp_path / "small"), trainer.model)
    without, alone = run(tmp_path / "run", ["prune", "quantize"])
    assert losses[0] == alone[0]  # the student is its own teacher still
    assert all(loss > other for loss, other in zip(losses[1:3], alone[1:3], strict=True))  # then they differ
    assert not same_state(without.model, trainer.model)


@pytest.mark.parametrize("left_out", STAGES)
def test_what_is_left_out_does_not_act(tmp_path, left_out):
    trainer, _ = run(tmp_path, [name for name in STAGES if name != left_out])
    assert (zeros(trainer.model) < expected_zeros(trainer.model, 0.7) // 2) == (left_out == "prune")
    assert any(on_grid(trainer.model).values()) == (left_out != "quantize")


@pytest.mark.parametrize("names", list(itertools.permutations(STAGES))[1:], ids="-".join)
def test_the_order_in_the_recipe_does_not_matter(together, tmp_path, names):
    trainer, losses = run(tmp_path, names)
    assert losses == together[1]
    assert same_state(trainer.model, together[0].model)
