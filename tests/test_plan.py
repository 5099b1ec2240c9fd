"""Plans: every problem at once, before anything is touched."""

import pytest
import torch
from helpers import copied, same_state, tiny_bert, tiny_llama
from torch import nn

from sparsehooks import Component, PlanError, PluginManager, PruneStage, Recipe, hookimpl
from sparsehooks.builtin.allocations.uniform import Uniform
from sparsehooks.plan import Plan


def build(stages, model=None, total_steps=None, plugins=(), **head):
    recipe = Recipe.from_dict({"stage": stages, **head})
    return Plan.build(recipe, PluginManager(plugins, autoload=False), model, total_steps)


def problems(*args, **options):
    with pytest.raises(PlanError) as caught:
        build(*args, **options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def prune(**options):
    return {"prune": "magnitude", "sparsity": 0.5, **options}


def two_layers():
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))


class Objects:
    @hookimpl
    def check_plan(self, plan):
        return [f"{stage.label}: not on a Monday" for stage in plan.stages]


# -------------------------------------------------------------------------------------------------------- together


def test_five_mistakes_are_five_problems(tmp_path):
    stages = [
        prune(prune="magnitud"),
        prune(targets=["Liner"]),
        prune(pattern={"use": "block", "hight": 2}),
        prune(targets=["0"], schedule={"use": "cubic", "start": 50, "end": 200}),
        {"distill": "kl", "teacher": str(tmp_path)},
    ]
    assert problems(stages, two_layers(), 100) == [
        "recipe.stage[0].prune: no plugin offers the criterion 'magnitud'; did you mean 'magnitude'?",
        "recipe.stage[1].targets: target 'Liner' matches no module; did you mean 'Linear'?",
        "recipe.stage[2].pattern: unknown key 'hight'; did you mean 'height'?",
        f"recipe.stage[4].teacher: '{tmp_path}' is no model folder: it has no config.json",
        "recipe.stage[0] and recipe.stage[2] both prune '0.weight' and 1 more; exclude it from one of them",
        "recipe.stage[0] and recipe.stage[3] both prune '0.weight'; exclude it from one of them",
        "recipe.stage[3].schedule: acts until step 200, but the run has 100 steps",
    ]


def test_all_mistakes_of_one_stage_are_reported():
    stage = prune(
        prune="magnitud",
        pattern="block",
        allocation="global_",
        schedule={"use": "cubic", "every": 0},
        targets=["Liner"],
    )
    found = problems([stage], two_layers(), 100, requires=["not-there-at-all"])
    assert [problem.split(":")[0] for problem in found] == [
        "recipe.requires",
        "recipe.stage[0].prune",
        "recipe.stage[0].allocation",
        "recipe.stage[0].schedule",
        "recipe.stage[0].targets",
    ]


@pytest.mark.parametrize(
    ("stage", "unknown", "who"),
    [
        (prune(prune="movement"), [], "'movement' brings weights back by itself"),
        (prune(schedule="feedback", pattern="bloc"), ["pattern"], "'feedback' brings weights back by itself"),
        (
            prune(prune="movment", pattern="2:4", schedule="cubik"),
            ["prune", "schedule"],
            "the pattern '2:4' fixes what stays",
        ),
    ],
)
def test_what_must_not_grow_is_reported_beside_all_else(stage, unknown, who):
    quantize, *others, grow = problems([{"quantize": "int9x"}, {**stage, "grow": "random"}])
    assert quantize.startswith("recipe.stage[0].quantize: no plugin offers")
    assert [problem.split(":")[0] for problem in others] == [f"recipe.stage[1].{key}" for key in unknown]
    assert grow == f"recipe.stage[1].grow: {who}; leave 'grow' out"


def test_without_a_model_the_names_and_options_are_checked():
    plan = build([prune(targets=["Liner"]), {"quantize": "int8"}, {"distill": "kl"}])
    assert [(stage.label, stage.targets) for stage in plan.stages] == [
        ("stage[0] prune magnitude", ()),
        ("stage[1] quantize int8", ()),
        ("stage[2] distill kl", ()),
    ]
    assert problems([prune(prune="magnitud")]) == [
        "recipe.stage[0].prune: no plugin offers the criterion 'magnitud'; did you mean 'magnitude'?"
    ]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (prune(pattern="4:2"), ".pattern: the pattern 4:2 must keep at least one weight of a group and drop one"),
        (prune(pattern={"use": "2:4", "n": 1}), ".pattern: '2:4' says 'n' already"),
        (prune(pattern={"use": "block", "width": 0}), ".pattern: a block of 1 x 0 is empty"),
        (prune(pattern={"use": "block", "width": 2.0}), ".pattern.width: expected a whole number, got 2.0"),
        (prune(schedule={"use": "cubic", "end": 1}), ".schedule: 'end' = 1 is the first optimizer step; write 1.0"),
        (prune(schedule={"use": "cubic", "end": 1.5}), ".schedule: 'end' = 1.5 is not a fraction of the run"),
        (prune(schedule={"use": "cubic", "start": -1}), ".schedule: 'start' = -1 is before the first step"),
        (prune(schedule={"use": "cubic", "start": True}), ".schedule.start: expected a number or a whole number"),
        (prune(schedule={"use": "cubic", "every": 2.0}), ".schedule.every: expected a whole number, got 2.0"),
        (prune(schedule={"use": "oneshot", "end": 0.5}), ".schedule: unknown key 'end'"),
        (
            prune(schedule={"use": "cubic", "start": 0.5, "end": 0.5}),
            ".schedule: the schedule ends ('end' = 0.5) before it starts ('start' = 0.5)",
        ),
        ({"distill": {"use": "kl", "temperature": 0}}, ".distill: 'temperature' = 0.0 is not a positive number"),
        (
            {"distill": {"use": "kl", "temperature": float("inf")}},
            ".distill: 'temperature' = inf is not a positive number",
        ),
        (
            {"distill": {"use": "hidden", "layers": "first"}},
            ".distill: 'layers' = 'first' is none of 'all', 'last', 'uniform', nor pairs [[student, teacher], ...]",
        ),
        ({"quantize": {"use": "int8", "bits": 4}}, ".quantize: 'int8' says 'bits' already"),
        ({"quantize": {"use": "int8", "grup": 4}}, ".quantize: unknown key 'grup'"),
    ],
)
def test_options_are_checked_with_their_path(stage, message):
    (problem,) = problems([stage])
    assert problem.startswith(f"recipe.stage[0]{message}")


# ----------------------------------------------------------------------------------------------------------- shapes


def test_a_shape_that_does_not_divide_is_reported():
    assert problems([{"prune": "magnitude", "pattern": "2:4"}], two_layers()) == [
        "recipe.stage[0].pattern: '2:4' does not fit '1.weight': its 6 input features do not divide by 4; exclude it"
    ]
    assert build([{"prune": "magnitude", "pattern": "2:4", "exclude": ["1"]}], two_layers())


def test_shapes_that_misfit_for_one_reason_are_one_problem():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(10, 8))
    assert problems([{"prune": "magnitude", "pattern": "2:4"}], model) == [
        f"recipe.stage[0].pattern: '2:4' does not fit {which} input features do not divide by 4; exclude it"
        for which in ("'0.weight' and 1 more: its 6", "'2.weight': its 10")
    ]


def test_a_missing_sparsity_is_reported_unless_the_pattern_fixes_it():
    assert problems([{"prune": "magnitude"}], two_layers()) == ["recipe.stage[0]: 'sparsity' is missing, such as 0.8"]
    assert build([{"prune": "magnitude", "pattern": "1:2"}], two_layers())
    assert build([prune(pattern="1:2", sparsity=0.5)], two_layers())


def test_a_sparsity_other_than_the_one_that_the_pattern_fixes_is_reported():
    assert problems([prune(pattern="1:4", targets=["0"])], two_layers()) == [
        "recipe.stage[0]: the pattern '1:4' fixes the sparsity at 0.75, not 0.5; leave 'sparsity' out"
    ]


@pytest.mark.parametrize(("sparsity", "emptied"), [(0.8, False), (0.84, True), (0.95, True)])
def test_a_layer_that_uniform_would_empty_is_reported(sparsity, emptied):
    """Three rows: round(3 * 0.84) = 3 of them go, round(3 * 0.8) = 2."""
    stage = prune(sparsity=sparsity, pattern="row")
    model = nn.Sequential(nn.Linear(8, 60), nn.Linear(60, 3))
    if not emptied:
        assert build([stage], model)
        return
    assert problems([stage], model) == [
        f"recipe.stage[0].sparsity: at {sparsity} nothing of '1.weight' would be left; lower it or exclude the layer"
    ]
    assert build([prune(sparsity=sparsity, pattern="row", exclude=["1"])], model)


def test_what_an_allocation_can_only_tell_from_scores_is_left_to_the_update():
    stage = prune(sparsity=0.95, pattern="row", allocation="global")
    assert build([stage], nn.Sequential(nn.Linear(8, 60), nn.Linear(60, 3)))
    assert build([stage], two_layers())  # it keeps a row of each
    (problem,) = problems([{**stage, "allocation": "uniform"}], two_layers())
    assert problem.startswith("recipe.stage[0].sparsity: at 0.95 nothing of '0.weight' and 1 more would be left")


def test_a_pattern_that_keeps_some_of_every_unit_empties_nothing():
    assert build([{"prune": "magnitude", "pattern": "1:8", "targets": ["0"]}], two_layers())


# --------------------------------------------------------------------------------------------------------- overlaps


def test_two_stages_that_claim_one_weight_are_reported_once_with_the_number_of_weights():
    stages = [prune(), prune(targets=["1"]), {"quantize": "int8"}, {"quantize": "int8", "exclude": ["0"]}]
    assert problems(stages, two_layers()) == [
        "recipe.stage[0] and recipe.stage[1] both prune '1.weight'; exclude it from one of them",
        "recipe.stage[2] and recipe.stage[3] both quantize '1.weight'; exclude it from one of them",
    ]


def test_one_weight_may_be_pruned_and_quantized():
    plan = build([prune(), {"quantize": "int8"}], two_layers())
    assert [[target.parameter for target in stage.targets] for stage in plan.stages] == [["0.weight", "1.weight"]] * 2


def test_a_tied_weight_is_one_weight():
    model = tiny_llama(tied=True)
    both = {"targets": ["lm_head", "model.embed_tokens"]}
    assert problems([prune(**both), prune(**both)], model) == [
        "recipe.stage[0] and recipe.stage[1] both prune 'model.embed_tokens.weight'; exclude it from one of them"
    ]


def test_what_was_left_out_is_noted():
    (stage,) = build([prune(exclude=["lm_head"], targets=["Linear", "Embedding"])], tiny_llama(tied=True)).stages
    assert stage.notes == ("'model.embed_tokens.weight' is left out: it is tied to lm_head, which is not a target",)


def test_a_layer_that_cannot_be_quantized_is_reported():
    class Doubled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.Bilinear(2, 3, 4))
    known = "Linear, Embedding, Conv1d, Conv2d, Conv1D"
    assert problems([{"quantize": "int8", "targets": ["*"]}], model) == [
        "recipe.stage[0]: '1' is a Doubled with a forward of its own; exclude it",
        f"recipe.stage[0]: '2' is a Bilinear, only weights of {known} can be replaced; exclude it",
    ]


# --------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"use": "linear", "start": 10, "end": 101}, "acts until step 101, but the run has 100 steps"),
        ({"use": "oneshot", "start": 101}, "acts until step 101, but the run has 100 steps"),
        ({"use": "linear", "start": 60, "end": 0.5}, "ends at step 50 before it starts at step 60"),
        ({"use": "linear", "start": 0.5, "end": 50}, "ends at step 50 before it starts at step 50"),
        ({"use": "linear", "start": 0.501, "end": 0.502}, "ends at step 50 before it starts at step 50"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_reported(schedule, message):
    stages = [prune(schedule=schedule)]
    assert problems(stages, two_layers(), 100) == [f"recipe.stage[0].schedule: {message}"]
    assert build(stages, two_layers()), "without the number of steps nobody can know"


@pytest.mark.parametrize(
    "schedule", [{"use": "linear", "start": 10, "end": 100}, {"use": "oneshot", "start": 1.0}, {"use": "linear"}]
)
def test_a_schedule_may_end_with_the_run(schedule):
    assert build([prune(schedule=schedule)], two_layers(), 100)


# ------------------------------------------------------------------------------------------------- teachers and more


def test_a_teacher_that_cannot_be_had_is_reported(tmp_path):
    def about(teacher):
        return problems([{"distill": "kl", "teacher": teacher}], two_layers())

    assert about(str(tmp_path)) == [f"recipe.stage[0].teacher: '{tmp_path}' is no model folder: it has no config.json"]
    for missing in ("org/not-a-model", str(tmp_path / "missing")):
        (problem,) = about(missing)
        assert problem.startswith(f"recipe.stage[0].teacher: '{missing}' is neither 'self', nor a folder, nor a model")


def test_a_teacher_may_be_the_model_itself_or_a_folder(tmp_path):
    tiny_bert().config.save_pretrained(tmp_path)
    assert build([{"distill": "kl"}, {"distill": "kl", "teacher": str(tmp_path)}], two_layers())


def test_missing_requirements_are_reported():
    assert problems([prune()], requires=["not-there-at-all>=1", "sparsehooks>=999"])[0] == (
        "recipe.requires: 'not-there-at-all' is not installed; run pip install 'not-there-at-all>=1'"
    )
    assert build([prune()], requires=["sparsehooks>=0.1"])


def test_plugins_object_together_with_each_other():
    assert (
        problems([prune(), {"quantize": "int8"}], two_layers(), plugins=[Objects(), Objects()])
        == [
            "stage[0] prune magnitude: not on a Monday",
            "stage[1] quantize int8: not on a Monday",
        ]
        * 2
    )


def test_plugins_see_only_plans_that_are_sound():
    seen = []

    class Watches:
        @hookimpl
        def check_plan(self, plan):
            seen.append(plan)

    problems([prune(targets=["Liner"])], two_layers(), plugins=[Watches()])
    assert seen == []
    plan = build([prune()], two_layers(), 10, plugins=[Watches()])
    assert seen == [plan]
    assert plan.total_steps == 10


def test_a_plan_leaves_the_model_as_it_is():
    model = tiny_llama(tied=True)
    before, classes = copied(model), [type(module) for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    keys = [sorted(module.__dict__) for module in model.modules()]
    stages = [prune(sparsity=0.9, exclude=["lm_head"]), {"quantize": "int8", "exclude": ["lm_head"]}, {"distill": "kl"}]
    for plugins in ([], [Objects()]):
        try:
            build(stages, model, 10, plugins=plugins)
        except PlanError:
            assert plugins
        assert same_state(model, before)
        assert [type(module) for module in model.modules()] == classes
        assert [parameter.requires_grad for parameter in model.parameters()] == grads
        assert [sorted(module.__dict__) for module in model.modules()] == keys


def test_components_get_their_decoded_options():
    stage = prune(pattern={"use": "4:8"}, schedule={"use": "cubic", "start": 0, "every": 5}, targets=["0"])
    (planned,) = build([stage], two_layers(), 100).stages
    assert planned.path == "recipe.stage[0]"
    assert {key: bound.record.component.name for key, bound in planned.components.items()} == {
        "prune": "magnitude",
        "pattern": "n:m",
        "allocation": "uniform",
        "schedule": "cubic",
    }
    pattern, schedule = planned.components["pattern"], planned.components["schedule"]
    assert (pattern.config.n, pattern.config.m) == (4, 8)
    assert (schedule.config.start, schedule.config.end, schedule.config.every) == (0, 1.0, 5)
    assert pattern.create() is not pattern.create()


def test_a_conflict_is_a_problem_where_the_recipe_needs_the_name():
    class Offers:
        @hookimpl
        def register_components(self, registry):
            registry.add(Component("allocation", "global", Uniform, ""))

    assert build([prune()], plugins=[Offers()])
    (problem,) = problems([prune(allocation="global")], plugins=[Offers()])
    assert problem.startswith("recipe.stage[0].allocation: the allocation 'global' is offered by 'allocations'")


def test_an_error_inside_a_pattern_names_its_plugin():
    from sparsehooks.builtin.patterns.unstructured import Unstructured

    class Failing(Unstructured):
        def check(self, shape):
            raise ZeroDivisionError("no tiles")

    class Offers:
        @hookimpl
        def register_components(self, registry):
            registry.add(Component("pattern", "failing", Failing, ""))

    with pytest.raises(ZeroDivisionError) as caught:
        build([prune(pattern="failing")], two_layers(), plugins=[Offers()])
    assert "plugin 'Offers' (python) in pattern 'failing'" in caught.value.__notes__[0]


def test_a_plan_of_python_objects_is_the_same_plan():
    recipe = Recipe((PruneStage(sparsity=0.5),))
    plan = Plan.build(recipe, PluginManager(autoload=False), two_layers(), 10)
    assert plan.stages[0].targets == build([prune()], two_layers(), 10).stages[0].targets
    assert torch.is_grad_enabled()


def test_a_layer_that_training_never_calls_is_not_quantized():
    model = torch.nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(PlanError, match=r"'self_attn.out_proj' is never called"):
        Plan.build(Recipe.from_dict({"stage": [{"quantize": "int8"}]}), PluginManager(), model)


# ---------------------------------------------------------------------------------------------------- quantization

LATE = {"use": "oneshot", "start": 0.5}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"quantize": "int8", "freeze": 100}], ".freeze: is step 100, but the run has 20 steps"),
        (
            [{"quantize": "lsq", "freeze": 10, "schedule": LATE}],
            ".freeze: is step 10, and 'lsq' begins at step 10; name a later one",
        ),
        ([{"quantize": "int8", "freeze": 4, "schedule": LATE}], ".freeze: is step 4, and 'int8' begins at step 10"),
        ([{"quantize": "int8", "schedule": "cubic"}], ".schedule: 'cubic' is gradual, and a grid begins at once"),
        (
            [{"quantize": "kmeans"}, {"prune": "movement", "sparsity": 0.5, "schedule": {"use": "cubic"}}],
            ".schedule: from step 0 on 'kmeans' trains its values alone, and recipe.stage[1] follows the weights until",
        ),
        (
            [
                {"quantize": "kmeans", "schedule": LATE},
                {
                    "prune": "magnitude",
                    "sparsity": 0.5,
                    "grow": "gradient",
                    "schedule": {"use": "constant", "end": 0.75},
                },
            ],
            ".schedule: from step 10 on 'kmeans' trains its values alone",
        ),
    ],
)
def test_grids_that_cannot_be_are_said(stages, said):
    with pytest.raises(PlanError) as caught:
        Plan.build(Recipe.from_dict({"stage": stages}), PluginManager(autoload=False), two_layers(), 20)
    (problem,) = caught.value.problems
    assert problem.startswith(f"recipe.stage[0]{said}")


def test_grids_may_begin_where_pruning_has_ended():
    stages = [
        {"quantize": "kmeans", "schedule": LATE},
        {"prune": "movement", "sparsity": 0.5, "schedule": {"use": "cubic", "end": 0.5}},
    ]
    Plan.build(Recipe.from_dict({"stage": stages}), PluginManager(autoload=False), two_layers(), 20)
