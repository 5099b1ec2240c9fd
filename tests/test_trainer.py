"""The callback in real Trainer runs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import (
    Ordered,
    arguments,
    copied,
    expected_zeros,
    labelled,
    linear_weights,
    prune,
    same_state,
    sentences,
    texts,
    tiny_bert,
    tiny_classifier,
    tiny_llama,
    zeros,
)
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

import sparsehooks
from sparsehooks import CompressionCallback, SessionError, attach_trainer
from sparsehooks.artifact.folder import Folder
from sparsehooks.sites import recorded

DISTIL = {"distill": {"use": "hidden", "layers": "all"}}
KL = {"distill": {"use": "kl", "temperature": 2.0}, "weight": 0.5}
INT8 = {"quantize": "int8", "targets": ["Linear", "Embedding"], "schedule": {"use": "oneshot", "start": 0.5}}


def train(model, folder, recipe, data, cls=Trainer, callbacks=(), resume=None, **options):
    trainer = cls(model=model, args=arguments(folder, **options), train_dataset=data, callbacks=list(callbacks))
    callback = CompressionCallback(recipe)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_zeros_stay_exact_whatever_the_optimizer_remembers(tmp_path, optim):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(zeros(kwargs["model"]))

    options = {"optim": optim, "optim_args": "momentum=0.9"} if optim == "sgd" else {"optim": optim}
    trainer = Trainer(model=tiny_classifier(), args=arguments(tmp_path, **options), train_dataset=labelled())
    trainer.add_callback(CompressionCallback(prune()))
    trainer.add_callback(Watch())
    trainer.train()
    total = expected_zeros(trainer.model, 0.8)
    assert seen == sorted(seen)
    assert seen[8:] == [total] * 4
    assert zeros(trainer.model) == total


def test_gradient_accumulation_changes_nothing(tmp_path):
    def one(batch, accumulation):
        student = tiny_llama(seed=3)
        recipe = {"stage": [KL | {"teacher": str(tmp_path / "teacher")}]}
        before = copied(student)
        options = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 1}
        train(
            student,
            tmp_path / "run",
            recipe,
            texts(8),
            Ordered,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        return torch.cat([(value - before[name]).flatten() for name, value in student.state_dict().items()])

    tiny_llama(seed=4).save_pretrained(tmp_path / "teacher")
    whole, parts = one(8, 1), one(2, 4)
    assert whole.norm() > 0
    assert (whole - parts).norm() / whole.norm() < 1e-6


def test_an_encoder_without_a_loss_learns_from_its_teacher_alone(tmp_path):
    teacher = tiny_bert(seed=5)
    teacher.save_pretrained(tmp_path / "teacher")
    recipe = {"stage": [DISTIL | {"teacher": str(tmp_path / "teacher")}]}
    trainer = train(tiny_bert(seed=6), tmp_path / "run", recipe, sentences(), logging_steps=1, max_steps=30)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_the_added_loss_is_the_weighted_mean_over_items(tmp_path):
    model, teacher = tiny_classifier(seed=1), tiny_classifier(seed=2)
    teacher.save_pretrained(tmp_path / "teacher")
    recipe = {"stage": [KL | {"teacher": str(tmp_path / "teacher")}]}
    rows = labelled(8)
    batch = {
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "attention_mask": torch.stack([row["attention_mask"] for row in rows]),
    }
    labels = torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        ours, theirs = model(**batch).logits, teacher(**batch).logits
    own = F.cross_entropy(ours, labels)
    term = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean") * 4
    trainer = train(model, tmp_path / "run", recipe, rows, Ordered, max_steps=1, logging_steps=1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(own + 0.5 * term), abs=1e-5)


def test_label_smoothing_needs_the_second_door(tmp_path):
    recipe = {"stage": [KL]}
    with pytest.raises(SessionError, match="attach_trainer"):
        train(tiny_classifier(), tmp_path, recipe, labelled(), label_smoothing_factor=0.1)


def test_deepspeed_is_refused_before_training(tmp_path):
    trainer = Trainer(model=tiny_classifier(), args=arguments(tmp_path), train_dataset=labelled())
    trainer.add_callback(CompressionCallback(prune()))
    trainer.args.deepspeed_plugin = object()  # as an Accelerate configuration sets it, too
    with pytest.raises(SessionError, match="DeepSpeed is not supported"):
        trainer.train()
    assert zeros(trainer.model) == 0


def test_a_loss_that_never_reaches_the_gradient_is_an_error(tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    trainer = Trainer(
        model=tiny_classifier(), args=arguments(tmp_path), train_dataset=labelled(), compute_loss_func=own_loss
    )
    trainer.add_callback(CompressionCallback({"stage": [KL]}))
    with pytest.raises(SessionError, match="attach_trainer"):
        trainer.train()


@pytest.mark.parametrize("door", ["callback", "plain", "smoothing", "own loss"])
def test_both_doors_compute_the_same_loss_over_accumulated_batches(tmp_path, door):
    tiny_llama(seed=4).save_pretrained(tmp_path / "teacher")
    recipe = {"stage": [KL | {"teacher": str(tmp_path / "teacher")}]}

    def own_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1].reshape(-1, 128).float()
        return F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch

    def one(batch, accumulation):
        student = tiny_llama(seed=3)
        before = copied(student)
        options = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 1}
        trainer = Ordered(
            model=student,
            args=arguments(
                tmp_path / "run",
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                label_smoothing_factor=0.1 if door == "smoothing" else 0.0,
                **options,
            ),
            train_dataset=texts(8),
            compute_loss_func=own_loss if door == "own loss" else None,
        )
        if door == "callback":
            trainer.add_callback(CompressionCallback(recipe))
        else:
            attach_trainer(trainer, recipe)
        trainer.train()
        return torch.cat([(value - before[name]).flatten() for name, value in student.state_dict().items()])

    whole, parts = one(8, 1), one(2, 4)
    assert (whole - parts).norm() / whole.norm() < 1e-6


def test_bfloat16_training_keeps_zeros_and_reopens_bit_for_bit(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    trainer = train(model, tmp_path, {"stage": [*prune()["stage"], INT8]}, texts(), bf16=True)
    trainer.save_model()
    assert zeros(model) >= expected_zeros(model, 0.8)
    assert same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_only_checkpoints_after_the_schedule_compete_for_the_best(tmp_path):
    model = tiny_classifier()
    callback = CompressionCallback(prune(schedule={"use": "cubic", "end": 8, "every": 2}))
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_density",
            greater_is_better=True,
        ),
        train_dataset=labelled(),
        eval_dataset=labelled(8),
        compute_metrics=lambda _: {"density": 1 - callback.session.sparsity},
        callbacks=[callback],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")
    assert zeros(model) == expected_zeros(model, 0.8)


class StopAt8(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 8


def test_the_best_weights_are_written_with_the_gates_they_had(tmp_path):
    def run(folder, *callbacks, **options):
        callback = CompressionCallback(prune(prune="l0", schedule={"use": "cubic", "end": 8, "every": 2}))
        trainer = Trainer(
            model=tiny_classifier(),
            args=arguments(
                folder,
                save_strategy="steps",
                save_steps=4,
                eval_strategy="steps",
                eval_steps=4,
                metric_for_best_model="eval_density",
                greater_is_better=True,
                **options,
            ),
            train_dataset=labelled(),
            eval_dataset=labelled(8),
            compute_metrics=lambda _: {"density": 1 - callback.session.sparsity},
            callbacks=[callback, *callbacks],
        )
        trainer.train()
        return trainer

    best = run(tmp_path / "best", load_best_model_at_end=True)
    assert best.state.best_model_checkpoint.endswith("checkpoint-8")
    assert same_state(best.model, run(tmp_path / "stopped", StopAt8()).model)
    with pytest.raises(SessionError, match="the checkpoints lack what the recipe learns beside the model"):
        run(tmp_path / "only", load_best_model_at_end=True, save_only_model=True)


@pytest.mark.parametrize(
    "stage",
    [
        {"quantize": {"use": "lsq", "bits": 3, "learning_rate": 0.05}},
        {"quantize": {"use": "kmeans", "bits": 2, "learning_rate": 0.05}},
        {"quantize": "int3", "freeze": 4},
        {"activation": {"use": "pact", "bits": 3, "batches": 1, "learning_rate": 0.05}},
    ],
    ids=["lsq", "kmeans", "frozen", "pact"],
)
def test_the_best_weights_are_written_on_the_grids_they_had(tmp_path, stage):
    def run(folder, *callbacks, **options):
        trainer = Trainer(
            model=tiny_classifier(),
            args=arguments(
                folder,
                save_strategy="steps",
                save_steps=4,
                eval_strategy="steps",
                eval_steps=4,
                metric_for_best_model="eval_near",
                greater_is_better=True,
                **options,
            ),
            train_dataset=labelled(),
            eval_dataset=labelled(8),
            compute_metrics=lambda _: {"near": -abs(trainer.state.global_step - 8)},
            callbacks=[CompressionCallback({"stage": [stage]}), *callbacks],
        )
        trainer.train()
        return trainer

    best = run(tmp_path / "best", load_best_model_at_end=True)
    assert best.state.best_model_checkpoint.endswith("checkpoint-8")
    stopped = run(tmp_path / "stopped", StopAt8())
    assert same_state(best.model, stopped.model)
    assert recorded(best.model) == recorded(stopped.model)


def test_the_sparsity_is_in_the_logs_of_both_doors(tmp_path):
    for door in ("callback", "attach"):
        heard = []

        class Logger(TrainerCallback):
            def on_log(self, args, state, control, logs=None, heard=heard, **kwargs):
                heard.append(dict(logs))

        trainer = Trainer(
            model=tiny_classifier(), args=arguments(tmp_path), train_dataset=labelled(), callbacks=[Logger()]
        )
        if door == "callback":
            trainer.add_callback(CompressionCallback(prune()))
        else:
            attach_trainer(trainer, prune())
        trainer.train()
        history = [entry["sparsity"] for entry in trainer.state.log_history]
        assert history == sorted(history)
        weights = linear_weights(trainer.model).values()
        assert history[-1] == expected_zeros(trainer.model, 0.8) / sum(weight.numel() for weight in weights)
        if door == "attach":  # reaches callbacks that were there before it
            assert all("sparsity" in logs for logs in heard)


def test_checkpoints_are_dense_and_what_is_saved_at_the_end_is_sparse(tmp_path):
    model = tiny_classifier()
    trainer = train(
        model, tmp_path, {"stage": [*prune()["stage"], INT8]}, labelled(), save_strategy="steps", save_steps=6
    )
    checkpoint = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in checkpoint.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert "quantization_config" not in json.loads((tmp_path / "checkpoint-6" / "config.json").read_text())
    trainer.save_model(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        Folder.open(tmp_path / folder)
        config = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "sparsehooks"
        assert sparsehooks.Recipe.from_dict(config["recipe"]).stages[0].sparsity == 0.8
        assert same_state(model, AutoModelForSequenceClassification.from_pretrained(tmp_path / folder))


def test_push_to_hub_uploads_the_sparse_form(tmp_path, monkeypatch):
    uploaded = {}

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        uploaded["sparse"] = Folder.open(working_dir) is not None

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})()

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *a, **k: Api(), raising=False)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda *a, **k: Api(), raising=False)
    model = tiny_classifier()
    train(model, tmp_path, prune(), labelled())
    model.push_to_hub("someone/tiny")
    assert uploaded == {"sparse": True}


def test_a_second_train_starts_from_the_masks_it_finds_and_saves_dense_checkpoints(tmp_path):
    model = tiny_classifier()
    trainer = train(model, tmp_path, prune(), labelled())
    masks = {name: weight != 0 for name, weight in linear_weights(model).items()}
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 3
    trainer.train()
    for name, weight in linear_weights(model).items():
        assert not (weight[~masks[name]] != 0).any()
    assert zeros(model) == expected_zeros(model, 0.8)
    checkpoint = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(tensor.shape == model.state_dict()[name].shape for name, tensor in checkpoint.items())
    trainer.save_model()
    assert same_state(model, AutoModelForSequenceClassification.from_pretrained(tmp_path))


def test_an_opened_artifact_trains_further_with_its_masks(tmp_path):
    first = tiny_bert()
    sparsehooks.compress(first, prune(0.5), out=tmp_path / "a")
    model = AutoModel.from_pretrained(tmp_path / "a")
    gone = {name: weight == 0 for name, weight in linear_weights(model).items()}
    tiny_bert(seed=9).save_pretrained(tmp_path / "teacher")
    recipe = {"stage": [*prune(0.9)["stage"], DISTIL | {"teacher": str(tmp_path / "teacher")}]}
    train(model, tmp_path / "run", recipe, sentences())
    for name, weight in linear_weights(model).items():
        assert not (weight[gone[name]] != 0).any()
    assert zeros(model) == expected_zeros(model, 0.9)


RECIPES = {
    "prune": prune(),
    "everything": {
        "stage": [
            {**prune()["stage"][0], "prune": "random", "allocation": "global"},
            {"distill": {"use": "hidden"}, "teacher": "self"},
            INT8,
        ]
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_ends_bit_identical(tmp_path, name):
    def run(folder, resume=None):
        model = tiny_bert() if name == "everything" else tiny_classifier()
        data = sentences() if name == "everything" else labelled()
        return train(
            model, folder, RECIPES[name], data, resume=resume, save_strategy="steps", save_steps=5, save_total_limit=4
        )

    whole = run(tmp_path / "whole")
    for step in (5, 10):
        resumed = run(tmp_path / "whole", resume=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same_state(whole.model, resumed.model)


def test_resuming_without_the_state_is_refused(tmp_path):
    Trainer(
        model=tiny_classifier(),
        args=arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4),
        train_dataset=labelled(),
    ).train()
    with pytest.raises(SessionError, match="carries no state"):
        train(tiny_classifier(), tmp_path, prune(), labelled(), resume=str(tmp_path / "checkpoint-4"))


def test_resuming_with_another_recipe_is_refused(tmp_path):
    train(tiny_classifier(), tmp_path, prune(), labelled(), save_strategy="steps", save_steps=4, max_steps=4)
    with pytest.raises(SessionError, match="another recipe"):
        train(tiny_classifier(), tmp_path, prune(0.5), labelled(), resume=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_resuming_without_the_right_start_is_refused(tmp_path, damage):
    recipe = RECIPES["everything"]
    train(tiny_bert(), tmp_path, recipe, sentences(), save_strategy="steps", save_steps=4)
    (start,) = (tmp_path / "sparsehooks-start").iterdir()
    if damage == "missing":
        start.unlink()
    else:
        start.write_bytes(start.read_bytes()[:-1] + b"\0\1")
    with pytest.raises(SessionError, match="sparsehooks-start"):
        train(tiny_bert(), tmp_path, recipe, sentences(), resume=str(tmp_path / "checkpoint-4"))


def test_a_failed_plan_leaves_the_model_alone(tmp_path):
    model = tiny_classifier()
    before, classes = copied(model), [type(module) for module in model.modules()]
    with pytest.raises(sparsehooks.PlanError):
        train(model, tmp_path, prune(pattern="3:7"), labelled())
    assert same_state(before, model)
    assert classes == [type(module) for module in model.modules()]


def test_an_error_in_the_middle_detaches(tmp_path):
    class Broken(sparsehooks.Criterion):
        def score(self, view):
            return view.weight * float("nan")

    class Plugin:
        @sparsehooks.hookimpl
        def register_components(self, registry):
            registry.add(sparsehooks.Component("criterion", "broken", Broken, "not finite"))

    model = tiny_classifier()
    classes = [type(module) for module in model.modules()]
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=labelled())
    stage = prune(prune="broken", schedule={"use": "oneshot", "start": 4})["stage"]
    callback = CompressionCallback({"stage": [*stage, KL, {"quantize": "int8"}]}, plugins=[Plugin()])
    trainer.add_callback(callback)
    with pytest.raises(SessionError, match=r"encoder.layer.0.*not finite"):
        trainer.train()
    assert callback.session is None
    assert classes == [type(module) for module in model.modules()]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_copied_callback_is_as_good_as_the_original(tmp_path):
    trainer = Trainer(model=tiny_classifier(), args=arguments(tmp_path, max_steps=3), train_dataset=labelled())
    callback = CompressionCallback(prune())
    trainer.add_callback(copy.copy(callback))
    trainer.train()
    assert zeros(trainer.model) == expected_zeros(trainer.model, 0.8)


def test_the_projection_between_widths_learns_and_survives_a_resume(tmp_path):
    wide = {"vocab_size": 128, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(num_hidden_layers=2, max_position_embeddings=32, **wide)).save_pretrained(tmp_path / "teacher")
    recipe = {"stage": [DISTIL | {"teacher": str(tmp_path / "teacher")}]}

    def run(resume=None):
        return train(
            tiny_bert(), tmp_path / "run", recipe, sentences(), resume=resume, save_strategy="steps", save_steps=5
        )

    whole = run()
    assert set(whole.model.state_dict()) == set(tiny_bert().state_dict())
    resumed = run(str(tmp_path / "run" / "checkpoint-5"))
    assert same_state(whole.model, resumed.model)
    saved = [
        torch.load(tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt")["param_groups"][0]["sparsehooks"]
        for step in (5, 10)
    ]
    first, second = (state["learned"]["tensors"]["0.distill"]["projection"] for state in saved)
    assert not torch.equal(first, second)


def test_an_encoder_decoder_distils_from_itself_with_no_loss(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    rows = sentences(8)
    for row in rows:
        row["labels"] = row["input_ids"].flip(0)[:6]

    def first_loss(recipe):
        torch.manual_seed(0)
        config = BartConfig(vocab_size=128, d_model=32, dropout=0.0, max_position_embeddings=32, **sizes, **heads)
        trainer = Ordered(
            model=BartForConditionalGeneration(config),
            args=arguments(tmp_path, max_steps=1, logging_steps=1),
            train_dataset=rows,
        )
        if recipe:
            trainer.add_callback(CompressionCallback(recipe))
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert first_loss({"stage": [{"distill": "kl"}]}) == pytest.approx(first_loss(None), abs=1e-6)


def test_the_second_door_trains_an_encoder_too(tmp_path):
    trainer = Trainer(model=tiny_bert(seed=6), args=arguments(tmp_path, max_steps=4), train_dataset=sentences())
    attach_trainer(trainer, {"stage": [*prune()["stage"], DISTIL]})
    trainer.train()
    assert zeros(trainer.model) == expected_zeros(trainer.model, 0.8)


def test_an_opened_artifact_keeps_its_zeros_without_a_prune_stage(tmp_path):
    sparsehooks.compress(tiny_classifier(), prune(0.8), out=tmp_path / "a")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    gone = {name: weight == 0 for name, weight in linear_weights(model).items()}
    train(model, tmp_path / "run", {"stage": [KL]}, labelled())
    assert all(torch.equal(weight == 0, gone[name]) for name, weight in linear_weights(model).items())
    model.save_pretrained(tmp_path / "b")
    base = AutoModel.from_pretrained(tmp_path / "b")
    train(base, tmp_path / "run2", {"stage": [DISTIL]}, sentences())
    assert all(torch.equal(weight == 0, gone[f"bert.{name}"]) for name, weight in linear_weights(base).items())


def test_the_terms_of_multi_label_models_are_means_over_samples(tmp_path):
    torch.manual_seed(0)
    model = tiny_bert(BertForSequenceClassification, num_labels=10, problem_type="multi_label_classification")
    tiny_bert(BertForSequenceClassification, 2, num_labels=10).save_pretrained(tmp_path / "teacher")
    rows = [{**row, "labels": torch.rand(10).round()} for row in sentences(8)]
    losses = {}
    for weight in (None, 1.0):
        recipe = {"stage": [{"distill": {"use": "hidden", "layers": "last"}, "teacher": str(tmp_path / "teacher")}]}
        trainer = Ordered(
            model=copy.deepcopy(model), args=arguments(tmp_path, max_steps=1, logging_steps=1), train_dataset=rows
        )
        if weight:
            trainer.add_callback(CompressionCallback(recipe))
        trainer.train()
        losses[weight] = trainer.state.log_history[0]["loss"]
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
    teacher = BertForSequenceClassification.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        ours, theirs = (m.bert(**batch).last_hidden_state for m in (model, teacher.eval()))
    errors, mask = (ours - theirs).square().mean(dim=-1), batch["attention_mask"]
    term = ((errors * mask).sum(dim=1) / mask.sum(dim=1)).mean()
    assert losses[1.0] - losses[None] == pytest.approx(float(term), abs=1e-5)


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jsd", "dkd"])
def test_classes_that_cannot_be_compared_are_refused_before_training(tmp_path, loss):
    recipe = {"stage": [{"distill": loss, "teacher": str(tmp_path)}]}
    model = tiny_bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    model.save_pretrained(tmp_path)

    def train(model):
        trainer = Ordered(model=model, args=arguments(tmp_path / "run", max_steps=1), train_dataset=labelled())
        trainer.add_callback(CompressionCallback(recipe))
        trainer.train()

    with pytest.raises(SessionError, match=r"stage\[0\].*the labels of a multi-label model are none"):
        train(model)
    names = {0: "no", 1: "maybe", 2: "yes"}
    tiny_bert(BertForSequenceClassification, num_labels=3, id2label=names).save_pretrained(tmp_path)
    turned = tiny_bert(BertForSequenceClassification, num_labels=3, id2label={0: "yes", 1: "maybe", 2: "no"})
    with pytest.raises(SessionError, match="give both one order"):
        train(turned)


def test_two_callbacks_or_a_run_that_broke_off_are_named(tmp_path):
    trainer = Trainer(model=tiny_classifier(), args=arguments(tmp_path), train_dataset=labelled())
    trainer.add_callback(CompressionCallback(prune()))
    trainer.add_callback(CompressionCallback({"stage": [KL]}))
    with pytest.raises(SessionError, match="one recipe and one callback"):
        trainer.train()

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = tiny_classifier()
    callback = CompressionCallback({"stage": [{"quantize": "int8"}]})
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=labelled(), callbacks=[callback, Stops()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(sparsehooks.PlanError, match="has not ended; call detach"):
        train(model, tmp_path, {"stage": [{"quantize": "int8"}]}, labelled())
    callback.detach()
    train(model, tmp_path, {"stage": [{"quantize": "int8"}]}, labelled())


def test_resuming_a_run_of_another_length_is_refused(tmp_path):
    train(tiny_classifier(), tmp_path, prune(), labelled(), save_strategy="steps", save_steps=4, max_steps=8)
    with pytest.raises(SessionError, match="another length"):
        train(tiny_classifier(), tmp_path, prune(), labelled(), resume=str(tmp_path / "checkpoint-4"), max_steps=20)


class Writes(sparsehooks.Criterion):
    def score(self, view):
        return view.weight.mul_(2).abs()


class NotFinite(sparsehooks.Criterion):
    def score(self, view):
        return view.weight * float("nan")


@pytest.mark.parametrize(("cls", "message"), [(Writes, "must work on a copy"), (NotFinite, "scores of .* not finite")])
def test_a_bad_criterion_is_blamed_and_not_the_weights(cls, message):
    class Plugin:
        @sparsehooks.hookimpl
        def register_components(self, registry):
            registry.add(sparsehooks.Component("criterion", "bad", cls, "bad"))

    with pytest.raises(SessionError, match=message) as raised:
        sparsehooks.compress(tiny_bert(), prune(prune="bad"), plugins=[Plugin()])
    assert "raised by plugin 'Plugin'" in raised.value.__notes__[0]


def test_a_failed_compress_leaves_no_layer_swapped_and_tells_the_plugins():
    heard = []

    class Plugin:
        @sparsehooks.hookimpl
        def register_components(self, registry):
            registry.add(sparsehooks.Component("criterion", "bad", NotFinite, "bad"))

        @sparsehooks.hookimpl
        def session_finished(self, session, error):
            heard.append((session.sparsity, type(error)))

    model = tiny_bert()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(SessionError):
        sparsehooks.compress(model, {"stage": [{"quantize": "int8"}, *prune(prune="bad")["stage"]]}, plugins=[Plugin()])
    assert classes == [type(module) for module in model.modules()]
    assert heard == [(0.0, SessionError)]


def test_a_run_that_begins_again_with_smaller_batches_keeps_its_teacher(tmp_path):
    class Full(Ordered):
        full = True

        def training_step(self, *args, **kwargs):
            if self.full:
                self.full = False
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    model = tiny_classifier()
    before = copied(model)
    trainer = Full(
        model=model, args=arguments(tmp_path, auto_find_batch_size=True, max_steps=3), train_dataset=labelled()
    )
    callback = CompressionCallback(
        {"stage": [*prune(0.5, schedule="oneshot")["stage"], {"distill": "kl"}, {"distill": "hidden"}]}
    )
    trainer.add_callback(callback)
    starts = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            (teacher,) = callback.session._distillation._teachers.values()
            starts.append(same_state(teacher.model, before))

    trainer.add_callback(Watch())
    trainer.train()
    assert starts == [True, True]


def test_a_second_callback_on_a_resumed_run_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    recipe = prune(0.5)

    def trainer(callbacks):
        made = Ordered(model=tiny_classifier(), args=arguments(tmp_path, **options), train_dataset=labelled())
        for _ in range(callbacks):
            made.callback_handler.callbacks.append(CompressionCallback(recipe))
        return made

    trainer(1).train()
    with pytest.raises(SessionError, match="another run of sparsehooks is attached"):
        trainer(2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_what_is_refused_in_a_forward_leaves_nothing_behind(tmp_path):
    """Under the callback alone; the next Trainer trains as if there had been no run."""
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in labelled()]

    def losses(model, folder):
        trainer = Ordered(model=model, args=arguments(folder, logging_steps=1, max_steps=3), train_dataset=labelled())
        trainer.train()
        return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]

    tiny_classifier(seed=5).save_pretrained(tmp_path / "teacher")
    recipe = {"stage": [{"distill": use, "teacher": str(tmp_path / "teacher")} for use in ("dkd", "attention")]}
    model = tiny_classifier()
    trainer = Ordered(model=model, args=arguments(tmp_path / "refused"), train_dataset=rows)
    trainer.add_callback(CompressionCallback(recipe))
    with pytest.raises(SessionError, match="dkd needs a class label"):
        trainer.train()
    assert model.config._attn_implementation == "sdpa"
    assert losses(model, tmp_path / "next") == losses(tiny_classifier(), tmp_path / "plain")
