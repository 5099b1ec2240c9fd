"""Every hook, heard in real runs; the first test sees to it that none is forgotten."""

from __future__ import annotations

import pytest
from helpers import arguments, labelled, prune, tiny_classifier
from transformers import Trainer

import sparsehooks
from sparsehooks import CompressionCallback, PluginManager, Recipe, hookimpl
from sparsehooks.hookspecs import HOOKS

PRUNE = prune(schedule={"use": "cubic", "end": 9, "every": 1})
RECIPE = {
    "stage": [*PRUNE["stage"], {"distill": "kl"}, {"quantize": "int8", "schedule": {"use": "oneshot", "start": 9}}]
}


class Recorder:
    """Hears everything, in order."""

    def __init__(self):
        self.heard = []

    def of(self, hook):
        return [rest for name, *rest in self.heard if name == hook]

    @hookimpl
    def register_components(self, registry):
        self.heard.append(("register_components", registry))

    @hookimpl
    def load_recipe(self, path):
        self.heard.append(("load_recipe", path))

    @hookimpl
    def check_plan(self, plan):
        self.heard.append(("check_plan", plan))

    @hookimpl
    def session_started(self, session):
        self.heard.append(("session_started", session.step, session.total_steps, session.sparsity))

    @hookimpl
    def stage_changed(self, session, stage, status):
        self.heard.append(("stage_changed", session.step, stage, status))

    @hookimpl
    def masks_updated(self, session, stage, step, changes):
        self.heard.append(
            ("masks_updated", stage, step, dict(changes), {n: m.clone() for n, m in session.masks.items()})
        )

    @hookimpl
    def step_finished(self, session, step):
        self.heard.append(("step_finished", step, session.rank))

    @hookimpl
    def metrics_reported(self, session, metrics):
        self.heard.append(("metrics_reported", session.step, dict(metrics)))

    @hookimpl
    def artifact_metadata(self, session):
        self.heard.append(("artifact_metadata", session.sparsity))
        return {"seen": "yes"}

    @hookimpl
    def session_finished(self, session, error):
        self.heard.append(("session_finished", session.step, error))


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    heard = Recorder()
    trainer = Trainer(
        model=tiny_classifier(),
        args=arguments(folder, eval_strategy="steps", eval_steps=6),
        train_dataset=labelled(),
        eval_dataset=labelled(8),
    )
    trainer.add_callback(CompressionCallback(RECIPE, plugins=[heard]))
    trainer.train()
    return heard


def test_every_hook_has_a_test():
    assert {name.removeprefix("test_hook_") for name in globals() if name.startswith("test_hook_")} == set(HOOKS)


def test_hooks_are_called_in_the_order_of_the_specification(recorder):
    first = [
        name for index, (name, *_) in enumerate(recorder.heard) if name not in [n for n, *_ in recorder.heard[:index]]
    ]
    assert first == [name for name in HOOKS if name in first]


def test_hook_register_components(recorder):
    assert len(recorder.of("register_components")) == 1


def test_hook_load_recipe(tmp_path):
    class Lines:
        @hookimpl
        def load_recipe(self, path):
            if path.suffix == ".lines":
                return {"stage": [dict(line.split("=") for line in path.read_text().splitlines())]}
            return None

    (tmp_path / "recipe.lines").write_text("quantize=int8")
    assert Recipe.load(tmp_path / "recipe.lines", plugins=[Lines()]).stages[0].action == "quantize"
    with pytest.raises(sparsehooks.RecipeError, match="nor a format that a plugin reads"):
        Recipe.load(tmp_path / "recipe.lines")


def test_hook_check_plan(tmp_path, recorder):
    assert [plan.total_steps for (plan,) in recorder.of("check_plan")] == [12]

    class Strict:
        @hookimpl
        def check_plan(self, plan):
            return [f"{stage.label} is not allowed here" for stage in plan.stages if stage.stage.action == "prune"]

    model = tiny_classifier()
    with pytest.raises(sparsehooks.PlanError, match=r"stage\[0\] prune magnitude is not allowed here"):
        sparsehooks.compress(model, prune(), plugins=[Strict()])


def test_hook_session_started(recorder):
    assert recorder.of("session_started") == [[0, 12, 0.0]]


def test_hook_stage_changed(recorder):
    pruning, kl, int8 = "stage[0] prune magnitude", "stage[1] distill kl", "stage[2] quantize int8"
    assert recorder.of("stage_changed") == [
        [0, pruning, "started"],
        [0, kl, "started"],
        [9, pruning, "finished"],
        [9, int8, "started"],
        [9, int8, "finished"],
        [12, kl, "finished"],
    ]
    heard = Recorder()
    callback = CompressionCallback(prune(schedule={"use": "oneshot", "start": 10}), plugins=[heard])
    session = sparsehooks.Session.of(callback.recipe, callback.manager, tiny_classifier(), total_steps=12)
    session.start(tiny_classifier())
    with pytest.warns(UserWarning, match="never began"):
        session.finish()
    assert heard.of("stage_changed") == [[0, pruning, "skipped"]]


def test_hook_masks_updated(recorder):
    updates = recorder.of("masks_updated")
    assert [step for _, step, _, _ in updates] == list(range(1, 10))
    before = {}
    for _, _, changes, masks in updates:
        assert changes.keys() == masks.keys()
        for name, mask in masks.items():
            change, old = changes[name], before.get(name, mask.new_ones(mask.shape))
            assert change.kept == int(mask.sum())
            assert change.pruned == int((old & ~mask).sum())
            assert change.grown == int((~old & mask).sum()) == 0
            assert change.total == mask.numel()
        before = masks


def test_hook_step_finished(recorder):
    assert recorder.of("step_finished") == [[step, 0] for step in range(1, 13)]
    assert PluginManager().step_finished().__name__ == "_nothing"


def test_hook_metrics_reported(recorder):
    assert [step for step, _ in recorder.of("metrics_reported")] == [6, 12]
    assert all("eval_loss" in metrics for _, metrics in recorder.of("metrics_reported"))


def test_hook_artifact_metadata(recorder):
    assert len(recorder.of("artifact_metadata")) == 1


def test_hook_session_finished(tmp_path, recorder):
    assert recorder.of("session_finished") == [[12, None]]
    heard = Recorder()

    class Broken(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise MemoryError("out of memory")
            return super().training_step(*args, **kwargs)

    trainer = Broken(model=tiny_classifier(), args=arguments(tmp_path), train_dataset=labelled())
    sparsehooks.attach_trainer(trainer, RECIPE, plugins=[heard])
    with pytest.raises(MemoryError) as raised:
        trainer.train()
    assert heard.of("session_finished") == [[3, raised.value]]
    assert not trainer.model._forward_hooks


def test_observers_change_nothing(tmp_path):
    from helpers import same_state

    def run(plugins):
        trainer = Trainer(model=tiny_classifier(), args=arguments(tmp_path), train_dataset=labelled())
        trainer.add_callback(CompressionCallback(RECIPE, plugins=plugins))
        trainer.train()
        return trainer.model

    assert same_state(run([]), run([Recorder()]))
