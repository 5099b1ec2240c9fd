"""Students made of a teacher's blocks: what stays is the teacher's, and the folder opens like any other."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from helpers import VOCABULARY, prune, same_state, tiny_bert, tiny_llama
from test_shrink import MODELS, made, outputs, randomized, skipped

import sparsehooks
from sparsehooks import SparseHooksError, find_couplings, keep_layers

ONE_STACK = [*(name for name in MODELS if not name.startswith("t5")), "phi3"]


def stacks(model):
    return {coupling.name: coupling.units for coupling in find_couplings(model, "layer")[0]}


@pytest.mark.parametrize("name", [*MODELS, "phi3", "bart"])
def test_all_layers_are_the_model_itself(name):
    model = made(name)
    student = keep_layers(model, stacks(model))
    assert same_state(student, model)
    assert torch.equal(outputs(student), outputs(model))
    assert not {id(parameter) for parameter in student.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", ONE_STACK)
def test_a_student_computes_what_the_model_without_the_other_blocks_does(name, tmp_path):
    model = made(name)
    if name == "gpt2":  # a block there scales by its number, which is another one in the student
        model.config.scale_attn_by_inverse_layer_idx = False
        model = randomized(type(model)(model.config))
    ((stack, count),) = stacks(model).items()
    before = model.config.to_dict()
    student = keep_layers(model, [0, count - 1])
    assert model.config.to_dict() == before
    assert student.config.num_hidden_layers == 2
    student.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    assert same_state(opened, student)
    skipped(model, stack, range(1, count - 1))
    assert torch.equal(outputs(student), outputs(model))
    assert torch.equal(outputs(opened), outputs(model))


def test_an_encoder_and_a_decoder_have_layers_of_their_own(tmp_path):
    model = made("t5")
    student = keep_layers(model, {"decoder.block": [0, 2]})
    assert stacks(student) == {"encoder.block": 3, "decoder.block": 2}
    student.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    hooks = skipped(model, "decoder.block", [1])
    assert torch.equal(outputs(student), outputs(model))
    assert torch.equal(outputs(opened), outputs(model))
    for hook in hooks:
        hook.remove()
    without_the_first = keep_layers(model, {"decoder.block": [1, 2]})  # which had the position biases of all
    without_the_first.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(without_the_first))
    encoder = transformers.T5EncoderModel(copy.deepcopy(model.config))
    assert stacks(keep_layers(encoder, 2)) == {"encoder.block": 2}
    with pytest.raises(SparseHooksError, match=r"'encoder.block' and 'decoder.block'; give a mapping"):
        keep_layers(model, 2)


@pytest.mark.parametrize(
    ("count", "wanted", "kept"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (12, 4, [0, 4, 8, 11]),
        (12, 3, [0, 6, 11]),
        (6, 3, [0, 2, 5]),
        (6, 1, [0]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_a_number_takes_the_published_maps(count, wanted, kept):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": count}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **sizes))
    student = keep_layers(model, wanted)
    blocks = model.encoder.layer
    assert all(same_state(mine, blocks[i]) for mine, i in zip(student.encoder.layer, kept, strict=True))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "has 2 blocks and cannot keep 0; keep 1 to 2"),
        (3, "has 2 blocks and cannot keep 3"),
        ([], r"cannot keep the blocks \[\]; name blocks of 0 to 1"),
        ([1, 0], "ascending and each once"),
        ([0, 0], "ascending and each once"),
        ([0, 2], "name blocks of 0 to 1"),
        ({"decoder.layer": 1}, "'decoder.layer' is no list of blocks; this model has 'encoder.layer'"),
    ],
)
def test_layers_that_are_not_there(layers, message):
    with pytest.raises(SparseHooksError, match=message):
        keep_layers(tiny_bert(), layers)


def test_a_model_whose_blocks_cannot_go_says_so():
    with pytest.raises(SparseHooksError, match="Linear has no list of blocks"):
        keep_layers(torch.nn.Linear(2, 2), 1)
    with pytest.raises(SparseHooksError, match="'layers' stay whole: they are not alike"):
        keep_layers(made("modernbert"), 1)


def test_a_student_of_an_artifact_saves_its_own_depth(tmp_path):
    model = sparsehooks.compress(tiny_llama(), prune(0.5), out=tmp_path / "teacher")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    student = keep_layers(opened, [1])
    assert same_state(student.model.layers[0], model.model.layers[1])
    for folder, save in (("dense", type(student).save_pretrained), ("sparse", sparsehooks.save_pretrained)):
        save(student, tmp_path / folder)
        assert same_state(type(student).from_pretrained(tmp_path / folder), student)


def test_a_shrunk_model_has_students(tmp_path):
    recipe = {"stage": [{"prune": "magnitude", "pattern": "channel", "sparsity": 0.5}, {"shrink": True}]}
    model = tiny_bert(transformers.BertForSequenceClassification, num_labels=3)
    recipe["stage"][0]["exclude"] = ["classifier", "*pooler*"]
    sparsehooks.compress(model, recipe, out=tmp_path / "teacher")
    opened = type(model).from_pretrained(tmp_path / "teacher")
    student = keep_layers(opened, 1)
    sparsehooks.save_pretrained(student, tmp_path / "student")
    again = type(model).from_pretrained(tmp_path / "student")
    assert same_state(again, student)
    assert again.bert.encoder.layer[0].intermediate.dense.out_features == 64
