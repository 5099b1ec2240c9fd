"""Quantizing by calibration batches: GPTQ against its definition, scales that change nothing, real models."""

import copy
import itertools

import pytest
import torch
from helpers import tiny_bert, tiny_llama
from transformers import AutoModel

from sparsehooks import BalanceProblem, LayerProblem, PlanError, SessionError, Steps, compress, read_grid
from sparsehooks.balancing import balances
from sparsehooks.batches import Batches, measuring
from sparsehooks.builtin.quantizers.uniform import Options, Uniform
from sparsehooks.builtin.solvers.gptq import GPTQ, Options as GPTQOptions
from sparsehooks.builtin.solvers.scaling import AWQ, AWQOptions, SmoothQuant, SmoothQuantOptions
from sparsehooks.collecting import Collector
from sparsehooks.components import Need
from sparsehooks.sequential import in_order
from sparsehooks.targets import find


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 60, (4, 12), generator=generator)} for _ in range(count)]


def problem(rows=6, columns=32, tokens=200):
    inputs = (
        normal(tokens, columns)
        * torch.logspace(-1, 1, columns)[torch.randperm(columns)]
        @ (torch.eye(columns) + 0.3 * normal(columns, columns, seed=1))
    )
    return LayerProblem("w", normal(rows, columns, seed=2), inputs.t() @ inputs / tokens)


def grid_of(weight, options):
    quantizer = Uniform(options)
    grid = quantizer.grid(weight)

    def project(values, columns):
        part = quantizer.columns(grid, columns.start, columns.stop)
        return quantizer.dequantize(quantizer.quantize(values, part), part, torch.float32)

    return project


def all_of(mask):
    return lambda start, stop, *_: mask[:, start:stop]


def by_definition(layer, mask, project, order, damping=0.01):
    """Frantar et al. 2022, equations 2 and 3: the inverse is updated after each column; float64."""
    weight, gram = layer.weight.double().clone(), layer.gram.double()
    gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    left = list(order)
    while left:
        column, inverse = left[0], torch.linalg.inv(gram[left][:, left])
        fixed = project(weight[:, [column]].float() * mask[:, [column]], slice(column, column + 1)).double()
        error = (weight[:, [column]] - fixed) / inverse[0, 0]
        weight[:, left] -= error * inverse[0]
        weight[:, [column]] = fixed
        left = left[1:]
    return weight.float()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("order", ["given", "activation"])
def test_gptq_is_what_its_definition_gives(order, sparse):
    layer = problem()
    project = grid_of(layer.weight, Options(4, per="group", group=8))
    mask = normal(6, 32, seed=5) > 0 if sparse else torch.ones(6, 32, dtype=torch.bool)
    solved, kept = GPTQ(GPTQOptions(order=order)).solve(layer, all_of(mask), project)
    places = layer.gram.diagonal().argsort(descending=True, stable=True).tolist() if order != "given" else range(32)
    expected = by_definition(layer, mask, project, places)
    assert torch.equal(kept, mask)
    assert not solved[~mask].any()
    # a value on the edge of two codes may fall to either, and moves what follows
    assert (solved == expected).double().mean() > 0.99
    assert torch.equal(project(solved, slice(0, 32)), solved), "every group lies on the grid of the weight as it was"


def loss(moved, gram):
    return ((moved @ gram) * moved).sum(dim=1)


@pytest.mark.parametrize("solver", ["gptq", "awq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_no_row_is_worse_than_by_rounding_to_the_nearest(make, bits, solver, monkeypatch):
    from sparsehooks.rounding import Rounding

    seen, solve = [], Rounding._solve

    def watch(self, target, evidence):
        weight = target.matrix(self._run.weight(target).detach()).clone()
        nearest = grid_of(weight, Options(bits, per="group", group=8))(weight, slice(0, weight.shape[1]))
        solve(self, target, evidence)
        found = target.matrix(self._run.weight(target).detach())
        seen.append((loss(nearest - weight, evidence["gram"]), loss(found - weight, evidence["gram"])))

    monkeypatch.setattr(Rounding, "_solve", watch)
    stage = {"quantize": {"use": f"int{bits}", "per": "group", "group": 8}, "solver": solver}
    compress(make(), {"stage": [stage]}, calibration=batches())
    assert len(seen) > 10
    assert all(bool((ours <= theirs * (1 + 1e-6)).all()) for theirs, ours in seen)
    if solver == "gptq":
        assert all(ours.sum() < theirs.sum() for theirs, ours in seen)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_gptq_moves_the_outputs_less(make):
    model = make().eval()
    with torch.no_grad():
        before = [model(**batch)[0] for batch in batches()]
    found = {}
    for solver in (None, "gptq"):
        small = copy.deepcopy(model)
        stage = {"quantize": {"use": "int3", "per": "group", "group": 8}}
        stage |= {"solver": solver} if solver else {}
        compress(small, {"stage": [stage]}, calibration=batches() if solver else None)
        with torch.no_grad():
            found[solver] = sum(
                float((small(**b)[0] - old).square().sum()) for b, old in zip(batches(), before, strict=True)
            )
    assert found["gptq"] < 0.7 * found[None]


def test_sparse_and_coarse_together(tmp_path):
    model = tiny_bert().eval()
    recipe = {
        "stage": [
            {"prune": "sparsegpt", "solver": "sparsegpt", "sparsity": 0.5, "exclude": ["*pooler*"]},
            {"quantize": "int4", "solver": "gptq", "exclude": ["*pooler*"]},
        ]
    }
    compress(model, recipe, tmp_path / "joint", calibration=batches())
    for target in find(model, ["Linear"], ["*pooler*"])[0]:
        weight = model.get_parameter(target.parameter).detach()
        assert int((weight == 0).sum()) >= weight.numel() // 2
        assert read_grid(weight, Steps(4)) is not None
    opened = AutoModel.from_pretrained(tmp_path / "joint").eval()
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), model.parameters(), strict=True))


def test_doing_both_at_once_loses_less_than_one_after_the_other():
    layer = problem(rows=32, columns=64, tokens=500)
    from sparsehooks.builtin.solvers.sparsegpt import SparseGPT

    def choose(start, stop, weights, inverse):
        score = weights.square() / inverse
        return score > score.flatten().kthvalue(score.numel() // 2).values

    project = grid_of(layer.weight, Options(3))
    joint, _ = SparseGPT().solve(layer, choose, project)
    pruned, mask = SparseGPT().solve(layer, choose)
    later = project(pruned, slice(0, 64)) * mask
    assert loss(joint - layer.weight, layer.gram).sum() < loss(later - layer.weight, layer.gram).sum()


@pytest.mark.parametrize("solver", ["gptq", "awq", "smoothquant"])
def test_a_sparse_weight_stays_sparse(solver):
    model = tiny_llama()
    pruned = {"prune": "magnitude", "sparsity": 0.5, "exclude": ["lm_head"]}
    recipe = {"stage": [pruned, {"quantize": "int4", "solver": solver, "exclude": ["lm_head"]}]}
    compress(model, recipe, calibration=batches())
    apart = tiny_llama()
    compress(apart, {"stage": recipe["stage"][:1]})
    compress(apart, {"stage": recipe["stage"][1:]}, calibration=batches())
    for target in find(model, ["Linear"], ["lm_head"])[0]:
        for weight in (model.get_parameter(target.parameter), apart.get_parameter(target.parameter)):
            assert int((weight == 0).sum()) >= weight.numel() // 2


# ---------------------------------------------------------------------------------------------------------- scales


def found_balances(model, exclude=()):
    groups = []
    targets, _ = find(model, ["Linear"], exclude)
    names = {id(module): name for name, module in model.named_modules()}

    def visit(mine, evidence, rerun):
        if rerun is None:
            return
        for balance in balances(model, mine, evidence, rerun):
            groups.append((names[id(balance.producer)], sorted(t.modules[0] for t in balance.targets)))

    with measuring(model), torch.no_grad():
        in_order(Batches(model, batches()), targets, visit, {Need.GRAM, Need.INPUT_RANGE})
    return groups


def test_what_feeds_what_is_found_by_trying():
    layer = "model.layers.0"
    found = [group for group in found_balances(tiny_llama(), ["lm_head"]) if group[0].startswith(layer)]
    attention, feed_forward = f"{layer}.self_attn", f"{layer}.mlp"
    expected = {
        f"{layer}.input_layernorm": [f"{attention}.{name}_proj" for name in "kqv"],
        f"{layer}.post_attention_layernorm": [f"{feed_forward}.{name}_proj" for name in ("gate", "up")],
        f"{feed_forward}.up_proj": [f"{feed_forward}.down_proj"],
    }
    assert dict(found) == expected, "grouped queries: a value head feeds several heads, so it cannot be scaled alone"
    # after a norm the residual reads too; a GELU is not linear: only the values can be scaled
    for producer, readers in found_balances(tiny_bert(), ["*pooler*"]):
        assert producer.endswith("self.value")
        assert [reader.endswith("attention.output.dense") for reader in readers] == [True]


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_scales_leave_the_model_as_it_is(make, monkeypatch):
    from sparsehooks.rounding import Rounding

    monkeypatch.setattr(Rounding, "_solve", lambda self, target, evidence: None)
    from sparsehooks.quantizing import QuantizeRun

    model = make().eval()
    targets, _ = find(model, ["Linear"], ["lm_head", "*pooler*"])
    before = {target.parameter: model.get_parameter(target.parameter).detach().clone() for target in targets}
    with torch.no_grad():
        outputs = model(**batches(1)[0])[0]
    write = QuantizeRun.write
    monkeypatch.setattr(QuantizeRun, "write", lambda self, weights: write_without_projecting(self, weights, write))
    stage = {"quantize": "int8", "solver": "smoothquant", "exclude": ["lm_head", "*pooler*"]}
    compress(model, {"stage": [stage]}, calibration=batches())
    changed = [name for name, weight in before.items() if not torch.equal(model.get_parameter(name), weight)]
    assert changed
    with torch.no_grad():
        torch.testing.assert_close(model(**batches(1)[0])[0], outputs, rtol=1e-5, atol=1e-5)


def write_without_projecting(run, weights, write):
    run._quantizer.quantize = lambda matrix, grid: matrix
    run._quantizer.dequantize = lambda codes, grid, dtype: codes
    write(run, weights)


def shared(columns=16):
    weights = {"a": normal(8, columns), "b": normal(4, columns, seed=1)}
    inputs = normal(300, columns, seed=2) * torch.logspace(-1, 1, columns)
    gram, size = inputs.t() @ inputs / 300, inputs.abs()
    quantizer = Uniform(Options(3))
    return BalanceProblem(weights, gram, size.mean(0), size.amax(0), quantizer.fake_quantize)


def test_smoothquant_is_equation_4():
    found, given = SmoothQuant(SmoothQuantOptions(0.7)).balance(shared()), shared()
    tops = torch.maximum(given.weights["a"].abs().amax(0), given.weights["b"].abs().amax(0))
    torch.testing.assert_close(found, given.input_peak**0.7 / tops**0.3)


def test_awq_takes_the_best_of_its_exponents():
    given = shared()

    def lost(factors):
        moved = [given.quantize(weight * factors) / factors - weight for weight in given.weights.values()]
        return sum(float(((part @ given.gram) * part).sum()) for part in moved)

    tried = [given.input_mean ** (step / 20) for step in range(20)]
    tried = [factors / (factors.max() * factors.min()).sqrt() for factors in tried]
    best = min(lost(factors) for factors in tried)
    assert lost(AWQ().balance(given)) == best < lost(torch.ones(16))
    assert torch.equal(AWQ(AWQOptions(1)).balance(given), torch.ones(16))


def smoothed(model, *more):
    stage = {"quantize": "int8", "solver": "smoothquant", "exclude": ["lm_head"]}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if "norm" in name}
    compress(model, {"stage": [stage, *more]}, calibration=batches())
    return sum(not torch.equal(model.get_parameter(name), weight) for name, weight in before.items())


def test_grids_of_inputs_do_not_hide_what_can_be_scaled():
    grids = {"activation": "int8", "exclude": ["lm_head"]}, {"activation": "static_int8", "exclude": ["lm_head"]}
    assert smoothed(tiny_llama()) == smoothed(tiny_llama(), grids[0]) == smoothed(tiny_llama(), grids[1]) == 4
    model = tiny_llama()
    compress(model, "smoothquant", calibration=batches())
    assert model.model.layers[0].mlp.up_proj._sparsehooks_site.amount == 1


def test_grids_that_were_fitted_once_follow_the_scales():
    from sparsehooks.sites import recorded

    model = tiny_llama().eval()
    stages = [{"quantize": "int8", "solver": "smoothquant"}, {"activation": "static_int8"}]
    compress(model, {"stage": [{**stage, "exclude": ["lm_head"]} for stage in stages]}, calibration=batches())
    inputs = {}
    names = recorded(model)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, n=name: inputs.setdefault(n, []).append(args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for hook in hooks:
        hook.remove()
    for name, entry in names.items():  # the first layer sees exactly what was fitted; later ones what rounding moved
        peak = float(torch.cat([part.flatten() for part in inputs[name]]).abs().max())
        assert entry["amount"] == pytest.approx(peak, rel=1e-6 if "layers.0.self_attn.q" in name else 0.1)


def test_what_other_blocks_share_stays():
    model = tiny_llama()
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    before = model.model.layers[0].input_layernorm.weight.detach().clone()
    assert smoothed(model) > 0
    assert torch.equal(model.model.layers[0].input_layernorm.weight, before)


def test_what_was_solved_for_already_is_not_scaled():
    model = tiny_llama()
    recipe = {
        "stage": [
            {"prune": "sparsegpt", "solver": "sparsegpt", "sparsity": 0.5, "targets": ["*up_proj"]},
            {"quantize": "int4", "solver": "awq", "exclude": ["lm_head"]},
        ]
    }
    compress(model, recipe, calibration=batches())
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight.detach()
        assert read_grid(weight, Steps(4)) is not None
        assert int((weight == 0).sum()) >= weight.numel() // 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trying_leaves_no_trace(dtype):
    model = tiny_llama().to(dtype)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        producers = [producer for producer, _ in found_balances(model, ["lm_head"])]
    assert len(producers) == len(found_balances(tiny_llama(), ["lm_head"]))
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_a_solver_that_scales_nothing_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="'awq' found no input that it can scale, and only rounded to the nearest"):
        compress(model, {"stage": [{"quantize": "int4", "solver": "awq"}]}, calibration=[normal(4, 8)])


def test_a_solver_for_the_other_kind_of_stage_is_refused():
    for stage, said in (
        ({"quantize": "int4", "solver": "least_squares"}, "'least_squares' does nothing here; it serves prune"),
        ({"prune": "magnitude", "sparsity": 0.5, "solver": "awq"}, "'awq' does nothing here; it serves quantize"),
    ):
        with pytest.raises(PlanError, match=said):
            compress(tiny_bert(), {"stage": [stage]}, calibration=batches())


def test_a_group_that_does_not_fit_what_has_shrunk_is_said():
    recipe = {
        "stage": [
            {"prune": "magnitude", "pattern": "channel", "sparsity": 0.3, "targets": ["*intermediate.dense"]},
            {"shrink": True},
            {"quantize": {"use": "int4", "per": "group", "group": 16}, "solver": "gptq", "exclude": ["*pooler*"]},
        ]
    }
    with pytest.raises(SessionError, match=r"output\.dense\.weight' has shrunk, and its .* do not divide"):
        compress(tiny_bert(), recipe, calibration=batches())
    del recipe["stage"][2]["solver"]
    model = tiny_bert()
    compress(model, recipe)
    assert model.encoder.layer[0].output.dense.weight.shape[1] % 16


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            {"quantize": {"use": "int4", "per": "group", "group": 7}},
            "64 input features do not divide by the group of 7",
        ),
        ({"quantize": "int9"}, "'bits' = 9 is outside 2 to 8"),
        ({"quantize": {"use": "int", "bits": 9}}, "'bits' = 9 is outside 2 to 8"),
        ({"quantize": "int4", "solver": "gptq"}, "needs calibration batches"),
        ({"quantize": "int4", "solver": {"use": "gptq", "order": "up"}}, "expected one of"),
        ({"quantize": "int4", "solver": {"use": "gptq", "damping": float("nan")}}, "'damping' = nan"),
        ({"quantize": "int4", "solver": {"use": "awq", "steps": 0}}, "'steps' = 0"),
        ({"quantize": "int4", "solver": {"use": "smoothquant", "alpha": 1.5}}, "'alpha' = 1.5 is outside [0, 1]"),
    ],
)
def test_bad_recipes_are_said_before_anything_happens(stage, said):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError) as caught:
        compress(model, {"stage": [stage]})
    assert said in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_a_solver_is_not_for_training():
    from sparsehooks import Plan, PluginManager, Recipe

    recipe = Recipe.from_dict({"stage": [{"quantize": "int4", "solver": "gptq"}]})
    with pytest.raises(PlanError, match=r"solver: 'gptq' repairs without training; use sparsehooks\.compress"):
        Plan.build(recipe, PluginManager(autoload=False), tiny_bert(), 10)


def test_data_that_is_nothing_but_padding_is_said():
    stage = {"quantize": "int4", "solver": "gptq", "exclude": ["*pooler*"]}
    padding = [{**batch, "attention_mask": torch.zeros(4, 12, dtype=torch.long)} for batch in batches()]
    with pytest.raises(SessionError, match="nothing but padding"):
        compress(tiny_bert(), {"stage": [stage]}, calibration=padding)
    with pytest.raises(PlanError, match="there is no batch in it"):
        compress(tiny_bert(), {"stage": [stage]}, calibration=[])


def test_weights_that_are_not_finite_are_said():
    for bad, solver in itertools.product((float("nan"), float("inf")), (None, "gptq")):
        model = tiny_bert()
        with torch.no_grad():
            model.encoder.layer[1].output.dense.weight[0, 0] = bad
        stage = {"quantize": "int4", "exclude": ["*pooler*"], **({"solver": solver} if solver else {})}
        with pytest.raises(SessionError, match=r"layer\.1\.output\.dense.*not finite|not finite.*layer\.1"):
            compress(model, {"stage": [stage]}, calibration=batches() if solver else None)


def test_constant_weights_are_kept():
    model = tiny_bert()
    dense = model.encoder.layer[0].output.dense
    with torch.no_grad():
        dense.weight.fill_(0.25)
        model.encoder.layer[1].output.dense.weight.zero_()
    stage = {"quantize": "int4", "solver": "gptq", "exclude": ["*pooler*"]}
    compress(model, {"stage": [stage]}, calibration=batches())
    torch.testing.assert_close(dense.weight, torch.full_like(dense.weight, 0.25), rtol=2**-16, atol=0)
    assert not model.encoder.layer[1].output.dense.weight.any()


def test_a_model_of_another_library_is_refused():
    model = tiny_bert()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(PlanError, match="already quantized by 'bitsandbytes'; start from the one it was made of"):
        compress(model, {"stage": [{"quantize": "int8"}]})


def test_what_enters_is_measured_once_for_layers_that_share_it():
    model = tiny_bert()
    targets, _ = find(model, ["Linear"], ["*pooler*"])
    runs, collector = Batches(model, batches()), Collector(model, targets, {Need.INPUT_RANGE})
    seen = []
    handle = model.encoder.layer[0].attention.self.query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with measuring(model), torch.no_grad(), collector.hooked():
        for index in range(len(runs)):
            collector.batch(runs.padding(index))
            runs.forward(index)
    handle.remove()
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen]).abs()
    found = [collector.evidence(target) for target in targets[:3]]
    assert len({part["input_peak"].data_ptr() for part in found}) == 1
    torch.testing.assert_close(found[0]["input_peak"], rows.amax(0))
    torch.testing.assert_close(found[0]["input_mean"], rows.mean(0))
