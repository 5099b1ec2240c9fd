"""Plugins: found in a fixed order, isolated from each other, and named in every failure."""

import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers import copied

import sparsehooks
from sparsehooks import Component, Criterion, PlanError, PluginError, PluginManager, Recipe, hookimpl
from sparsehooks.discovery import require
from sparsehooks.hookspecs import HOOKS
from sparsehooks.plan import Plan
from sparsehooks.plugins import BUILTINS

OFFERS = """
    import sparsehooks

    @sparsehooks.hookimpl
    def register_components(registry):
        registry.add(sparsehooks.Component("criterion", "{name}", "{module}:Score", "made up"))

    class Score(sparsehooks.Criterion):
        def score(self, view):
            return view.weight.abs()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution: a module, and metadata that importlib finds."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules = set(sys.modules)

    def add(distribution, source=None, *, entry=None, module=None, version="1.0"):
        module = module or distribution.replace("-", "_")
        source = OFFERS.format(name=distribution, module=module) if source is None else source
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[sparsehooks]\n{entry or distribution} = {module}\n")
        (info / "RECORD").write_text(f"{module}.py,,\n")
        return info

    yield add
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def names(manager, *, source=None):
    return [plugin.name for plugin in manager.plugins if source in (None, plugin.source)]


def found(manager, name):
    (plugin,) = [plugin for plugin in manager.plugins if plugin.name == name]
    return plugin


def module(source, name="local_plugin"):
    made = types.ModuleType(name)
    exec(textwrap.dedent(source), made.__dict__)
    return made


LISTENS = "import sparsehooks\n@sparsehooks.hookimpl\ndef step_finished(step): pass\n"


# ------------------------------------------------------------------------------------------------------ discovery


def test_what_implements_no_hook_is_no_plugin():
    manager = PluginManager(["json", object()])
    assert [plugin.name for plugin in manager.broken()] == ["json", "object"]
    assert all("implements no hook" in plugin.status for plugin in manager.broken())
    with pytest.warns(UserWarning, match="'json'.*implements no hook"):
        sparsehooks.CompressionCallback({"stage": [{"quantize": "int8"}]}, plugins=["json"])


def test_plugins_come_in_the_documented_order(install, tmp_path, monkeypatch):
    for distribution in ("zeta", "acme", "mid"):
        install(distribution)
    (tmp_path / "site-packages" / "from_environment.py").write_text(LISTENS)
    (tmp_path / "site-packages" / "from_name.py").write_text(LISTENS)
    (tmp_path / "from_file.py").write_text(LISTENS)
    monkeypatch.setenv("SPARSEHOOKS_PLUGINS", " from_environment , ")
    manager = PluginManager([Observer(), "from_name", tmp_path / "from_file.py", module(LISTENS, "from_python")])
    order = names(manager)
    assert order[: len(BUILTINS)] == list(BUILTINS)
    assert [name for name in order if name in ("acme", "mid", "zeta")] == ["acme", "mid", "zeta"]
    assert order[-5:] == ["from_environment", "from_name", "from_file", "Observer", "from_python"]
    sources = [plugin.source for plugin in manager.plugins]
    assert sources == sorted(sources, key=["builtin", "entry point", "environment", "command line", "python"].index), (
        "sources must not be mixed"
    )
    assert not manager.broken()


def test_entry_points_are_ordered_by_distribution_and_not_by_name(install):
    install("bbb", entry="aaa")
    install("aaa", entry="bbb")
    order = names(PluginManager(), source="entry point")
    assert [name for name in order if name in ("aaa", "bbb")] == ["bbb", "aaa"]


def test_a_distribution_is_listed_with_its_version_and_components(install):
    install("acme-score", entry="acme", version="1.2.3")
    plugin = found(PluginManager(), "acme")
    assert plugin.describe() == "'acme' (acme-score 1.2.3)"
    assert (plugin.source, plugin.status) == ("entry point", "ok")
    assert (plugin.hooks, plugin.components) == (["register_components"], ["criterion acme-score"])


def test_without_autoload_only_what_is_named_comes(install, monkeypatch):
    install("acme")
    install("zeta")
    assert names(PluginManager(autoload=False)) == list(BUILTINS)
    assert names(PluginManager(["zeta"], autoload=False)) == [*BUILTINS, "zeta"]
    assert found(PluginManager(["zeta"], autoload=False), "zeta").describe() == "'zeta' (zeta 1.0)"
    monkeypatch.setenv("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert names(PluginManager(["acme"])) == [*BUILTINS, "acme"]
    monkeypatch.setenv("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "0")
    assert {"acme", "zeta"} <= set(names(PluginManager()))


def test_a_plugin_that_is_asked_for_twice_is_there_once(install, tmp_path, monkeypatch):
    install("acme-score", entry="acme")
    monkeypatch.setenv("SPARSEHOOKS_PLUGINS", "acme")
    path, observer = tmp_path / "mine.py", Observer()
    path.write_text(LISTENS)
    manager = PluginManager(["acme", "acme_score", path, str(path), observer, observer, "toml"])
    assert [name for name in names(manager) if name in ("acme", "acme_score", "mine", "Observer", "toml")] == [
        "toml", "acme", "mine", "Observer",
    ]  # fmt: skip
    assert not manager.broken()


def test_a_broken_plugin_that_is_asked_for_twice_is_listed_once(install):
    install("acme", "import not_there")
    assert names(PluginManager(["acme"])).count("acme") == 1


@pytest.mark.parametrize("name", BUILTINS)
def test_a_builtin_plugin_can_be_switched_off(name):
    manager = PluginManager([f"no:{name}"], autoload=False)
    assert found(manager, name).status == "off"
    assert found(manager, name).components == []
    assert not [record for record in manager.catalog.records() if record.plugin.name == name]


def test_an_installed_plugin_can_be_switched_off_everywhere(install, monkeypatch):
    install("acme", "raise SystemExit('imported')")
    assert found(PluginManager(["no:acme"]), "acme").status == "off"
    monkeypatch.setenv("SPARSEHOOKS_PLUGINS", "no:acme")
    assert found(PluginManager(["acme"]), "acme").status == "off"


def test_switching_off_what_is_not_there_is_an_error():
    with pytest.raises(PluginError, match="-p no:critera: there is no plugin 'critera'; did you mean 'criteria'"):
        PluginManager(["no:critera"], autoload=False)


def test_a_file_is_imported_under_its_stem(tmp_path):
    path = tmp_path / "my_criterion.py"
    path.write_text(textwrap.dedent(OFFERS.format(name="mine", module="my_criterion")))
    manager = PluginManager([str(path)], autoload=False)
    record, _ = manager.catalog.resolve("criterion", "mine")
    assert record.load().__module__ == "my_criterion"
    del sys.modules["my_criterion"]


def test_a_file_that_would_hide_a_module_is_refused(tmp_path):
    path = tmp_path / "textwrap.py"
    path.write_text(LISTENS)
    plugin = found(PluginManager([path], autoload=False), "textwrap")
    assert plugin.error == f"PluginError: '{path}' would hide the module 'textwrap'; rename the file"
    assert sys.modules["textwrap"] is textwrap


def test_a_file_that_fails_leaves_no_module_behind(tmp_path):
    path = tmp_path / "half_done.py"
    path.write_text("1 / 0")
    assert found(PluginManager([path], autoload=False), "half_done").error == "ZeroDivisionError: division by zero"
    assert "half_done" not in sys.modules
    missing = tmp_path / "missing.py"
    assert "there is no file" in found(PluginManager([missing], autoload=False), "missing").error


def test_importing_the_builtin_plugins_leaves_torch_alone():
    code = """
        import sys
        from sparsehooks import PluginManager
        manager = PluginManager(autoload=False)
        assert not manager.broken() and manager.catalog.records()
        print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy"}))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------ isolation

HOOK = "import sparsehooks\n@sparsehooks.hookimpl\ndef {}: pass\n"

BROKEN = {
    "import not_there": "ModuleNotFoundError: No module named 'not_there'",
    "raise SystemExit(3)": "SystemExit: 3",
    "def oops(:": "SyntaxError: invalid syntax (broken.py, line 1)",
    HOOK.format("step_finish(session)"): "PluginError: there is no hook 'step_finish'; did you mean 'step_finished'?",
    HOOK.format("step_finished(session, stepp)"): (
        "PluginError: step_finished() has no argument 'stepp'; did you mean 'step'?"
    ),
    HOOK.format("step_finished(session, stepp=-1)"): (
        "PluginError: step_finished() has no argument 'stepp'; did you mean 'step'?"
    ),
    HOOK.format("step_finished(session, *, step)"): (
        "PluginError: step_finished(): 'step' must be a plain positional argument"
    ),
    HOOK.format("step_finished(**everything)"): "PluginError: step_finished() has no argument 'everything'",
    "import sparsehooks\n@sparsehooks.hookimpl\ndef check_plan(plan): yield 'no'\n": (
        "PluginError: check_plan() contains 'yield': hook wrappers are not supported"
    ),
    "import sparsehooks\n@sparsehooks.hookimpl(wrapper=True)\ndef check_plan(plan): return (yield)\n": (
        "PluginError: check_plan() contains 'yield': hook wrappers are not supported"
    ),
    "def session_started(session): pass\n": (
        "PluginError: session_started() is named like a hook but not marked with @sparsehooks.hookimpl"
    ),
    HOOK.format("register_components(registry)").replace("pass", "registry.ad()"): (
        "AttributeError: 'Registry' object has no attribute 'ad'"
    ),
    HOOK.format("register_components(registry)").replace(
        "pass", "registry.add(sparsehooks.Component('pruner', 'x', 'y:Z', ''))"
    ): "PluginError: component 'x': there is no kind 'pruner'",
    HOOK.format("register_components(registry)").replace(
        "pass", "registry.add(sparsehooks.Component('pattern', 'x', 'y:Z', '', shorthand='('))"
    ): "PluginError: component 'x': its shorthand is no regular expression",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_plugin_is_listed_with_its_error_and_stops_nothing(install, source):
    install("broken", source)
    install("healthy")
    manager = PluginManager()
    plugin = found(manager, "broken")
    assert plugin.status.startswith(BROKEN[source])
    assert "\n" not in plugin.status
    assert plugin.components == []
    assert manager.broken() == [plugin]
    assert found(manager, "healthy").status == "ok"
    assert manager.catalog.resolve("criterion", "healthy")[0].load()
    manager.session_started(None)
    manager.session_finished(None, None)


def test_a_class_instead_of_an_instance_is_listed_with_its_error():
    plugin = found(PluginManager([Observer], autoload=False), "Observer")
    assert plugin.error == "PluginError: Observer is a class; register an instance of it"


@pytest.mark.parametrize("decorator", [staticmethod, classmethod])
def test_a_marker_that_does_not_reach_the_function_is_noticed(decorator):
    plugin = type("Marked", (), {"session_started": hookimpl(decorator(lambda *session: None))})()
    assert "session_started() is named like a hook but not marked" in found(PluginManager([plugin]), "Marked").error


def test_a_plugin_that_fails_halfway_offers_nothing():
    plugin = module("""
        import sparsehooks

        @sparsehooks.hookimpl
        def register_components(registry):
            registry.add(sparsehooks.Component("criterion", "first", "x:Y", ""))
            raise ValueError("halfway")

        @sparsehooks.hookimpl
        def session_started(session):
            raise AssertionError("a broken plugin must not be called")
    """)
    manager = PluginManager([plugin], autoload=False)
    assert found(manager, "local_plugin").error == "ValueError: halfway"
    with pytest.raises(
        PluginError, match=r"no plugin offers the criterion 'first'.*failed to load: ValueError: halfway"
    ):
        manager.catalog.resolve("criterion", "first")
    manager.session_started(None)


def test_a_run_fails_only_if_its_recipe_needs_the_broken_plugin(install):
    install("acme-score", "import not_there", entry="acme", version="2.1")
    manager, model = PluginManager(), torch.nn.Sequential(torch.nn.Linear(4, 4))
    Plan.build(Recipe.from_dict({"stage": [{"prune": "magnitude", "sparsity": 0.5}]}), manager, model)
    with pytest.raises(PlanError) as caught:
        Plan.build(Recipe.from_dict({"stage": [{"prune": "acme-score", "sparsity": 0.5}]}), manager, model)
    (problem,) = caught.value.problems
    assert problem.startswith("recipe.stage[0].prune: no plugin offers the criterion 'acme-score'")
    assert "plugin 'acme' (acme-score 2.1) failed to load: ModuleNotFoundError: No module named 'not_there'" in problem


def test_two_distributions_with_one_plugin_name_are_not_mixed_up(install):
    install("first", entry="score")
    install("second", entry="score")
    one, other = [plugin for plugin in PluginManager().plugins if plugin.name == "score"]
    assert (one.describe(), one.status) == ("'score' (first 1.0)", "ok")
    assert (other.describe(), other.components) == ("'score' (second 1.0)", [])
    assert other.error == "PluginError: its name is taken by plugin 'score' (first 1.0)"


def test_a_file_with_the_name_of_an_installed_plugin_is_not_ignored(install, tmp_path):
    install("acme-score", entry="mine")
    path = tmp_path / "mine.py"
    path.write_text(LISTENS)
    errors = [plugin.error for plugin in PluginManager([path]).plugins if plugin.name == "mine"]
    assert errors == [None, "PluginError: its name is taken by plugin 'mine' (acme-score 1.0)"]


def test_a_half_removed_distribution_stops_nothing(install):
    info = install("acme")
    (info / "METADATA").unlink()
    install("healthy")
    manager = PluginManager()
    assert found(manager, "acme").describe() == "'acme' (entry point)"
    assert found(manager, "healthy").status == "ok"


# ------------------------------------------------------------------------------------------------------ equality


@dataclass
class Counter:
    """Equal to every other one with the same count, and not hashable."""

    calls: int = 0

    @hookimpl
    def step_finished(self, session, step):
        self.calls += step


def test_two_plugins_that_are_equal_are_still_two():
    first, second = Counter(), Counter()
    assert first == second
    manager = PluginManager([first, second], autoload=False)
    assert names(manager, source="python") == ["Counter", "Counter-2"]
    assert not manager.broken()
    manager.step_finished()(None, 3)
    assert (first.calls, second.calls) == (3, 3)


def test_of_two_equal_plugins_the_broken_one_alone_is_taken_out():
    @dataclass
    class Same:
        count: int
        broken: bool = field(default=False, compare=False)

        @hookimpl
        def register_components(self, registry):
            if self.broken:
                raise ValueError("broken")

        @hookimpl
        def session_started(self, session):
            calls.append(self.broken)

    calls = []
    healthy, broken = Same(0), Same(0, broken=True)
    manager = PluginManager([healthy, broken], autoload=False)
    manager.session_started(None)
    assert healthy == broken
    assert calls == [False]


def test_the_order_of_registration_does_not_change_the_catalog():
    plugins = [module(OFFERS.format(name=name, module="x"), f"plugin_{name}") for name in ("a", "b", "c")]

    def catalog(order):
        records = PluginManager(order, autoload=False).catalog.records()
        return [(record.component, record.plugin.name) for record in records]

    expected = catalog(plugins)
    assert {"a", "b", "c"} <= {component.name for component, _ in expected}
    for order in ([2, 0, 1], [1, 2, 0], [2, 1, 0]):
        assert catalog([plugins[index] for index in order]) == expected


# ------------------------------------------------------------------------------------------------------ hooks

ARGUMENTS = {
    "register_components": ["registry"],
    "load_recipe": ["path"],
    "check_plan": ["plan"],
    "session_started": ["session"],
    "stage_changed": ["session", "stage", "status"],
    "masks_updated": ["session", "stage", "step", "changes"],
    "step_finished": ["session", "step"],
    "metrics_reported": ["session", "metrics"],
    "artifact_metadata": ["session"],
    "session_finished": ["session", "error"],
}


def call(manager, hook):
    """Call the hook with a recognisable value for each argument."""
    if hook == "step_finished":
        return manager.step_finished()("<session>", "<step>")
    return getattr(manager, hook)(**{name: f"<{name}>" for name in ARGUMENTS[hook]})


def implementing(hook, body, arguments=None):
    """A plugin with one implementation."""
    arguments = ARGUMENTS[hook] if arguments is None else arguments
    plugin = module(f"def {hook}({', '.join(arguments)}):\n    {body}", f"implements_{hook}")
    hookimpl(getattr(plugin, hook))
    return plugin


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "register_components"])
def test_a_hook_receives_its_arguments(hook):
    got = []
    plugin = implementing(hook, "got.append(dict(locals()))")
    plugin.got = got
    few = implementing(hook, "got.append({})", [])
    few.got = got
    few.__name__ = "takes_nothing"
    call(PluginManager([plugin, few, "no:toml"], autoload=False), hook)
    assert got == [{}, {name: f"<{name}>" for name in ARGUMENTS[hook]}]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "register_components"])
def test_an_argument_with_a_default_is_passed_too(hook):
    plugin = implementing(hook, "got.append(dict(locals()))", [f"{name}=None" for name in ARGUMENTS[hook]])
    plugin.got = got = []
    call(PluginManager([plugin, "no:toml"], autoload=False), hook)
    assert got == [{name: f"<{name}>" for name in ARGUMENTS[hook]}]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in ("register_components", "session_finished")])
def test_an_error_keeps_its_type_and_names_the_plugin(hook):
    silent = implementing(hook, "return None")
    silent.__name__ = "silent"
    loud = implementing(hook, "raise ZeroDivisionError('scale is 0')")
    with pytest.raises(ZeroDivisionError, match="scale is 0") as caught:
        call(PluginManager([silent, loud], autoload=False), hook)
    assert caught.value.__notes__ == [
        f"sparsehooks: raised by plugin 'implements_{hook}' (python) in hook {hook}()",
        f"             to run without it: -p no:implements_{hook}",
    ]


def test_a_note_tells_distribution_and_version(install):
    source = "import sparsehooks\n@sparsehooks.hookimpl\ndef session_started(session): raise KeyError('scale')"
    install("vendor-quant", source, entry="vendor", version="1.2.0")
    with pytest.raises(KeyError) as caught:
        PluginManager().session_started(None)
    assert caught.value.__notes__[0].endswith("by plugin 'vendor' (vendor-quant 1.2.0) in hook session_started()")


def test_of_two_plugins_of_one_class_the_right_one_is_named():
    class Fussy:
        def __init__(self, fails):
            self.fails = fails

        @hookimpl
        def session_started(self, session):
            if self.fails:
                raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        PluginManager([Fussy(fails=True), Fussy(fails=False)], autoload=False).session_started(None)
    assert "plugin 'Fussy' (python)" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="no") as caught:
        PluginManager([Fussy(fails=False), Fussy(fails=True)], autoload=False).session_started(None)
    assert "plugin 'Fussy-2' (python)" in caught.value.__notes__[0]


def test_an_error_inside_a_component_names_component_and_plugin():
    class Failing(Criterion):
        def score(self, view):
            raise ZeroDivisionError("scale is 0")

    class Offers:
        @hookimpl
        def register_components(self, registry):
            registry.add(Component("criterion", "failing", Failing, "fails"))

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    before = copied(model)
    with pytest.raises(ZeroDivisionError) as caught:
        sparsehooks.compress(model, {"stage": [{"prune": "failing", "sparsity": 0.5}]}, plugins=[Offers()])
    assert caught.value.__notes__ == [
        "sparsehooks: raised by plugin 'Offers' (python) in criterion 'failing'",
        "             to run without it: -p no:Offers",
    ]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Observer:
    @hookimpl
    def session_started(self, session):
        pass


def test_session_finished_reaches_every_plugin_and_groups_their_errors():
    calls = []

    class Finishing:
        def __init__(self, error=None):
            self.error = error

        @hookimpl
        def session_finished(self, session, error):
            calls.append((session, error))
            if self.error is not None:
                raise self.error

    cause = RuntimeError("what ended the run")
    plugins = [Finishing(), Finishing(ValueError("one")), Finishing(), Finishing(KeyError("two")), Finishing()]
    manager = PluginManager(plugins, autoload=False)
    with pytest.raises(ExceptionGroup, match="plugins failed in session_finished") as caught:
        manager.session_finished("session", cause)
    assert calls == [("session", cause)] * 5
    assert {(type(error), error.__notes__[0].split()[4]) for error in caught.value.exceptions} == {
        (ValueError, "'Finishing-2'"),
        (KeyError, "'Finishing-4'"),
    }


@pytest.mark.parametrize("hook", ["session_started", "session_finished", "artifact_metadata", "check_plan"])
def test_tryfirst_and_trylast_order_every_hook(hook):
    calls = []
    plugins = []
    for name, options in {"last": {"trylast": True}, "middle": {}, "first": {"tryfirst": True}}.items():
        plugin = module(f"def {hook}():\n    calls.append({name!r})", name)
        plugin.calls = calls
        hookimpl(**options)(getattr(plugin, hook))
        plugins.append(plugin)
    for order in (plugins, plugins[::-1]):
        calls.clear()
        call(PluginManager(order, autoload=False), hook)
        assert calls == ["first", "middle", "last"]


def test_metadata_lies_under_the_name_of_its_plugin():
    first = implementing("artifact_metadata", "return {'task': 'sst2', 3: 4}")
    nothing = implementing("artifact_metadata", "return None")
    nothing.__name__ = "nothing"
    manager = PluginManager([first, nothing], autoload=False)
    assert manager.artifact_metadata(None) == {"implements_artifact_metadata": {"task": "sst2", "3": "4"}}


@pytest.mark.parametrize(
    ("answer", "problems"),
    [
        ("None", []),
        ("[]", []),
        ("['a', 'b']", ["a", "b"]),
        ("'one sentence'", ["one sentence"]),
        ("iter('ab')", ["a", "b"]),
    ],
)
def test_check_plan_takes_a_sentence_or_several(answer, problems):
    manager = PluginManager([implementing("check_plan", f"return {answer}")], autoload=False)
    assert manager.check_plan(None) == problems


def test_an_error_of_an_answer_that_is_made_while_it_is_read_names_the_plugin():
    manager = PluginManager([implementing("check_plan", "return (1 / 0 for _ in [1])")], autoload=False)
    with pytest.raises(ZeroDivisionError) as caught:
        manager.check_plan(None)
    assert "in hook check_plan()" in caught.value.__notes__[0]


def test_load_recipe_stops_at_the_first_answer(tmp_path):
    answers = [implementing("load_recipe", f"return {answer}") for answer in ("{'seed': 1}", "None", "{'seed': 3}")]
    for index, plugin in enumerate(answers):
        plugin.__name__ = f"reader{index}"
    assert PluginManager(answers, autoload=False).load_recipe(Path("x.toml")) == {"seed": 3}
    assert PluginManager(answers[:2], autoload=False).load_recipe(Path("x.toml")) == {"seed": 1}
    assert PluginManager(answers[1:2], autoload=False).load_recipe(Path("x.yaml")) is None


def test_without_listeners_a_step_costs_no_hook_call():
    from sparsehooks.plugins import _nothing

    assert PluginManager(autoload=False).step_finished() is _nothing
    assert PluginManager([Counter()], autoload=False).step_finished() is not _nothing


# ------------------------------------------------------------------------------------------------------ requires


def test_requirements_are_checked_against_what_is_installed(install):
    install("acme-score", version="1.3.0rc1")
    assert require(["acme-score", "acme-score>=1.2", "Acme_Score<2"]) == []
    assert require(["acme-score>=2", "not-there-at-all>=1", "not a requirement"]) == [
        "recipe.requires: 'acme-score>=2' is needed, acme-score 1.3.0rc1 is installed",
        "recipe.requires: 'not-there-at-all' is not installed; run pip install 'not-there-at-all>=1'",
        "recipe.requires: 'not a requirement' is not a requirement such as 'sparsehooks-wanda>=1.2'",
    ]
