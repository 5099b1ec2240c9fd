"""Plain and Accelerate loops: unchanged loops, the same results as a Trainer's."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import copied, expected_zeros, labelled, linear_weights, prune, same_state, tiny_classifier, zeros
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

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


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerate_loop_resumes_from_a_saved_state(tmp_path, precision):
    """Gradient accumulation, mixed precision, and ``load_state`` before or inside the block."""
    recipe = {"stage": [*prune()["stage"], KL, INT8]}
    data = [{key: value[0] for key, value in batch.items()} for batch in batches(32, 1)]

    def run(stop=None, load=None):
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
        model = tiny_classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        model, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, DataLoader(data, batch_size=2), scheduler
        )
        if load == "before":
            accelerator.load_state(tmp_path / "state")
        options = {"total_steps": 8, "accelerator": accelerator, "folder": tmp_path}
        with sparsehooks.attach(model, optimizer, recipe, **options) as session:
            if load == "inside":
                accelerator.load_state(tmp_path / "state")
            model.train()
            for batch in accelerator.skip_first_batches(loader, 2 * session.step):
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients and session.step == stop:
                    accelerator.save_state(tmp_path / "state")
            assert session.step == 8
        return accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    whole = run(stop=4)
    assert zeros(whole) == expected_zeros(whole, 0.8)
    whole.save_pretrained(tmp_path / "a")
    assert same_state(whole, AutoModelForSequenceClassification.from_pretrained(tmp_path / "a"))
    for load in ("before", "inside"):
        assert same_state(whole, run(load=load))


class Small(PreTrainedModel):
    """Small enough to be compiled in a test."""

    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig())
        torch.manual_seed(0)
        self.inner, self.outer = torch.nn.Linear(24, 64), torch.nn.Linear(64, 3)

    def forward(self, inputs, labels=None):
        logits = self.outer(self.inner(inputs).tanh())
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


class Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # what the compiler finds in torch
@pytest.mark.parametrize("compiled", ["wrapped", "in place", "around"])
@pytest.mark.parametrize("stages", [[KL], [INT8]], ids=["distil", "quantize"])
def test_a_model_that_was_compiled_before_is_compressed_all_the_same(compiled, stages):
    generator = torch.Generator().manual_seed(1)
    data = [
        {
            "inputs": torch.randn(8, 24, generator=generator),
            "labels": torch.randint(0, 3, (8,), generator=generator),
        }
        for _ in range(8)
    ]

    def run(compiled):
        torch.compiler.reset()
        model = whole = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        if compiled == "wrapped":
            whole = torch.compile(model, backend="eager")
        elif compiled == "in place":
            model.compile(backend="eager")
        elif compiled == "around":
            whole = torch.compile(Around(model), backend="eager")
        loop(whole, optimizer, data[:2])  # compiles
        with sparsehooks.attach(whole, optimizer, {"stage": [*prune()["stage"], *stages]}, total_steps=8):
            losses = loop(whole, optimizer, data)
        return model, losses, loop(whole, optimizer, data[:1])

    (model, *losses), (twin, *expected) = run(compiled), run(None)
    assert losses == [pytest.approx(values, rel=1e-5) for values in expected]
    assert zeros(model) == zeros(twin)
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, twin.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize(
    "recipe",
    [
        prune(schedule={"use": "oneshot", "start": 0.5}),
        {"stage": [{"distill": "kl"}]},
        {"stage": [{"regularize": {"use": "l1", "strength": 1e-3}}]},
    ],
)
def test_a_loop_that_never_calls_the_optimizer_is_an_error(recipe):
    model = tiny_classifier()
    before = copied(model)
    optimizer, another = (torch.optim.SGD(model.parameters(), lr=0.0) for _ in range(2))
    with (
        pytest.raises(SessionError, match="never called the optimizer"),
        sparsehooks.attach(model, optimizer, recipe, total_steps=8),
    ):
        loop(model, another, batches(2))
    assert same_state(before, model)
    assert not optimizer._optimizer_step_post_hooks


def test_a_loop_in_which_there_is_nothing_to_distil_is_an_error():
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def only_parts():
        batch = batches(1)[0]
        logits = model.classifier(model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output)
        F.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()

    with (
        pytest.raises(SessionError, match="never called in training mode"),
        sparsehooks.attach(model, optimizer, {"stage": [KL]}, total_steps=8),
    ):
        only_parts()


def test_deepspeed_is_refused_before_training():
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copied(model)
    accelerator = Accelerator(cpu=True)
    marked = tiny_classifier()
    marked.classifier.weight.ds_id = 1  # as ZeRO-3 does
    accelerator.state.distributed_type, kept = DistributedType.DEEPSPEED, accelerator.state.distributed_type
    try:
        for given, kind in ((model, accelerator), (marked, None)):
            with (
                pytest.raises(SessionError, match="DeepSpeed is not supported"),
                sparsehooks.attach(given, optimizer, prune(), total_steps=8, accelerator=kind),
            ):
                pass
    finally:
        accelerator.state.distributed_type = kept
    assert same_state(before, model)


def test_a_module_around_a_transformers_model_is_compressed_and_what_is_in_it_saved(tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.encoder = tiny_classifier().bert
            self.head = torch.nn.Linear(64, 3) if head else None

        def forward(self, input_ids, attention_mask, labels):
            pooled = self.encoder(input_ids, attention_mask).pooler_output
            logits = pooled[:, :3] if self.head is None else self.head(pooled)
            return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)

    for head in (False, True):
        model = Wrapped(head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        prefix = "encoder." if head else ""  # what adds nothing of its own has no name in the recipe
        recipe = prune(targets=[f"{prefix}encoder.layer.*"], exclude=[])
        with sparsehooks.attach(model, optimizer, recipe, total_steps=8):
            loop(model, optimizer, batches())
        folder = tmp_path / str(head)
        model.encoder.save_pretrained(folder)
        opened = AutoModel.from_pretrained(folder)
        assert same_state(model.encoder, opened)
        assert zeros(opened) == expected_zeros(opened, 0.8)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert set(config["pruned"]) == set(linear_weights(opened))
        assert sparsehooks.inspect(folder).ratio < 0.7


LEARNS = {
    "stage": [
        {"prune": "movement", "sparsity": 0.5, "schedule": {"use": "linear", "every": 2}, "exclude": ["classifier"]},
        {"distill": "kl"},
        {
            "quantize": {"use": "lsq", "bits": 6},
            "schedule": {"use": "oneshot", "start": 0.5},
            "exclude": ["classifier"],
        },
    ]
}


def scaled(scaler, overflows=(), told=True, steps=8):
    """A loop in fp32 with a gradient scaler, or without one; the given steps overflow."""
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"scaler": scaler} if told and scaler is not None else {}
    with sparsehooks.attach(model.train(), optimizer, LEARNS, total_steps=steps, **options) as session:
        for index, batch in enumerate(batches(steps)):
            loss = model(**batch).loss
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                if index in overflows:
                    model.classifier.weight.grad.fill_(float("inf"))
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        assert (session.step, session.sparsity) == (steps, 0.5)
    return model


def test_a_gradient_scaler_changes_nothing():
    """It multiplies and divides by a power of two: also what the recipe learns beside the model."""
    assert same_state(scaled(torch.amp.GradScaler("cpu", init_scale=2.0**12)), scaled(None))


def test_a_step_that_the_scaler_skips_counts():
    model = scaled(torch.amp.GradScaler("cpu", init_scale=2.0**12), overflows=(0, 7))
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())


def test_a_gradient_scaler_that_is_not_named_is_an_error():
    with pytest.raises(SessionError, match=r"give it to sparsehooks\.attach as scaler="):
        scaled(torch.amp.GradScaler("cpu", init_scale=2.0**12), told=False)
