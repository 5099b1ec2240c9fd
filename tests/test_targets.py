"""Targets: which weights a stage means."""

import pytest
import torch
from helpers import tiny_bert, tiny_llama
from torch import nn
from transformers import Conv1D, GPT2Config, GPT2LMHeadModel

from sparsehooks import RecipeError
from sparsehooks.targets import find


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))


def found(model, targets, exclude=()):
    return [target.parameter for target in find(model, targets, exclude)[0]]


def linear(model):
    """Every Linear, by hand."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]


class Custom(nn.Linear):
    pass


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.custom = Custom(4, 4)
        self.conv = nn.Conv2d(3, 6, (2, 5))
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.lora_A = nn.Linear(4, 2)
        self.proj = nn.ModuleDict({"base": nn.Linear(4, 4), "lora_B": nn.ModuleDict({"default": nn.Linear(2, 4)})})
        self.flora_x = nn.Linear(4, 4)


def test_a_class_name_means_all_its_modules_in_the_order_of_the_parameters():
    model = tiny_bert()
    assert found(model, ["Linear"]) == linear(model)


def test_subclasses_are_meant_too():
    assert found(Mixed(), ["Linear"]) == ["first.weight", "custom.weight", "proj.base.weight", "flora_x.weight"]
    assert found(Mixed(), ["Custom"]) == ["custom.weight"]


def test_a_glob_means_module_names():
    model = tiny_bert()
    wanted = [name for name in linear(model) if name.startswith("encoder.layer.1.") and name.endswith("dense.weight")]
    assert len(wanted) == 3
    assert found(model, ["encoder.layer.1.*dense"]) == wanted
    assert found(model, ["encoder.layer.[1]*.dense"]) == wanted
    with pytest.raises(RecipeError, match="matches no module"):
        find(model, ["ENCODER.*"], [])


def test_a_regular_expression_matches_the_whole_name():
    model = tiny_bert()
    wanted = [name for name in linear(model) if name.endswith((".query.weight", ".key.weight"))]
    assert len(wanted) == 4
    assert found(model, [r"re:encoder\.layer\.\d+\.attention\.self\.(query|key)"]) == wanted
    with pytest.raises(RecipeError, match=r"target 're:query' matches no module"):
        find(model, ["re:query"], [])


def test_exclude_takes_away_in_the_same_three_ways():
    model = tiny_bert()
    kept = [name for name in linear(model) if "query" not in name and "pooler" not in name and ".0." not in name]
    assert found(model, ["Linear"], ["*query", r"re:.*layer\.0\..*", "BertPooler", "pooler*"]) == kept


def test_an_exclude_that_matches_nothing_is_fine():
    model = tiny_bert()
    assert found(model, ["Linear"], ["lm_head", "NoSuchClass"]) == linear(model)


@pytest.mark.parametrize("targets", [["Linear", "*dense"], ["*dense", "Linear"], ["Linear", "Linear"]])
def test_patterns_add_up_and_change_no_order(targets):
    model = tiny_bert()
    assert found(model, targets) == linear(model)


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        (["Liner"], [], "target 'Liner' matches no module; did you mean 'Linear'?"),
        (["Linear", "*.quary"], [], "target '*.quary' matches no module"),
        (["ModuleDict"], [], "target 'ModuleDict' matches only modules without a weight matrix"),
        (["LayerNorm"], [], "target 'LayerNorm' matches only modules without a weight matrix"),
        (["re:("], [], "target 're:(' is not a regular expression"),
        (["Linear"], ["re:["], "target 're:[' is not a regular expression"),
        (["Linear"], ["*"], "no weight is left; the model has weights in"),
        (["lora_A"], [], "no weight is left; the model has weights in"),
    ],
)
def test_what_means_nothing_is_an_error(targets, exclude, message):
    with pytest.raises(RecipeError) as caught:
        find(Mixed(), targets, exclude)
    assert str(caught.value).startswith(message)


def test_adapter_factors_are_left_out_whatever_names_them():
    assert found(Mixed(), ["*"]) == [
        "first.weight", "custom.weight", "conv.weight", "embedding.weight", "proj.base.weight", "flora_x.weight"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ tied


def test_a_weight_that_an_excluded_module_shares_is_left_out_with_a_note():
    model = tiny_llama(tied=True)
    targets, notes = find(model, ["Linear", "Embedding"], ["lm_head"])
    assert [target.parameter for target in targets] == [name for name in linear(model) if name != "lm_head.weight"]
    assert notes == ["'model.embed_tokens.weight' is left out: it is tied to lm_head, which is not a target"]


def test_a_tied_head_alone_is_left_out_with_a_note():
    targets, notes = find(tiny_llama(tied=True), ["Linear"], [])
    assert "model.embed_tokens.weight" not in [target.parameter for target in targets]
    assert notes == ["'model.embed_tokens.weight' is left out: it is tied to model.embed_tokens, which is not a target"]
    with pytest.raises(RecipeError, match=r"no weight is left: 'model\.embed_tokens\.weight' is"):
        find(tiny_llama(tied=True), ["lm_head"], [])


def test_a_tied_weight_that_is_meant_everywhere_is_one_target():
    targets, notes = find(tiny_llama(tied=True), ["Linear", "Embedding"], [])
    (tied,) = [target for target in targets if len(target.modules) > 1]
    assert (tied.parameter, tied.modules) == ("model.embed_tokens.weight", ("model.embed_tokens", "lm_head"))
    assert notes == []


def test_an_untied_head_is_a_target_of_its_own():
    targets, notes = find(tiny_llama(), ["Linear"], [])
    assert "lm_head.weight" in [target.parameter for target in targets]
    assert notes == []


# ---------------------------------------------------------------------------------------------------------- shapes


def test_a_transformers_conv1d_is_transposed():
    model = tiny_gpt2()
    targets, _ = find(model, ["Conv1D"], [])
    assert len(targets) == 4
    for target in targets:
        module = model.get_submodule(target.modules[0])
        assert isinstance(module, Conv1D)
        assert target.transposed
        assert target.shape == tuple(module.weight.shape)
        assert target.matrix_shape == target.shape[::-1] == target.matrix(module.weight).shape
        inputs = torch.randn(3, target.shape[0], generator=torch.Generator().manual_seed(0))
        rows = target.matrix(module.weight)
        torch.testing.assert_close(module(inputs), nn.functional.linear(inputs, rows, module.bias))
    with pytest.raises(RecipeError, match="did you mean 'Conv1D'"):
        find(model, ["Conv1d"], [])


def test_a_convolution_is_a_matrix_with_a_row_for_each_output():
    model = Mixed()
    (target,) = find(model, ["Conv2d"], [])[0]
    assert (target.shape, target.matrix_shape, target.transposed) == ((6, 3, 2, 5), (6, 30), False)
    matrix = target.matrix(model.conv.weight)
    assert torch.equal(matrix[2], model.conv.weight[2].flatten())


@pytest.mark.parametrize(("make", "pattern"), [(Mixed, "Conv2d"), (tiny_gpt2, "Conv1D"), (Mixed, "Embedding")])
def test_restore_is_the_inverse_of_matrix_and_a_view(make, pattern):
    model = make()
    weights = dict(model.named_parameters())
    for target in find(model, [pattern], [])[0]:
        weight = weights[target.parameter].detach()
        restored = target.restore(target.matrix(weight))
        assert torch.equal(restored, weight)
        assert restored.data_ptr() == weight.data_ptr()
        assert target.size == weight.numel()
