"""Pruning in training: growth, learned masks, feedback, rewinding, overrides, regularizers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import tiny_bert, tiny_classifier
from torch import nn

import sparsehooks
from sparsehooks import Plan, PlanError, PluginManager, Recipe, SessionError
from sparsehooks.recipe import named_recipes
from sparsehooks.session import Session


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))


def data(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 12, generator=generator), torch.randint(0, 5, (64,), generator=generator)


def recipe(**stage):
    return {"stage": [{"prune": "magnitude", **stage}]}


def train(model, given, steps=20, optimizer=torch.optim.SGD, each=None, plugins=(), **options):
    optimizer = optimizer(model.parameters(), **{"lr": 0.1, **options})
    inputs, labels = data()
    with sparsehooks.attach(model, optimizer, given, total_steps=steps, plugins=plugins) as session:
        for step in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            if each is not None:
                each(session, model, optimizer, "before", step)
            optimizer.step()
            if each is not None:
                each(session, model, optimizer, "after", step)
    return session


CONSTANT = {"use": "constant", "start": 0.0, "end": 0.8, "every": 4}


@pytest.mark.parametrize("grow", ["random", "gradient", "momentum"])
@pytest.mark.parametrize("allocation", ["uniform", "erk", "global"])
def test_dynamic_sparse_training_keeps_the_number_of_weights(grow, allocation):
    counts, seen = set(), []

    def each(session, model, optimizer, when, step):
        masks = session.masks.masks
        if when == "after" and masks:
            each_layer = tuple(int(mask.sum()) for mask in masks.values())
            counts.add(sum(each_layer) if allocation == "global" else each_layer)
            seen.append({name: mask.clone() for name, mask in masks.items()})
            for name, mask in masks.items():
                assert not model.get_parameter(name)[~mask].any()

    train(
        net(),
        recipe(sparsity=0.75, allocation=allocation, schedule=CONSTANT, grow={"use": grow}),
        each=each,
        momentum=0.9,
    )
    assert len(counts) == 1
    assert any(not torch.equal(seen[0][name], seen[-1][name]) for name in seen[0])


def test_rigl_equals_its_algorithm():
    """Drop the smallest, grow the largest gradients among the rest; new weights and their momentum begin at zero."""
    checked = []
    before = {}

    def each(session, model, optimizer, when, step):
        weight = model[0].weight
        if when == "before":
            before.update(
                mask=session.masks.masks.get("0.weight", torch.ones(24, 12, dtype=torch.bool)).clone(),
                weight=weight.detach().clone(),
                gradient=weight.grad.clone(),
            )
            return
        if step + 1 not in (4, 8, 12):
            return
        mask, kept = before["mask"], int(before["mask"].sum())
        gone = int(0.3 / 2 * (1 + math.cos(math.pi * (step + 1) / 16)) * kept)
        drop = before["weight"].abs().masked_fill(~mask, -1.0).flatten()
        stays = torch.zeros(24 * 12, dtype=torch.bool)
        stays[drop.argsort(descending=True)[: kept - gone]] = True
        grow = before["gradient"].abs().flatten().masked_fill(stays, -1.0)
        stays[grow.argsort(descending=True)[:gone]] = True
        expected = stays.reshape(24, 12)
        assert torch.equal(session.masks.masks["0.weight"], expected)
        new = expected & ~mask
        assert new.any()
        slot = optimizer.state[weight]["momentum_buffer"]
        assert torch.equal(slot[new], before["gradient"][new])  # as after a first step
        checked.append(step)

    train(
        net(),
        recipe(sparsity=0.5, targets=["0"], schedule=CONSTANT, grow={"use": "gradient", "fraction": 0.3}),
        each=each,
        momentum=0.9,
    )
    assert checked == [3, 7, 11]


def test_a_resumed_dynamic_run_ends_with_the_same_bits():
    given = recipe(sparsity=0.75, allocation="erk", schedule=CONSTANT, grow={"use": "random"})
    whole = net()
    train(whole, given, momentum=0.9)
    saved = {}

    def each(session, model, optimizer, when, step):
        if when == "after" and step == 9:
            saved.update(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))

    train(net(), given, each=each, momentum=0.9)
    model = net(seed=5)
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(saved["optimizer"])
    inputs, labels = data()
    with sparsehooks.attach(model, optimizer, given, total_steps=20):
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name


@pytest.mark.parametrize("criterion", ["movement", "soft_movement", "sr_ste", "l0"])
def test_masks_in_the_forward_leave_no_trace_and_end_exactly(criterion):
    model = net()
    pattern = {"pattern": "2:4"} if criterion == "sr_ste" else {"sparsity": 0.75}
    targets = ["0"] if criterion == "sr_ste" else ["Linear"]
    keys, cls = list(model.state_dict()), type(model[0])
    outputs = []
    inputs, _ = data()

    def each(session, model, optimizer, when, step):
        if when == "after" and step == 19:
            outputs.append(model.eval()(inputs).detach())
            model.train()
            hidden = ~session.masks.masks["0.weight"]
            assert model[0].weight[hidden].any()  # alive behind the mask

    session = train(model, recipe(prune=criterion, targets=targets, schedule=CONSTANT, **pattern), each=each)
    assert list(model.state_dict()) == keys
    assert type(model[0]) is cls
    assert torch.equal(model(inputs), outputs[0])
    for name, mask in session.masks.masks.items():
        size = mask.numel()
        assert int(mask.sum()) == size - round(size * (0.5 if criterion == "sr_ste" else 0.75))
        assert not model.get_parameter(name)[~mask].any()


def test_movement_moves_its_scores_by_gradient_times_weight():
    before = {}

    def each(session, model, optimizer, when, step):
        scores = session._learned.of("0.0.weight")["scores"]
        if when == "before" and step == 5:
            before.update(weight=model[0].weight.detach().clone(), gradient=scores.grad.clone())
        if when == "before" and step == 5:
            mask = session.masks.masks["0.weight"]
            dense = model[0].weight.grad
            assert torch.equal(dense[~mask], torch.zeros_like(dense[~mask]))
            kept = (before["gradient"] - dense * before["weight"])[mask]
            torch.testing.assert_close(kept, torch.zeros_like(kept))
            assert before["gradient"][~mask].any()

    train(net(), recipe(prune="movement", sparsity=0.5, targets=["0"], schedule=CONSTANT), each=each)


def test_snip_decides_before_the_first_step():
    model = net()
    inputs, labels = data()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    score = torch.cat([(w * w.grad).abs().flatten() for w in (model[0].weight, model[2].weight)])
    model.zero_grad()
    keep = torch.zeros_like(score, dtype=torch.bool)
    keep[score.argsort(descending=True)[: score.numel() - round(0.9 * score.numel())]] = True
    session = train(model, recipe(prune="taylor", sparsity=0.9, allocation="global"), steps=1)
    found = torch.cat([mask.flatten() for mask in session.masks.masks.values()])
    assert torch.equal(found, keep)


def test_feedback_steps_back_and_returns_what_it_took():
    states = []
    metric = {"value": 1.0}

    def each(session, model, optimizer, when, step):
        if when == "after":
            states.append((session.sparsity, model[0].weight.detach().clone(), dict(session.masks.masks)))
            session.metrics({"accuracy": metric["value"]})
            metric["value"] = 0.2 if step == 3 else 1.0

    given = recipe(
        sparsity=0.8,
        schedule={"use": "feedback", "metric": "accuracy", "drop": 0.1, "raise_by": 0.25, "start": 0.0, "end": 1.0},
    )
    train(net(), given, steps=8, each=each, lr=0.0)
    sparsities = [round(state[0], 2) for state in states]
    assert sparsities[:5] == sorted(sparsities[:5])
    assert sparsities[5] < sparsities[4]  # the metric fell after the fourth: the last raise is undone
    assert sparsities[5] == sparsities[3]
    assert torch.equal(states[5][1], states[3][1])
    assert sparsities[-1] > sparsities[5]


FEEDBACK = {"use": "feedback", "metric": "accuracy", "drop": 0.1, "raise_by": 0.25}


def test_feedback_names_the_metrics_that_exist():
    def each(session, model, optimizer, when, step):
        session.metrics({"loss": 1.0})

    with pytest.warns(UserWarning, match="pruned nothing: .* follows 'accuracy', and the evaluation gives loss"):
        train(net(), recipe(sparsity=0.8, schedule=FEEDBACK), each=each)


def test_feedback_passes_over_the_evaluations_of_other_sets():
    def each(session, model, optimizer, when, step):
        session.metrics({"eval_b_accuracy": 0.0})
        session.metrics({"accuracy": 1.0})

    assert train(net(), recipe(sparsity=0.8, schedule=FEEDBACK), each=each).sparsity > 0.7


def test_feedback_compares_with_the_first_evaluation_of_its_window():
    def each(session, model, optimizer, when, step):
        session.metrics({"accuracy": 1.0 if session.step < 10 else 0.5})

    assert train(net(), recipe(sparsity=0.8, schedule={**FEEDBACK, "start": 10}), each=each).sparsity > 0.7


def test_two_feedback_stages_do_as_each_of_them_alone():
    stages = [
        {"prune": "magnitude", "targets": [target], "sparsity": 0.8, "schedule": {**FEEDBACK, "metric": metric}}
        for target, metric in (("0", "a"), ("2", "b"))
    ]

    def seen(*chosen):
        found = []

        def each(session, model, optimizer, when, step):
            if when == "after":
                found.append(copy.deepcopy((dict(session.masks.masks), model.state_dict())))
                session.metrics({"a": float(step not in (2, 9)), "b": float(step not in (3, 7))})
                state = copy.deepcopy(session.state_dict())
                session.load_state_dict(state)
                assert session.state_dict()["undo"].keys() == state["undo"].keys()

        train(net(), {"stage": list(chosen)}, each=each, lr=0.0)
        return found

    for together, first, second in zip(seen(*stages), seen(stages[0]), seen(stages[1]), strict=True):
        for name, (masks, weights) in (("0.weight", first), ("2.weight", second)):
            assert torch.equal(together[1][name], weights[name])
            if name in masks:
                assert torch.equal(together[0][name], masks[name])


def test_a_step_back_leaves_weights_alone_that_live_behind_their_mask():
    model, shares = net(), []
    before = model[0].weight.detach().clone()

    def each(session, model, optimizer, when, step):
        if when == "after":
            shares.append(session.sparsity)
            if step == 5:
                model[0].weight.data.mul_(2)
            session.metrics({"accuracy": 0.2 if step == 5 else 1.0})
            if step == 6:
                assert torch.equal(model[0].weight, 2 * before)

    schedule = {**FEEDBACK, "end": 7}
    train(model, recipe(prune="sr_ste", sparsity=0.8, targets=["0"], schedule=schedule), each=each, lr=0.0)
    assert shares[6] < shares[5]


@pytest.mark.parametrize(
    ("criterion", "start", "rewind"),
    [("magnitude", 0.0, 0), ("magnitude", 0.0, 2), ("magnitude", 0.4, 1), ("taylor", 0.0, 2), ("taylor", 0.4, 0)],
)
def test_the_lottery_returns_to_earlier_weights(criterion, start, rewind):
    model, kept = net(), {}
    schedule = {"use": "iterative", "start": start, "end": 20, "rounds": 4, "rate": 0.5, "rewind": rewind}
    densities, rewound = [], []

    def each(session, model, optimizer, when, step):
        if when == "before" and step == rewind:
            kept["weight"] = model[0].weight.detach().clone()
        if when == "after":
            mask = session.masks.masks.get("0.weight")
            density = 1.0 if mask is None else float(mask.float().mean())
            if densities and density < densities[-1] and step < 19:
                assert torch.equal(model[0].weight, kept["weight"] * mask)
                assert not optimizer.state
                rewound.append(step)
            densities.append(density)

    session = train(model, recipe(prune=criterion, sparsity=0.9375, schedule=schedule), each=each, momentum=0.9)
    assert len(rewound) == 3
    assert sorted(set(densities), reverse=True) == [1.0, 0.5, 0.25, 0.125, 0.0625]
    assert session.sparsity == pytest.approx(0.9375, abs=0.005)


def test_overrides_leave_the_budget():
    given = recipe(sparsity=0.8, allocation="uniform", overrides={"2": 0.5})
    session = train(net(), given, steps=2)
    assert float((~session.masks.masks["2.weight"]).float().mean()) == 0.5
    assert int((~session.masks.masks["0.weight"]).sum()) == round(0.8 * 288)


def test_a_layer_that_its_override_empties_is_named():
    said = r"recipe.stage\[0\].overrides: at 0.999 nothing of '2.weight' would be left; lower it or exclude the layer"
    for targets in (["2"], ["Linear"]):
        with pytest.raises(PlanError, match=said):
            train(net(), recipe(sparsity=0.8, targets=targets, overrides={"2": 0.999}), steps=2)


def test_an_override_that_matches_nothing_is_named():
    plan = recipe(sparsity=0.8, overrides={"nowhere": 0.5})
    with pytest.raises(PlanError, match=r"overrides: 'nowhere' matches no target"):
        Plan.build(Recipe.from_dict(plan), PluginManager(), net(), 10)


def test_nan_gradients_stop_the_run_and_name_the_layer():
    def each(session, model, optimizer, when, step):
        if when == "before" and step == 3:
            model[0].weight.grad[0, 0] = float("nan")

    given = recipe(sparsity=0.75, schedule=CONSTANT, grow={"use": "gradient"})
    with pytest.raises(SessionError, match=r"1 of 288 gradients of '0.weight' are not finite"):
        train(net(), given, each=each)


def test_proximal_l1_is_soft_thresholding_under_adam():
    before = {}

    def each(session, model, optimizer, when, step):
        if step != 3:
            return
        if when == "before":
            before["model"], before["optimizer"] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            before["gradients"] = [p.grad.clone() for p in model.parameters()]
            return
        twin = net()
        twin.load_state_dict(before["model"])
        other = torch.optim.Adam(twin.parameters(), lr=0.01)
        state = before["optimizer"]
        state["param_groups"][0].pop("sparsehooks", None)
        other.load_state_dict(state)
        for parameter, gradient in zip(twin.parameters(), before["gradients"], strict=True):
            parameter.grad = gradient
        other.step()
        slots = other.state[twin[0].weight]
        step_size = 0.01 / ((slots["exp_avg_sq"] / (1 - 0.999 ** float(slots["step"]))).sqrt() + 1e-8)
        moved = twin[0].weight.detach()
        expected = moved.sign() * (moved.abs() - step_size * 0.003).clamp(min=0)
        torch.testing.assert_close(model[0].weight, expected, rtol=1e-5, atol=1e-7)
        before["checked"] = True

    given = {"stage": [{"regularize": {"use": "l1", "strength": 0.003}, "targets": ["0"]}]}
    train(net(), given, optimizer=torch.optim.Adam, lr=0.01, each=each)
    assert before["checked"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"prune": "wanda", "sparsity": 0.5}, "'wanda' needs calibration batches; use sparsehooks.compress"),
        ({"prune": "magnitude", "sparsity": 0.5, "solver": "sparsegpt"}, "repairs without training"),
        ({"prune": "magnitude", "pattern": "2:4", "grow": "random"}, "fixes what stays; leave 'grow' out"),
        ({"regularize": "group_lasso", "pattern": "2:4"}, "has no groups that vanish together"),
        ({"prune": "movement", "sparsity": 0.5, "grow": "random"}, "brings weights back by itself"),
        ({"prune": "magnitude", "sparsity": 0.5, "grow": "obs"}, "grow: 'obs' collects gradients"),
        ({"prune": "magnitude", "pattern": "2:4", "overrides": {"*query": 0.9}}, "'2:4' takes at most 0.5"),
        (
            {"prune": "magnitude", "pattern": "head", "sparsity": 0.5, "overrides": {"*.0.*": 0.0}},
            "overrides: the pattern 'head' takes slices of several layers, which have one sparsity",
        ),
        ({"regularize": "l1", "schedule": FEEDBACK}, "'feedback' follows what pruning does to a metric"),
        ({"activation": "relu", "schedule": FEEDBACK}, "'feedback' follows what pruning does to a metric"),
        ({"prune": "obs", "sparsity": 0.5, "schedule": FEEDBACK}, "and 'obs' collects 64 gradients"),
        (
            {"prune": "magnitude", "sparsity": 0.5, "schedule": {"use": "iterative", "rounds": 4}},
            "reaches the sparsity 0.5904 in 4 rounds at 'rate' = 0.2, not 0.5; use rate = 0.1591",
        ),
        (
            {"prune": "magnitude", "sparsity": 0.6723, "schedule": {"use": "iterative", "end": 8, "rewind": 2}},
            "'rewind' is step 2, and the first round ends at step 2; name an earlier step",
        ),
        (
            {"prune": "magnitude", "sparsity": 0.8, "schedule": {"use": "iterative", "every": 2}},
            "'every' = 2 has no effect",
        ),
        ({"prune": "magnitude", "sparsity": 0.8, "schedule": {**FEEDBACK, "every": 2}}, "'every' = 2 has no effect"),
    ],
)
def test_what_cannot_be_combined_is_said_before_the_run(stage, message):
    with pytest.raises(PlanError, match=message):
        Plan.build(Recipe.from_dict({"stage": [stage]}), PluginManager(), tiny_bert(), 10)


@pytest.mark.parametrize("name", named_recipes())
def test_named_recipes_fit_a_model(name):
    plan = Plan.build(Recipe.load(name), PluginManager(), tiny_classifier())
    assert plan.stages[0].targets
    assert Recipe.from_dict(plan.recipe.to_dict()) == plan.recipe


def test_a_recipe_name_that_is_not_there_suggests_another():
    with pytest.raises(sparsehooks.RecipeError, match="did you mean 'rigl'"):
        Recipe.load("rigll")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"prune": "movement", "sparsity": 0.5}, "learns which weights matter while the model trains"),
        (
            {"prune": "magnitude", "sparsity": 0.5, "schedule": {"use": "feedback", "metric": "x"}},
            "follows the evaluations of training",
        ),
    ],
)
def test_what_needs_training_is_refused_without_it(stage, message):
    with pytest.raises(PlanError, match=message):
        sparsehooks.compress(net(), {"stage": [stage]})


def test_weights_that_are_not_finite_are_not_finished():
    def each(session, model, optimizer, when, step):
        if when == "after" and step == 19:
            model[0].weight.data[0, 0] = float("nan")

    schedule = {"use": "oneshot", "start": 2}
    with pytest.raises(SessionError, match=r"1 of 288 weights of '0.weight' are not finite"):
        train(net(), recipe(sparsity=0.5, schedule=schedule), each=each)


def test_feedback_without_evaluations_says_that_nothing_was_pruned():
    schedule = {"use": "feedback", "metric": "accuracy"}
    with pytest.warns(UserWarning, match="pruned nothing: no evaluation has allowed it"):
        train(net(), recipe(sparsity=0.5, schedule=schedule))


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_what_grows_leaves_the_rows_even(grow):
    seen = set()

    def each(session, model, optimizer, when, step):
        if session.masks.masks:
            seen.update(session.masks.masks["0.weight"].sum(dim=1).tolist())

    pattern = {"use": "unstructured", "per": "row"}
    train(net(), recipe(sparsity=0.5, targets=["0"], pattern=pattern, schedule=CONSTANT, grow=grow), each=each)
    assert seen == {6}


def test_what_never_grows_is_said_at_the_start():
    schedules = [{"use": "constant", "every": 20}, {"use": "cubic", "start": 5, "every": 15}, {"use": "oneshot"}]
    for schedule in schedules:
        with pytest.warns(UserWarning, match=r"'grow' finds no update between the first at step \d+ and the end"):
            train(net(), recipe(sparsity=0.5, schedule=schedule, grow="random"))
    schedule = {"use": "constant", "every": 20}  # the last update is one
    train(net(), recipe(sparsity=0.5, schedule=schedule, grow={"use": "random", "schedule": "constant"}))


def test_an_earlier_state_takes_back_what_came_later():
    states = {}

    def each(session, model, optimizer, when, step):
        if when == "after":
            states[step] = copy.deepcopy(session.state_dict())
        if when == "after" and step == 15:
            assert states[15]["masks"]
            assert states[15]["pruning"][0]["snapshot"]
            session.load_state_dict(states[2])
            for key in ("masks", "pruning", "components", "alive"):
                assert session.state_dict()[key] == states[2][key] == type(states[2][key])(states[2][key])

    schedule = {"use": "iterative", "start": 8, "end": 20, "rounds": 2, "rate": 0.5, "rewind": 5}
    with pytest.warns(UserWarning, match="never began|did not reach"):
        train(net(), recipe(prune={"use": "obs", "samples": 3}, sparsity=0.75, schedule=schedule), each=each)


class Recorder:
    """Hears when a stage begins, acts and ends."""

    def __init__(self):
        self.heard = []

    @sparsehooks.hookimpl
    def stage_changed(self, session, stage, status):
        self.heard.append(status)

    @sparsehooks.hookimpl
    def masks_updated(self, session, stage, step, changes):
        self.heard.append(step)


def scaled(model, given, steps, overflows):
    """Train under a gradient scaler whose gradients overflow in some steps; what a plugin heard, and the session."""
    recorder = Recorder()
    manager, optimizer = PluginManager([recorder], autoload=False), torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session.of(Recipe.from_dict(given), manager, model, steps)
    session.start(model, optimizer)
    inputs, labels = data()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        if step in overflows:
            model[0].weight.grad[0, 0] = math.inf
        session.before_step(2.0)
        if step not in overflows:
            optimizer.step()
        session.after_step(skipped=step in overflows)
    session.finish()
    return recorder.heard, session


@pytest.mark.parametrize(
    ("start", "overflows", "heard"),
    [
        (0, [], ["started", 1, "finished"]),
        (0, [1, 2], ["started", 3, "finished"]),
        (3, [], ["started", 3, "finished"]),
        (3, [3], ["started", 4, "finished"]),
    ],
)
@pytest.mark.parametrize("criterion", ["snip", {"use": "obs", "samples": 3}])
def test_a_stage_ends_when_its_gradient_has_decided(criterion, start, overflows, heard):
    given = recipe(prune=criterion, sparsity=0.5, schedule={"use": "oneshot", "start": start})
    told, session = scaled(net(), given, 4, overflows)
    assert told == heard
    assert session.sparsity == 0.5


def test_gradients_that_overflow_in_the_last_step_are_told():
    given = recipe(prune="taylor", sparsity=0.5, schedule={"use": "oneshot", "start": 4})
    with (
        pytest.warns(UserWarning, match="did not reach its end"),
        pytest.warns(UserWarning, match="has not made its last update: the gradients that were to decide overflowed"),
    ):
        told, session = scaled(net(), given, 4, [4])
    assert told == ["started", "skipped"]
    assert session.sparsity == 0


def test_obs_collects_nothing_of_a_step_that_overflows():
    given = recipe(prune={"use": "obs", "samples": 4}, sparsity=0.5, schedule={"use": "oneshot", "start": 6})
    assert scaled(net(), given, 6, [4])[0] == ["started", 6, "finished"]


def test_biases_that_go_along_live_behind_their_mask_until_the_end():
    model, gone = net(), []

    def each(session, model, optimizer, when, step):
        masks = session.masks.masks
        if when == "after" and "0.bias" in masks:
            gone.append(int((~masks["0.bias"]).sum()))
            assert (model[0].bias != 0).all()
            assert session.state_dict()["alive"] == ["0.bias", "0.weight", "2.weight"]

    session = train(model, recipe(prune="movement", pattern="channel", sparsity=0.5, schedule=CONSTANT), each=each)
    assert gone[-1] == 12
    assert torch.equal(model[0].bias != 0, session.masks.masks["0.bias"])
