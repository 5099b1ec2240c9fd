import copy
import subprocess
import sys
import types

import pytest
import torch
from helpers import tiny_bert, tiny_llama
from torch import nn

import sparsehooks
from sparsehooks import swapping
from sparsehooks.activations import Activations, problems
from sparsehooks.artifact.quantizer import SparseHooksConfig, arm
from sparsehooks.batches import Batches
from sparsehooks.builtin.activations.relu import ReLU
from sparsehooks.builtin.activations.thresholds import CATS, TEAL, Options
from sparsehooks.errors import ArtifactError, SessionError
from sparsehooks.padding import without_padding
from sparsehooks.recipe import ActivationStage
from sparsehooks.sampling import GRID, Recorder, Sample
from sparsehooks.sites import apply_activations, check, recorded
from sparsehooks.targets import find
from sparsehooks.testing import check_component

MADE = {"relu": ReLU, "cats": CATS, "teal": TEAL}


def batches(count=4, seed=0, padded=True):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        mask = torch.ones(4, 12, dtype=torch.long)
        if padded:
            mask[1:, 8:] = 0
        made.append({"input_ids": torch.randint(1, 128, (4, 12), generator=generator), "attention_mask": mask})
    return made


def stage(use, sparsity=None, index=0, **options):
    made = ActivationStage(activation={"use": use, **options}, sparsity=sparsity)
    return types.SimpleNamespace(
        index=index, stage=made, label=f"stage[{index}] activation {use}", path="recipe.stage[0]"
    )


def begun(model, use, sparsity=None, **options):
    planned = stage(use, sparsity, **options)
    component = MADE[use](Options(**options) if options else None)
    targets = find(model, ("Linear",), ("lm_head",) if hasattr(model, "lm_head") else ())[0]
    acts = Activations([(planned, component, targets)], model)
    acts.start(planned)
    return acts, planned


def done(model, use, sparsity=None):
    acts, planned = begun(model, use, sparsity)
    if sparsity is not None:
        acts.calibrate(Batches(model, batches()))
    acts.advance(planned, 1.0)
    return acts.finish()


@torch.no_grad()
def out(model, batch=None):
    return model.eval()(**(batch or batches(1, seed=9)[0]))[0]


@pytest.mark.parametrize("name", [*MADE, "int4", "int8", "static_int8", "pact"])
def test_the_components_keep_their_contract(name):
    check_component(sparsehooks.PluginManager().catalog, "activation", name)


def test_the_threshold_is_an_exact_order_statistic_and_close_to_the_normal_quantile():
    recorder = Recorder(on=True)
    sample = Sample("layer", recorder)
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for part in values.split(10_000):
        sample.add(part)
    table = sample.table(0.5)
    assert table[GRID] == values.abs().sort().values[49_999]
    assert abs(float(table[GRID]) - 0.6745) < 0.01
    assert int((values.abs() <= float(table[GRID])).sum()) == 50_000
    assert table[0] == -1
    assert bool((table.diff() >= 0).all())


def test_a_large_sample_is_thinned_and_still_right(monkeypatch):
    monkeypatch.setattr("sparsehooks.sampling.LIMIT", 20_000)
    sample = Sample("layer", Recorder(on=True))
    for seed in range(10):
        sample.add(torch.randn(10_000, generator=torch.Generator().manual_seed(seed)))
    assert sum(part.numel() for part in sample._parts) <= 20_000
    assert abs(float(sample.table(0.5)[GRID]) - 0.6745) < 0.03


def inputs_of(model, data, names, transform=lambda module, values: values):
    seen = {name: [] for name in names}
    mask = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(
                without_padding(transform(module, args[0]), mask["now"]).flatten()
            )
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in data:
            mask["now"] = batch["attention_mask"].bool()
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_teal_reaches_its_sparsity_on_the_calibration_data_to_one_element():
    model = tiny_llama()
    acts, planned = begun(model, "teal", 0.4)
    names = list(acts._runs[0].sites)
    assert len(names) == 14
    dense = inputs_of(model, batches(), names)  # nothing is thresholded before the calibration
    held_out = inputs_of(model, batches(8, seed=5), names)
    acts.calibrate(Batches(model, batches()))
    acts.advance(planned, 1.0)
    entries = acts.finish()
    assert sorted(entries) == sorted(names)
    for name in names:
        threshold = entries[name]["amount"]
        assert abs(int((dense[name].abs() <= threshold).sum()) - 0.4 * dense[name].numel()) <= 1
        share = (held_out[name].abs() <= threshold).double().mean()
        assert abs(share - 0.4) < 0.05, name  # few tokens, and the values of one token vary together
    rows = {row["module"]: row for row in sparsehooks.activation_sparsity(model, batches(1))}
    assert set(names) < set(rows)
    assert abs(rows["model.layers.0.self_attn.q_proj"]["zeros"] - 0.4) < 0.05
    assert rows["lm_head"]["zeros"] == 0


def test_the_held_out_sparsity_is_within_a_point_on_many_values():
    layer = nn.Sequential(nn.Linear(64, 64))
    planned = stage("teal", 0.5)
    acts = Activations([(planned, TEAL(), ["0"])], layer)
    acts.start(planned)
    acts.calibrate(Batches(layer, [torch.randn(500, 64, generator=torch.Generator().manual_seed(0))]))
    acts.advance(planned, 1.0)
    acts.finish()
    fresh = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    (row,) = sparsehooks.activation_sparsity(layer, [fresh])
    assert abs(row["zeros"] - 0.5) < 0.01
    assert row["values"] == 500 * 64
    assert row["near_zeros"] == row["zeros"]


def test_padding_does_not_count():
    values = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert without_padding(values, mask).tolist() == [
        values[0, 0].tolist(),
        values[0, 1].tolist(),
        values[1, 0].tolist(),
    ]
    assert without_padding(values.flatten(0, 1), mask).shape == (3, 4)
    assert without_padding(values, None) is values
    model = tiny_llama()
    data = batches(2)
    other = copy.deepcopy(data)
    for batch in other:
        batch["input_ids"][1:, 8:] = 7  # at the end of causal sequences nobody sees them
    first, second = done(copy.deepcopy(model), "teal", 0.5), None
    acts, planned = begun(model, "teal", 0.5)
    acts.calibrate(Batches(model, batches()))
    acts.advance(planned, 1.0)
    second = acts.finish()
    assert first == second
    tables = []
    for given in (data, other):
        acts, _ = begun(tiny_llama(), "teal", 0.5)
        acts.calibrate(Batches(acts._model, given))
        tables.append(acts.state_dict()[0]["tables"])
    assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[0])


def test_the_relu_mix_is_exact_at_both_ends():
    model, relu = tiny_bert(), tiny_bert(hidden_act="relu")
    before = out(model)
    acts, planned = begun(model, "relu")
    assert list(acts._runs[0].sites) == [f"encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(2)]
    acts.advance(planned, 0.0)
    assert torch.equal(out(model), before)
    acts.advance(planned, 0.5)
    middle = out(model)
    acts.advance(planned, 1.0)
    assert torch.equal(out(model), out(relu))
    assert not torch.equal(middle, before)
    entries = acts.finish()
    assert {entry["use"] for entry in entries.values()} == {"relu"}
    assert type(model.encoder.layer[0].intermediate.intermediate_act_fn) is nn.ReLU
    assert model.config.hidden_act == "relu"
    assert torch.equal(out(model), out(relu))


def test_the_config_keeps_its_function_where_some_stay():
    model = tiny_bert()
    planned = stage("relu")
    acts = Activations([(planned, ReLU(), ["encoder.layer.0.intermediate.dense"])], model)
    acts.advance(planned, 1.0)
    entries = acts.finish()
    assert list(entries) == ["encoder.layer.0.intermediate.intermediate_act_fn"]
    assert model.config.hidden_act == "gelu"
    fresh = tiny_bert()
    apply_activations(fresh, entries)
    assert torch.equal(out(fresh), out(model))
    assert recorded(fresh) == entries


@pytest.mark.parametrize(("use", "sparsity"), [("relu", None), ("cats", 0.5), ("teal", 0.5)])
def test_saved_and_opened_in_another_process_the_model_is_the_same(use, sparsity, tmp_path):
    model = tiny_llama()
    keys, dense = list(model.state_dict()), out(model)
    entries = done(model, use, sparsity)
    assert list(model.state_dict()) == keys
    expected = out(model)
    assert not torch.equal(expected, dense)
    arm(model, SparseHooksConfig(activations=entries))
    model.save_pretrained(tmp_path / "one")
    torch.save((batches(1, seed=9)[0], expected), tmp_path / "expected.pt")
    code = f"""
import sparsehooks, sys, torch
from transformers import AutoModelForCausalLM
batch, expected = torch.load({str(tmp_path / "expected.pt")!r})
for source in ("one", "two"):
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + source).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], expected), source
    model.save_pretrained({str(tmp_path / "two")!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_more_sparsity_makes_more_error_and_more_zeros():
    reference, errors = out(tiny_llama()), []
    for sparsity in (0.2, 0.5, 0.8):
        model = tiny_llama()
        done(model, "teal", sparsity)
        errors.append(float((out(model) - reference).norm()))
    assert errors == sorted(errors)
    model = tiny_llama()
    acts, planned = begun(model, "cats", 0.8)
    acts.calibrate(Batches(model, batches()))
    amounts = []
    for share in (0.0, 0.25, 0.5, 1.0):
        acts.advance(planned, share)
        amounts.append([site.amount or 0.0 for site in acts._runs[0].sites.values()])
    assert all(list(column) == sorted(set(column)) for column in zip(*amounts, strict=True))


def test_without_calibration_the_first_training_batches_count():
    model = tiny_llama().train()
    acts, planned = begun(model, "teal", 0.5, batches=2)
    reference = tiny_llama().train()
    acts.advance(planned, 1.0)
    data = batches(4)
    for index, batch in enumerate(data):
        assert torch.equal(model(**batch)[0], reference(**batch)[0]) == (index < 2)
    assert not model._forward_pre_hooks
    loss = model(**data[0], labels=data[0]["input_ids"]).loss
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    state = acts.state_dict()
    other = tiny_llama()
    again = Activations([(planned, TEAL(Options(batches=2)), find(other, ("Linear",), ("lm_head",))[0])], other)
    again.load_state_dict(state)
    assert torch.equal(out(other), out(model))
    again.load_state_dict({})  # of a checkpoint before the stage began
    assert torch.equal(out(other), out(tiny_llama()))
    again.load_state_dict(state)
    assert again.finish() == acts.finish()


def test_the_gradient_passes_where_a_value_stays():
    values = torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0], requires_grad=True)
    sparse = TEAL().apply(values, 0.5)
    sparse.sum().backward()
    assert sparse.tolist() == [-2, 0, 0, 0, 1]
    assert values.grad.tolist() == [1, 0, 0, 0, 1]


def test_abort_undoes_everything():
    model = tiny_llama()
    before, classes = out(model), [type(module) for module in model.modules()]
    for use, sparsity in (("teal", 0.5), ("cats", 0.5), ("relu", None)):
        acts, planned = begun(model, use, sparsity)
        acts.advance(planned, 0.5)
        acts.abort()
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(out(model), before)
    entries = done(model, "teal", 0.5)
    sparse = out(model)
    acts, planned = begun(model, "teal", 0.9)
    acts.abort()
    assert recorded(model) == entries
    assert torch.equal(out(model), sparse)


def test_values_that_are_not_finite_are_refused():
    model = tiny_llama()
    acts, _ = begun(model, "teal", 0.5)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SessionError, match=r"model\.layers\.1\.mlp\.down_proj"):
        acts.calibrate(Batches(model, batches()))
    acts, _ = begun(tiny_llama(), "teal", 0.5)
    with pytest.raises(SessionError, match="nothing has passed"):
        acts.finish()


@pytest.mark.parametrize("first", ["activation", "weight"])
def test_effective_weights_and_sparse_inputs_come_and_go_in_any_order(first):
    layer = nn.Sequential(nn.Linear(8, 8))
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    (target,) = find(layer, ("Linear",), ())[0]
    planned = stage("teal", 0.5)
    acts = Activations([(planned, TEAL(), [target])], layer)

    def weight():
        swapping.swap(layer, target, "mask", lambda matrix, training: matrix * 2)

    for begin in (acts.start, lambda _: weight()) if first == "activation" else (lambda _: weight(), acts.start):
        begin(planned)
    acts.calibrate(Batches(layer, [values]))
    acts.advance(planned, 1.0)
    sparse = TEAL().apply(values, acts._runs[0].sites["0"].amount)
    linear = layer[0]
    assert torch.equal(layer(values), nn.functional.linear(sparse, linear.weight * 2, linear.bias))
    swapping.unswap(layer, target)
    assert torch.equal(layer(values), nn.functional.linear(sparse, linear.weight, linear.bias))
    weight()
    acts.abort()
    assert torch.equal(layer(values), nn.functional.linear(values, linear.weight * 2, linear.bias))
    swapping.unswap(layer, target)
    assert type(linear) is nn.Linear


def test_a_copy_computes_the_same():
    model = tiny_llama()
    done(model, "cats", 0.5)
    assert torch.equal(out(copy.deepcopy(model)), out(model))


def test_problems_are_told_before_the_run():
    model = tiny_bert()
    planned = stage("teal")
    planned.targets = find(model, ("Linear",), ())[0]
    assert "'sparsity' is missing" in problems(planned, TEAL(), model)[0]
    planned.targets = find(model, ("*.query",), ())[0]
    planned.stage = ActivationStage(sparsity=0.5)
    found = problems(planned, ReLU(), model)
    assert "has no threshold" in found[0]
    assert "finds nothing" in found[1]


def test_damaged_entries_are_refused():
    assert check({"a": {"use": "teal", "amount": 0.5}}) is None
    for entries in ([], {"a": 1}, {"a": {"use": "teal"}}, {"a": {"use": "teal", "amount": -1}}):
        assert check(entries)
        with pytest.raises(ArtifactError, match="activations"):
            SparseHooksConfig(activations=entries or [1])
    for entries in (
        {"nowhere": {"use": "teal", "amount": 0.5}},
        {"pooler": {"use": "none", "amount": 0.5}},
        {"pooler.dense": {"use": "teal", "amount": 0.5, "typo": 1}},
    ):
        with pytest.raises(ValueError, match=r"nowhere|none|typo"):
            apply_activations(tiny_bert(), entries)


def test_it_compiles_in_one_graph():
    model = tiny_llama()
    done(model, "teal", 0.5)
    compiled = torch.compile(model.model.layers[0].mlp, backend="eager", fullgraph=True)
    values = torch.randn(2, 3, 64)
    assert torch.equal(compiled(values), model.model.layers[0].mlp(values))


def test_compress_finds_thresholds_on_calibration_batches(tmp_path):
    model = tiny_llama().eval()
    batch = {"input_ids": torch.arange(48).reshape(4, 12)}
    recipe = {"stage": [{"activation": "teal", "sparsity": 0.5, "targets": ["*_proj"]}]}
    with pytest.raises(sparsehooks.PlanError, match="needs calibration batches"):
        sparsehooks.compress(tiny_llama(), recipe)
    sparsehooks.compress(model, recipe, out=tmp_path / "model", calibration=[batch])
    rows = sparsehooks.activation_sparsity(model, [batch], targets=["*_proj"])
    assert [row["zeros"] for row in rows[:3]] == [0.5] * 3  # of deeper layers the inputs change with what lies before
    assert [row["zeros"] for row in rows] == pytest.approx([0.5] * len(rows), abs=0.05)
    opened = type(model).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(opened(**batch)[0], model(**batch)[0])
