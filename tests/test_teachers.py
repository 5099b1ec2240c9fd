"""Teachers: several of them, in lower precision, in the student's own memory, and remembered on disk."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from helpers import (
    arguments,
    copied,
    prune,
    same_state,
    sentences,
    texts,
    tiny_bert,
    tiny_classifier,
    tiny_llama,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

import sparsehooks
from sparsehooks import PlanError, Recipe, SessionError
from sparsehooks.artifact.atomic import atomic_file
from sparsehooks.teacher_cache import TeacherCache
from sparsehooks.teachers import Teacher

HIDDEN = {"use": "hidden", "layers": "last"}


def batch_of(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batches(count=4, size=4, **options):
    rows = sentences(count * size, **options)
    return [batch_of(rows[start : start + size]) for start in range(0, len(rows), size)]


def distill(*stages, **options):
    return {"stage": [{"distill": stage, **options} for stage in stages]}


@pytest.fixture
def forwards(monkeypatch):
    """How many samples each forward of a teacher had."""
    sizes = []
    ask = Teacher._ask

    def counted(self, given):
        sizes.append(len(given["input_ids"]))
        return ask(self, given)

    monkeypatch.setattr(Teacher, "_ask", counted)
    return sizes


def losses(model, recipe, data, *, steps=None, folder=None, rate=1e-2):
    """The losses of a plain loop, one a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    found = []
    with sparsehooks.attach(model.train(), optimizer, recipe, total_steps=steps or len(data), folder=folder):
        for batch in data:
            loss = model(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
    return found


# ------------------------------------------------------------------------------------------------------- recipes


def test_a_teacher_is_a_name_or_a_table_or_a_list():
    one, table, several = (
        Recipe.from_dict(distill("kl", teacher=teacher)).stages[0]
        for teacher in ("big", {"use": "big", "dtype": "bfloat16"}, ["self", {"use": "big", "dtype": "bfloat16"}])
    )
    assert [teacher.use for teacher in several.teacher] == ["self", "big"]
    assert several.teacher[1] == table.teacher[0] != one.teacher[0]
    for stage in (one, table, several):
        recipe = Recipe((stage,))
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert one.to_dict() == {"distill": "kl", "teacher": "big"}
    assert "teacher" not in Recipe.from_dict(distill("kl", teacher="self")).to_dict()["stage"][0]


def test_one_teacher_has_one_cache(tmp_path):
    recipe = distill("kl", cache=str(tmp_path / "a"))
    recipe["stage"].append({"distill": HIDDEN, "cache": str(tmp_path / "b")})
    with pytest.raises(PlanError, match=r"stage\[1\].cache: recipe.stage\[0\] keeps the answers of 'self' in"):
        losses(tiny_classifier(), recipe, batches(1))


# ---------------------------------------------------------------------------------------------- several teachers


def test_the_loss_is_the_mean_over_the_teachers_and_each_runs_once_a_batch(tmp_path, forwards):
    names = [str(tmp_path / str(seed)) for seed in (1, 2)]
    for seed, name in zip((1, 2), names, strict=True):
        tiny_classifier(seed).save_pretrained(name)
    data = batches(1)
    single = [losses(tiny_classifier(), distill("kl", HIDDEN, teacher=name), data)[0] for name in names]
    assert len(forwards) == 2
    (both,) = losses(tiny_classifier(), distill("kl", HIDDEN, teacher=names), data)
    assert len(forwards) == 4
    assert both == pytest.approx(sum(single) / 2, rel=1e-6)
    assert single[0] != single[1]


def test_teachers_of_other_widths_have_projections_of_their_own(tmp_path):
    for width in (32, 48):
        config = transformers.BertConfig(
            vocab_size=128, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        transformers.BertModel(config).save_pretrained(tmp_path / str(width))
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = distill(HIDDEN, teacher=[str(tmp_path / "32"), str(tmp_path / "48")])
    with sparsehooks.attach(model.train(), optimizer, recipe, total_steps=1) as session:
        model(**batches(1)[0])["loss"].backward()
        optimizer.step()
        made = session.state_dict()["learned"]["tensors"]
    assert {name: tuple(tensors["projection"].shape) for name, tensors in made.items()} == {
        "0.distill": (32, 64),
        "0.distill.1": (48, 64),
    }


# ----------------------------------------------------------------------------------------------------- precision


def teachers_of(session):
    return list(session._distillation._teachers.values())


@pytest.mark.parametrize("teacher", ["self", "folder"])
def test_a_teacher_in_lower_precision(teacher, tmp_path):
    model = tiny_classifier()
    if teacher == "folder":
        teacher = str(tmp_path)
        model.save_pretrained(tmp_path)
    twin = copy.deepcopy(model).eval().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches(1)[0]
    recipe = distill("kl", teacher={"use": teacher, "dtype": "bfloat16"})
    with sparsehooks.attach(model.train(), optimizer, recipe, total_steps=1) as session:
        answer = teachers_of(session)[0](data)
        assert answer["logits"].dtype == torch.bfloat16
        assert torch.equal(answer["logits"], twin(**data).logits)
        step(model, optimizer, data)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_images_enter_a_teacher_in_its_precision():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    recipe = distill("kl", teacher={"use": "self", "dtype": "bfloat16"})
    (loss,) = losses(model, recipe, [{"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.zeros(2).long()}])
    assert 0 < loss < 10


def test_mixed_precision_leaves_the_teacher_exact():
    """Accelerate computes the student's forward in bfloat16; the teacher answers after it, in float32."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny_classifier()
    twin = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    data = batches(1)[0]
    answers = []
    with sparsehooks.attach(prepared, optimizer, distill("kl"), total_steps=1, accelerator=accelerator) as session:
        (teacher,) = teachers_of(session)
        teacher.model.register_forward_hook(lambda module, args, outputs: answers.append(outputs.logits))
        prepared.train()(**data, labels=torch.zeros(4).long()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(answers[0], twin(**data).logits)


FORWARD = {"use": "linear", "every": 1}


@pytest.mark.parametrize("criterion", ["movement", "soft_movement", "l0", "sr_ste"])
def test_the_masks_of_the_student_are_not_those_of_its_teacher(criterion, tmp_path):
    """Where masks act in the forward, fresh and resumed."""
    model = tiny_classifier()
    twin = copy.deepcopy(model).eval()
    data = batches(4)
    stage = {"prune": criterion, "schedule": FORWARD, "exclude": ["classifier"], "sparsity": 0.5}
    if criterion == "sr_ste":
        stage |= {"pattern": "2:4"}
        del stage["sparsity"]
    recipe = {"stage": [stage, {"distill": "kl"}]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with contextlib.suppress(BrokenOffError):  # the second time it is resumed
            attached = sparsehooks.attach(model.train(), optimizer, recipe, total_steps=4, folder=tmp_path)
            with attached as session:
                for batch in data[session.step : session.step + 2]:
                    step(model, optimizer, batch)
                (teacher,) = teachers_of(session)
                assert any(not mask.all() for mask in session.masks.masks.values())
                with torch.no_grad():
                    assert torch.equal(teacher(data[0])["logits"], twin(**data[0]).logits)
                state = copy.deepcopy(optimizer.state_dict())
                raise BrokenOffError
        optimizer.load_state_dict(state)


class BrokenOffError(Exception):
    """A run breaks off."""


# -------------------------------------------------------------------------------------------------------- memory


EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def step(model, optimizer, batch, labels=None):
    model(**batch, labels=torch.zeros(4).long() if labels is None else labels).loss.backward()
    optimizer.step()


def frozen(model, *names):
    for name, parameter in model.named_parameters():
        if any(name.startswith(start) for start in names):
            parameter.requires_grad_(requires_grad=False)
    return model


def shared(model, teacher):
    """Names of the parameters whose memory both have."""
    mine = dict(teacher.model.named_parameters())
    return {name for name, weight in model.named_parameters() if weight.data_ptr() == mine[name].data_ptr()}


def test_what_does_not_train_is_not_copied():
    model = frozen(tiny_classifier(), "bert.embeddings", "bert.encoder.layer.0")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pruned = "bert.encoder.layer.0.output.dense.weight"
    recipe = distill("kl")
    recipe["stage"].append({"prune": "magnitude", "sparsity": 0.5, "targets": ["bert.encoder.layer.0.output.dense"]})
    before = copied(model)
    with sparsehooks.attach(model.train(), optimizer, recipe, total_steps=2) as session:
        (teacher,) = teachers_of(session)
        still = {name for name, weight in model.named_parameters() if not weight.requires_grad and weight.dim() > 1}
        assert EMBEDDINGS in still
        assert shared(model, teacher) == still - {pruned}
        for batch in batches(2):
            model(**batch, labels=torch.zeros(4).long()).loss.backward()
            optimizer.step()
        assert (model.get_parameter(pruned) == 0).any()
        assert same_state(teacher.model, before)


def test_blocks_that_may_be_masked_are_copied():
    model = frozen(tiny_classifier(), "bert.embeddings")
    recipe = distill("kl")
    recipe["stage"].append(prune(0.5, pattern="head", targets=["*attention*"])["stage"][0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with sparsehooks.attach(model.train(), optimizer, recipe, total_steps=2) as session:
        assert not shared(model, teachers_of(session)[0])
        for batch in batches(2):
            step(model, optimizer, batch)


def test_the_teacher_stays_what_it_was_when_weights_thaw():
    model = frozen(tiny_classifier(), "bert.embeddings")
    before = copied(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sparsehooks.attach(model.train(), optimizer, distill("kl"), total_steps=2) as session:
        (teacher,) = teachers_of(session)
        for batch in batches(2):
            model.requires_grad_(requires_grad=True)
            model(**batch, labels=torch.zeros(4).long()).loss.backward()
            optimizer.step()
        assert not torch.equal(model.get_parameter(EMBEDDINGS), before[EMBEDDINGS])
        assert same_state(teacher.model, before)


def test_a_resumed_run_shares_what_is_still_the_same(tmp_path):
    model = frozen(tiny_classifier(), "bert.embeddings")
    before = copied(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    recipe = distill("kl")
    with sparsehooks.attach(model.train(), optimizer, recipe, total_steps=2, folder=tmp_path):
        step(model, optimizer, batches(1)[0])
        state = copy.deepcopy(optimizer.state_dict())
        step(model, optimizer, batches(1)[0])
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.add_(1.0)
    optimizer.load_state_dict(state)
    with sparsehooks.attach(model, optimizer, recipe, total_steps=2, folder=tmp_path) as session:
        (teacher,) = teachers_of(session)
        expected = {EMBEDDINGS, "bert.embeddings.token_type_embeddings.weight"}
        assert shared(model, teacher) == expected
        assert same_state(teacher.model, before)
        step(model, optimizer, batches(1)[0])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_base_of_an_adapter_is_in_memory_once():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    inside = model.get_base_model()
    base = {name for name, weight in inside.named_parameters() if "lora" not in name and weight.dim() > 1}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with sparsehooks.attach(model.train(), optimizer, distill("kl"), total_steps=1) as session:
        assert shared(inside, teachers_of(session)[0]) == base
        batch = batches(1)[0]
        step(model, optimizer, batch, labels=batch["input_ids"])


# --------------------------------------------------------------------------------------------------------- cache


def cached(folder, *stages, **options):
    return distill(*stages, cache=str(folder), **options)


def stored(folder):
    """The tensors of a cache: what follows the sample in their names."""
    names = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {name.partition("/")[2] for name in file.keys()}  # noqa: SIM118 - no mapping
    return names


EVERY = ("kl", "reverse_kl", "jsd", "dkd", "hidden", "cosine", "attention", "relation", "contrastive")


@pytest.mark.parametrize("stages", [*((loss,) for loss in EVERY), (HIDDEN,), ("kl", "hidden", "attention")])
def test_each_sample_is_asked_about_once_and_the_losses_are_the_same(stages, tmp_path, forwards):
    data = 3 * [{**batch, "labels": batch["input_ids"][:, 0] % 3} for batch in batches(4)]
    live = losses(tiny_classifier(), distill(*stages), data)
    assert len(forwards) == 12
    assert losses(tiny_classifier(), cached(tmp_path, *stages), data) == live
    assert len(forwards) == 16
    assert losses(tiny_classifier(), cached(tmp_path, *stages), data) == live  # the next run finds everything
    assert len(forwards) == 16


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (("kl",), {"logits#whole"}),
        ((HIDDEN,), {"hidden_states/2#tokens"}),
        (("hidden",), {f"hidden_states/{index}#tokens" for index in range(3)}),
        (("attention",), {f"attentions/{index}#pairs" for index in range(2)}),
        (("relation",), {f"{part}/1#tokens" for part in ("queries", "keys", "values")}),
    ],
)
def test_what_the_losses_read_is_kept_without_padding(stages, expected, tmp_path):
    data = batches(2)
    losses(tiny_classifier(), cached(tmp_path, *stages), data)
    assert stored(tmp_path) == expected
    tokens = 0
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tokens += sum(len(file.get_tensor(name)) for name in file.keys() if "/2#tokens" in name)  # noqa: SIM118
    if "hidden_states/2#tokens" in expected:
        assert tokens == sum(int(batch["attention_mask"].sum()) for batch in data)


@pytest.mark.parametrize("loss", ["kl", "hidden", "attention", "relation"])
def test_another_order_other_batches_and_other_padding_find_a_sample_again(loss, tmp_path, forwards):
    rows = sentences(24)
    torch.manual_seed(0)
    odd = [rows[index] for index in torch.randperm(24).tolist()]
    wider = [{key: torch.nn.functional.pad(value, (0, 5)) for key, value in row.items()} for row in odd]
    shorter = [{key: value[: int(row["attention_mask"].sum())] for key, value in row.items()} for row in rows]
    again = [batch_of(odd[:10]), batch_of(wider[10:]), *(batch_of([row]) for row in shorter)]
    losses(tiny_classifier(), cached(tmp_path, loss), [batch_of(rows[:16]), batch_of(rows[16:])], rate=0.0)
    assert forwards == [16, 8]
    live = losses(tiny_classifier(1), distill(loss, teacher=str(saved(tmp_path, 0))), again, rate=0.0)
    asked = len(forwards)
    read = losses(tiny_classifier(1), cached(tmp_path, loss, teacher=str(tmp_path / "teacher-0")), again, rate=0.0)
    assert len(forwards) == asked
    assert read == pytest.approx(live, rel=1e-5, abs=1e-6)  # other sums, rounded otherwise


def saved(folder, seed):
    path = folder / f"teacher-{seed}"
    tiny_classifier(seed).save_pretrained(path)
    return path


def test_padding_in_front_moves_positions_and_counts(tmp_path, forwards):
    row = sentences(1)[0]
    front = {key: torch.nn.functional.pad(value, (3, 0)) for key, value in row.items()}
    losses(tiny_classifier(), cached(tmp_path, "kl"), [batch_of([row]), batch_of([front])], rate=0.0)
    assert forwards == [1, 1]


def test_tokens_of_a_causal_model(tmp_path, forwards):
    data = 2 * [batch_of(texts(4))]
    live = losses(tiny_llama(), distill("kl"), data)
    assert losses(tiny_llama(), cached(tmp_path, "kl"), data) == live
    assert forwards == [4, 4, 4]
    assert stored(tmp_path) == {"logits#tokens"}


def test_an_encoder_decoder_keeps_samples_with_their_padding(tmp_path, forwards):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.0}
    config = transformers.T5Config(vocab_size=128, decoder_start_token_id=0, **sizes)
    made = transformers.T5ForConditionalGeneration(config)
    data = 2 * [batch_of(texts(4))]
    live = losses(copy.deepcopy(made), distill("kl"), data)
    assert losses(copy.deepcopy(made), cached(tmp_path, "kl"), data) == live
    assert forwards == [4, 4, 4]
    assert stored(tmp_path) == {"logits#whole"}


def test_a_stage_that_reads_more_asks_again_and_keeps_that_too(tmp_path, forwards):
    data = batches(2)
    losses(tiny_classifier(), cached(tmp_path, "kl"), data, rate=0.0)
    live = losses(tiny_classifier(), distill("kl", "hidden"), data)
    del forwards[:]
    assert losses(tiny_classifier(), cached(tmp_path, "kl", "hidden"), data) == live
    assert losses(tiny_classifier(), cached(tmp_path, "kl", "hidden"), data) == live
    assert forwards == [4, 4]


def test_precision_is_kept(tmp_path):
    data = batches(1)
    use = {"use": "self", "dtype": "bfloat16"}
    live = losses(tiny_classifier(), distill("kl", HIDDEN, teacher=use), data)
    losses(tiny_classifier(), cached(tmp_path, "kl", HIDDEN, teacher=use), data)
    assert losses(tiny_classifier(), cached(tmp_path, "kl", HIDDEN, teacher=use), data) == live
    (path,) = tmp_path.rglob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_answers_of_another_teacher_are_not_used(tmp_path, forwards):
    data, other = batches(2), str(saved(tmp_path, 1))
    losses(tiny_classifier(), cached(tmp_path / "cache", "kl"), data)
    live = losses(tiny_classifier(), distill("kl", teacher=other), data)
    del forwards[:]
    with pytest.warns(UserWarning, match="holds answers of other teachers only: they are not used"):
        assert losses(tiny_classifier(), cached(tmp_path / "cache", "kl", teacher=other), data) == live
    assert forwards == [4, 4]
    both = cached(tmp_path / "cache", "kl", teacher=["self", other])
    losses(tiny_classifier(), both, data)
    assert forwards == [4, 4]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_a_teacher_with_another_config_is_another_teacher(tmp_path, forwards):
    data = batches(1)
    losses(tiny_bert(), cached(tmp_path, "hidden"), data)
    model = tiny_bert()
    model.config.layer_norm_eps = 1e-6
    with pytest.warns(UserWarning, match="other teachers"):
        losses(model, cached(tmp_path, "hidden"), data)
    assert forwards == [4, 4]


def test_a_damaged_file_is_named(tmp_path):
    data = batches(2)
    losses(tiny_classifier(), cached(tmp_path, "kl"), data)
    (path,) = tmp_path.rglob("*.safetensors")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    other = good.replace(b'"version": 1', b'"version": 2').replace(b'\\"version\\": 1', b'\\"version\\": 2')
    assert other != good
    for bad in (bytes(flipped), good[:-1], good[:100], b"", good.replace(b"sparsehooks", b"somethings!")):
        path.write_bytes(bad)
        with pytest.raises(SessionError, match=f"'{path}' in the teacher cache is damaged; delete it"):
            losses(tiny_classifier(), cached(tmp_path, "kl"), data)
    path.write_bytes(other)
    with pytest.raises(SessionError, match="version 2; upgrade"):
        losses(tiny_classifier(), cached(tmp_path, "kl"), data)
    path.write_bytes(good)
    (path.parent / ".0-0.safetensors.0123abcd.tmp").write_bytes(good[:50])  # what a killed process leaves
    losses(tiny_classifier(), cached(tmp_path, "kl"), data)


def test_a_folder_that_cannot_be_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SessionError, match=r"the teacher cache '.*file' cannot be made"):
        losses(tiny_classifier(), cached(tmp_path / "file", "kl"), batches(1))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"position_ids": torch.arange(12)[None]}, r"the input 'position_ids' of shape \(1, 12\) has none"),
        ({"inputs_embeds": torch.tensor(0.5)}, r"the input 'inputs_embeds' of shape \(\) has none"),
        ({"past_key_values": {}}, "cannot tell one dict from another, and the input 'past_key_values' is one"),
    ],
)
def test_inputs_that_do_not_fall_into_samples(extra, message, tmp_path):
    cache = TeacherCache(tmp_path, "0" * 32)
    with pytest.raises(SessionError, match=message):
        cache.answer({**batches(1)[0], **extra}, dict)


def test_outputs_that_do_not_fall_into_samples(tmp_path):
    answer = TeacherCache(tmp_path, "0" * 32).answer(batches(1)[0], lambda: {"loss": torch.tensor(1.0), "state": "x"})
    with pytest.raises(SessionError, match=r"the teacher's 'loss' of shape \(\) has none; leave 'cache' out"):
        answer["loss"]
    assert answer["state"] == "x"
    assert answer.get("logits") is None
    assert set(answer) == {"loss", "state"}


def test_forms_that_look_alike(tmp_path):
    """As many classes as tokens, attention probabilities, and flags that are inputs."""
    torch.manual_seed(0)
    rows, classes, attention = sentences(4), torch.randn(4, 12), torch.rand(4, 2, 12, 12)
    given = batch_of(rows)
    real = given["attention_mask"].bool()
    outputs = {"logits": classes, "attentions": (attention * real[:, None, None] * real[:, None, :, None],)}
    first = TeacherCache(tmp_path, "0" * 32)
    for key in outputs:
        first.answer(given, lambda: outputs)[key]
    first.answer(given, lambda: outputs)["attentions"][0]
    first.flush()
    answer = TeacherCache(tmp_path, "0" * 32).answer(given, refuse)
    assert torch.equal(answer["logits"], classes)
    assert torch.equal(answer["attentions"][-1], outputs["attentions"][0])
    assert len(answer["attentions"]) == 1
    with pytest.raises(IndexError):
        answer["attentions"][1]
    wider = {key: torch.nn.functional.pad(value, (0, 1)) for key, value in given.items()}
    answer = TeacherCache(tmp_path, "0" * 32).answer(wider, refuse)
    assert torch.equal(answer["attentions"][0][:, :, :12, :12], outputs["attentions"][0])
    for lookup in (
        lambda: answer["logits"],
        lambda: TeacherCache(tmp_path, "0" * 32).answer({**given, "flag": True}, refuse)["attentions"][0],
    ):
        with pytest.raises(AssertionError, match="asked"):
            lookup()


def refuse():
    raise AssertionError("the teacher was asked")


def test_answers_wait_in_memory_until_a_checkpoint_or_a_file_is_full(tmp_path, monkeypatch):
    model, data = tiny_classifier(), batches(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    files = []
    with sparsehooks.attach(model.train(), optimizer, cached(tmp_path, "kl"), total_steps=4):
        for index, batch in enumerate(data):
            if index == 2:
                optimizer.state_dict()
            if index == 3:
                monkeypatch.setattr("sparsehooks.teacher_cache.FLUSH", 1)
            model(**batch, labels=torch.zeros(4).long()).loss.backward()
            optimizer.step()
            files.append(len(list(tmp_path.rglob("*.safetensors"))))
    assert files == [0, 0, 1, 2]
    assert not list(tmp_path.rglob("*.tmp"))
    assert not optimizer._optimizer_state_dict_pre_hooks


def test_a_file_is_written_when_answers_get_old_or_are_wanted_again(tmp_path, monkeypatch):
    clock, files = [0.0], []
    monkeypatch.setattr("sparsehooks.teacher_cache.time", SimpleNamespace(monotonic=lambda: clock[0]))
    cache, (first, second, third, fourth) = TeacherCache(tmp_path, "0" * 32), batches(4)
    for clock[0], batch in zip(range(0, 16, 2), 2 * (first, second, third, fourth), strict=True):
        answer = cache.answer(batch, lambda: {"logits": torch.zeros(4, 3)})
        assert answer.keys() & {"logits", "loss"} == {"logits"}
        assert answer.get("loss") is None  # not what another epoch does
        cache.flush(due=True)
        files.append(len(list(tmp_path.rglob("*.safetensors"))))
    assert files == [0, 0, 0, 0, 1, 1, 1, 1]
    cache.answer(batches(5)[4], lambda: {"logits": torch.zeros(4, 3)})["logits"]
    for clock[0], expected in ((20.0, 1), (37.9, 1), (38.1, 2)):
        cache.flush(due=True)
        assert len(list(tmp_path.rglob("*.safetensors"))) == expected


def full(tensors, path, metadata=None):
    path.write_bytes(b"half")
    raise SafetensorError("No space left on device")


def test_a_full_disk_ends_the_cache_and_not_the_run(tmp_path, monkeypatch, forwards):
    data = 3 * batches(2)
    live = losses(tiny_classifier(), distill("kl"), data)
    kept = cached(tmp_path, "kl")
    losses(tiny_classifier(), kept, data[:1])
    monkeypatch.setattr("sparsehooks.teacher_cache.save_file", full)
    monkeypatch.setattr("sparsehooks.teacher_cache.FLUSH", 1)
    del forwards[:]
    with pytest.warns(UserWarning, match="cannot be written, so the run keeps no more answers: No space") as seen:
        assert losses(tiny_classifier(), kept, data) == live
    assert len([warning for warning in seen if "cannot be written" in str(warning.message)]) == 1
    assert forwards == [4, 4, 4]  # what is there is still read
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_checkpoint_on_a_full_disk_is_made_without_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsehooks.teacher_cache.save_file", full)
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sparsehooks.attach(model.train(), optimizer, cached(tmp_path, "kl"), total_steps=1):
        step(model, optimizer, batches(1)[0])
        with pytest.warns(UserWarning, match="keeps no more answers"):
            assert optimizer.state_dict()["param_groups"][0]["sparsehooks"]["step"] == 1


def test_an_output_that_a_teacher_does_not_give_is_asked_for_once(tmp_path):
    (first, second), asked = batches(2), []

    def ask():
        asked.append(1)
        return {"logits": torch.zeros(4, 3)}

    cache = TeacherCache(tmp_path, "0" * 32)
    assert cache.answer(first, ask).get("loss") is None
    assert cache.answer(first, refuse).get("loss", 5) == 5
    assert "loss" not in cache.answer(first, refuse)
    cache.flush()
    again = TeacherCache(tmp_path, "0" * 32)
    with pytest.raises(KeyError, match="loss"):
        again.answer(first, refuse)["loss"]
    assert again.answer(second, ask).get("loss") is None  # of other inputs nobody knows
    assert len(asked) == 2
    with pytest.raises(KeyError, match="inside"):
        again.answer(first, lambda: {}["inside"])["logits"]
    with pytest.raises(AssertionError, match="asked"):
        again.answer(first, refuse)["logits"]  # an error of the teacher is no absence


def test_a_cache_that_moves_is_the_same_recipe(tmp_path, forwards):
    model, (batch,) = tiny_classifier(), batches(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sparsehooks.attach(model.train(), optimizer, cached(tmp_path / "a", "kl"), total_steps=2, folder=tmp_path):
        step(model, optimizer, batch)
        state = copy.deepcopy(optimizer.state_dict())
        step(model, optimizer, batch)
    (tmp_path / "a").rename(tmp_path / "b")
    optimizer.load_state_dict(state)
    with sparsehooks.attach(model, optimizer, cached(tmp_path / "b", "kl"), total_steps=2, folder=tmp_path) as session:
        assert session.step == 1
        step(model, optimizer, batch)
    assert forwards == [4]
    digests = {Recipe.from_dict(recipe).digest() for recipe in (cached("a", "kl"), cached("b", "kl"), distill("kl"))}
    assert digests == {Recipe.from_dict(distill("kl")).digest()}


def test_the_teacher_waits_on_the_cpu_while_it_is_asked_nothing(tmp_path, monkeypatch):
    model = tiny_classifier()
    teacher = Teacher(copy.deepcopy(model), model, (), cache=tmp_path)
    moves = []
    monkeypatch.setattr(Teacher, "_move", lambda self, device: moves.append(device))
    monkeypatch.setattr("sparsehooks.teachers.IDLE", 2)
    teacher._home = "home"
    known, *others = batches(5)
    teacher(known)["logits"]
    for batch in others[:3]:  # known and new ones take turns
        teacher(known)["logits"]
        teacher(batch)["logits"]
    assert moves == 4 * ["home"]
    for _ in range(5):
        teacher(known)["logits"]
    assert moves == [*4 * ["home"], torch.device("cpu")]
    assert teacher(others[3])["logits"].shape == (4, 3)
    assert moves[5:] == ["home"]


def fail(path, error):
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    with pytest.raises(KeyboardInterrupt):
        fail(path, KeyboardInterrupt())
    assert not list(path.parent.iterdir())
    with atomic_file(path) as temporary:
        save_file({"tensor": torch.zeros(1)}, temporary)
    (path.parent / "plain").touch()
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode
    with pytest.raises(OSError, match="full"):
        fail(path, OSError("full"))
    assert torch.equal(load_file(path)["tensor"], torch.zeros(1))


def test_what_killed_runs_left_beside_a_file_is_removed_when_it_is_old(tmp_path):
    old, young, other = (tmp_path / name for name in (".a.01234567.tmp", ".b.89abcdef.tmp", ".mine.tmp"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.touch()
    assert {path.name for path in tmp_path.iterdir()} == {"file", young.name, other.name}


def test_ranks_write_files_of_their_own_and_read_those_of_others(tmp_path, monkeypatch):
    data, caches = batches(2), []
    monkeypatch.setattr("sparsehooks.teacher_cache.world_size", lambda: 2)
    for number, batch in enumerate(data):
        monkeypatch.setattr("sparsehooks.teacher_cache.rank", lambda number=number: number)
        caches.append(TeacherCache(tmp_path, "0" * 32))
        value = torch.full((4, 3), float(number))
        assert caches[number].answer(batch, lambda value=value: {"logits": value})["logits"] is value
    for number, cache in enumerate(caches):
        monkeypatch.setattr("sparsehooks.teacher_cache.rank", lambda number=number: number)
        cache.flush()
    assert sorted(path.name[:2] for path in tmp_path.rglob("*.safetensors")) == ["0-", "1-"]
    for cache, batch, value in zip(caches, reversed(data), (1.0, 0.0), strict=True):
        assert (cache.answer(batch, refuse)["logits"] == value).all()


def collate(rows):
    """Padding as far as the longest of the batch needs it."""
    batch = batch_of(rows)
    longest = int(batch["attention_mask"].sum(dim=1).max())
    return {key: value[:, :longest] for key, value in batch.items()}


class Copy(TrainerCallback):
    """What a process that is killed right after a checkpoint leaves."""

    def __init__(self, source, target):
        self.source, self.target = source, target

    def on_save(self, args, state, control, **kwargs):
        shutil.copytree(self.source, self.target / str(state.global_step))


def test_a_killed_and_resumed_trainer_run_is_bit_identical_and_asks_nothing_twice(tmp_path, forwards):
    cache, copies = tmp_path / "cache", tmp_path / "copies"

    def run(resume=None):
        model = tiny_bert()
        options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 8}
        trainer = Trainer(model, arguments(tmp_path / "run", **options), train_dataset=sentences(30))
        trainer.data_collator = collate
        trainer.add_callback(sparsehooks.CompressionCallback(cached(cache, "hidden")))
        trainer.add_callback(Copy(cache, copies))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run()
    assert sum(forwards) == 30
    shutil.rmtree(cache)
    (copies / "4").rename(cache)
    shutil.rmtree(copies)
    del forwards[:]
    assert same_state(run(str(tmp_path / "run" / "checkpoint-4")), whole)
    assert not forwards
