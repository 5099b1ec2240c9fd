"""Plain and Accelerate loops: unchanged loops, the same results as a Trainer's."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import copied, expected_zeros, labelled, linear_weights, prune, same_state, tiny_classifier, zeros
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import sparsehooks
from sparsehooks import SessionError

KL = {"distill": "kl", "weight": 0.5}
INT8 = {"quantize": "int8", "schedule": {"use": "oneshot", "start": 0.5}}


def batches(count=8, size=8):
    rows = labelled(count * size)
    return [
        {
            "input_ids": torch.stack([row["input_ids"] for row in rows[start : start + size]]),
            "attention_mask": torch.stack([row["attention_mask"] for row in rows[start : start + size]]),
            "labels": torch.tensor([row["labels"] for row in rows[start : start + size]]),
        }
        for start in range(0, count * size, size)
    ]


def loop(model, optimizer, data):
    """The loop that stays as it is."""
    losses = []
    model.train()
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1),
        lambda weights: torch.optim.AdamW(weights, lr=1e-3, fused=True),
        lambda weights: torch.optim.Adam(weights, lr=1e-3, foreach=True, amsgrad=True),
        lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9, nesterov=True),
        lambda weights: torch.optim.RMSprop(weights, lr=1e-3, momentum=0.5),
        lambda weights: torch.optim.Adagrad(weights, lr=1e-2),
    ],
    ids=["AdamW", "fused", "foreach", "SGD", "RMSprop", "Adagrad"],
)
def test_a_plain_loop_ends_with_exact_zeros(tmp_path, make):
    model = tiny_classifier()
    optimizer = make(model.parameters())
    with sparsehooks.attach(model, optimizer, {"stage": [*prune()["stage"], KL, INT8]}, total_steps=8):
        loop(model, optimizer, batches())
    assert zeros(model) >= expected_zeros(model, 0.8)
    assert "sparsehooks" not in optimizer.param_groups[0]
    model.save_pretrained(tmp_path / "a")
    assert same_state(model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "a"))


def test_after_the_block_the_loop_is_its_old_self():
    model, twin = tiny_classifier(), tiny_classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    with sparsehooks.attach(model, optimizer, {"stage": [KL]}, total_steps=4):
        loop(model, optimizer, batches(4))
    twin.load_state_dict(model.state_dict())
    ours = loop(model, torch.optim.AdamW(model.parameters()), batches(2))
    theirs = loop(twin, torch.optim.AdamW(twin.parameters()), batches(2))
    assert ours == theirs
    assert not model._forward_hooks


def test_an_error_in_the_loop_detaches_and_goes_on_up():
    model = tiny_classifier()
    classes = [type(module) for module in model.modules()]
    optimizer = torch.optim.AdamW(model.parameters())
    recipe = {"stage": [*prune()["stage"], KL, {"quantize": "int8"}]}
    with pytest.raises(ValueError, match="input_ids"), sparsehooks.attach(model, optimizer, recipe, total_steps=8):
        loop(model, optimizer, [*batches(2), {"no_such_argument": {}}])
    assert classes == [type(module) for module in model.modules()]
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_an_accelerate_loop_with_accumulation_equals_whole_batches():
    def run(size, accumulation):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        model = tiny_classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = [{key: value[0] for key, value in batch.items()} for batch in batches(32, 1)]
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=size))
        recipe = {"stage": [*prune(0.5)["stage"], {"distill": "kl", "teacher": "self"}]}
        with sparsehooks.attach(model, optimizer, recipe, total_steps=4, accelerator=accelerator) as session:
            model.train()
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            assert session.step == 4
        return accelerator.unwrap_model(model)

    whole, parts = run(8, 1), run(2, 4)
    assert zeros(whole) == zeros(parts) == expected_zeros(whole, 0.5)
    for name, weight in whole.state_dict().items():
        assert torch.allclose(weight, parts.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_loop_resumes_from_the_optimizers_state(tmp_path, when):
    recipe = {"stage": [{**prune()["stage"][0], "prune": "random"}, {"distill": "kl"}, INT8]}

    def fresh():
        model = tiny_classifier()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, optimizer = fresh()
    with sparsehooks.attach(model, optimizer, recipe, total_steps=8, folder=tmp_path):
        loop(model, optimizer, batches()[:4])
        saved = copy.deepcopy({"model": copied(model), "optimizer": optimizer.state_dict()})
        torch.save(saved, tmp_path / "saved.pt")
        loop(model, optimizer, batches()[4:])
    whole = copied(model)

    model, optimizer = fresh()
    saved = torch.load(tmp_path / "saved.pt")
    if when == "before":
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    with sparsehooks.attach(model, optimizer, recipe, total_steps=8, folder=tmp_path) as session:
        if when == "inside":
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        loop(model, optimizer, batches()[4:])
        assert session.step == 8
    assert same_state(whole, model)


def test_loading_the_state_of_another_run_inside_is_refused(tmp_path):
    def fresh(seed):
        model = tiny_classifier(seed)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = fresh(1)
    with sparsehooks.attach(model, optimizer, {"stage": [KL]}, total_steps=4, folder=tmp_path):
        loop(model, optimizer, batches(2))
        saved = copy.deepcopy(optimizer.state_dict())
    without = torch.optim.AdamW(tiny_classifier().parameters()).state_dict()
    for state, message in ((saved, "another start"), (without, "no state of sparsehooks")):
        model, optimizer = fresh(2)
        with (
            pytest.raises(SessionError, match=message),
            sparsehooks.attach(model, optimizer, {"stage": [KL]}, total_steps=4, folder=tmp_path),
        ):
            optimizer.load_state_dict(state)


def test_a_teacher_in_memory_cannot_be_resumed():
    model = tiny_classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    with sparsehooks.attach(model, optimizer, {"stage": [KL]}, total_steps=4):
        loop(model, optimizer, batches(2))
        saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    with (
        pytest.raises(SessionError, match="output folder"),
        sparsehooks.attach(model, optimizer, {"stage": [KL]}, total_steps=4),
    ):
        pass


def test_conv1d_and_conv2d_are_pruned_along_their_inputs(tmp_path):
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, n_positions=32))
    stages = [
        {"prune": "magnitude", "pattern": "2:4", "targets": ["Conv1D"]},
        {"quantize": "int8", "targets": ["Conv1D"]},
    ]
    sparsehooks.compress(gpt, {"stage": stages}, out=tmp_path / "gpt")
    weight = gpt.transformer.h[0].attn.c_attn.weight  # (inputs, outputs)
    assert ((weight.t().reshape(-1, 4) != 0).sum(dim=1) == 2).all()
    assert same_state(gpt, type(gpt).from_pretrained(tmp_path / "gpt"))

    cnn = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten())
    optimizer = torch.optim.SGD(cnn.parameters(), lr=0.1, momentum=0.9)
    recipe = {"stage": [{"prune": "magnitude", "sparsity": 0.5, "pattern": "row", "targets": ["Conv2d"]}]}
    with sparsehooks.attach(cnn, optimizer, recipe, total_steps=3):
        for _ in range(3):
            F.mse_loss(cnn(torch.randn(2, 4, 8, 8)), torch.zeros(2, 128)).backward()
            optimizer.step()
    for module in (cnn[0], cnn[2]):
        empty = (module.weight.flatten(1) == 0).all(dim=1)
        assert int(empty.sum()) == 4


def test_what_was_pruned_stays_pruned_under_every_pattern():
    for pattern in ("unstructured", "2:4", {"use": "block", "height": 2, "width": 2}, "row", "column"):
        model = tiny_classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = {"pattern": pattern, "prune": "random", "schedule": {"use": "linear", "end": 6, "every": 1}}
        recipe = prune(**options) if pattern != "2:4" else prune(**options, sparsity=None)
        recipe["stage"][0] = {key: value for key, value in recipe["stage"][0].items() if value is not None}
        gone = {}
        with sparsehooks.attach(model, optimizer, recipe, total_steps=8):
            for batch in batches():
                loop(model, optimizer, [batch])
                for name, weight in linear_weights(model).items():
                    assert not (weight[gone.get(name, torch.zeros_like(weight, dtype=torch.bool))] != 0).any()
                    gone[name] = weight == 0
