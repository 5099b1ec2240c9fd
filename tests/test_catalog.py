"""The catalog: one record each, conflicts that name both sides, and classes that are loaded when they are needed."""

import itertools
import sys
import types

import pytest

from sparsehooks import Component, Criterion, Pattern, PluginError, PluginManager, hookimpl
from sparsehooks.builtin.criteria.magnitude import Magnitude
from sparsehooks.builtin.patterns.n_of_m import NOfM
from sparsehooks.components import KINDS
from sparsehooks.errors import suggest


class Offers:
    def __init__(self, *components):
        self.components = components

    @hookimpl
    def register_components(self, registry):
        for component in self.components:
            registry.add(component)


def catalog(*plugins):
    return PluginManager(plugins, autoload=False).catalog


def criterion(name, target=Magnitude, **options):
    return Component("criterion", name, target, "made up", **options)


class Zero(Criterion):
    def score(self, view):
        return view.weight * 0


def test_a_clash_names_both_and_how_to_go_on():
    clashing = catalog(Offers(criterion("magnitude", Zero)))
    with pytest.raises(PluginError) as caught:
        clashing.resolve("criterion", "magnitude")
    version = __import__("sparsehooks").__version__
    assert str(caught.value) == (
        f"the criterion 'magnitude' is offered by 'criteria' (sparsehooks {version}) and 'Offers' (python); "
        "switch one off with -p no:Offers"
    )
    assert clashing.resolve("criterion", "random")[0].load().__name__ == "Random", "a clash stops nothing else"


@pytest.mark.parametrize(("off", "expected"), [("criteria", Zero), ("Offers", Magnitude)])
def test_switching_off_either_side_resolves_a_clash(off, expected):
    record, _ = catalog(Offers(criterion("magnitude", Zero)), f"no:{off}").resolve("criterion", "magnitude")
    assert record.load() is expected


def test_a_plugin_that_offers_one_name_twice_clashes_with_itself():
    with pytest.raises(PluginError, match=r"'twice' is offered by 'Offers' .* and 'Offers' "):
        catalog(Offers(criterion("twice"), criterion("twice", Zero))).resolve("criterion", "twice")


def test_one_name_may_stand_for_two_kinds():
    both = catalog(Offers(criterion("int8")))
    assert both.resolve("criterion", "int8")[0].component.kind == "criterion"
    assert both.resolve("quantizer", "int8")[0].component.kind == "quantizer"


@pytest.mark.parametrize(("name", "options"), [("2:4", {"n": 2, "m": 4}), ("4:8", {"n": 4, "m": 8}), ("n:m", {})])
def test_a_shorthand_carries_its_options(name, options):
    record, found = catalog().resolve("pattern", name)
    assert (record.load(), found) == (NOfM, options)


@pytest.mark.parametrize("name", ["2:4:8", "a:b", "2 : 4", ":4", "2:\u0664"])
def test_what_is_not_quite_a_shorthand_is_unknown(name):
    with pytest.raises(PluginError, match=f"no plugin offers the pattern '{name}'"):
        catalog().resolve("pattern", name)


def test_groups_of_a_shorthand_that_did_not_take_part_are_no_options():
    shorthand = r"top(?P<count>\d+)?(?P<unit>[a-z]+)?"
    found = catalog(Offers(criterion("top", shorthand=shorthand)))
    assert found.resolve("criterion", "top12")[1] == {"count": 12}
    assert found.resolve("criterion", "topk")[1] == {"unit": "k"}


def test_a_shorthand_that_can_mean_two_things_is_an_error():
    found = catalog(Offers(criterion("one", shorthand="x.*"), criterion("two", shorthand=".*y")))
    assert found.resolve("criterion", "x")[0].component.name == "one"
    with pytest.raises(PluginError, match=r"the criterion 'xy' can mean one or two; write \{ use = NAME, \.\.\. \}"):
        found.resolve("criterion", "xy")


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("criterion", "magnitud", "did you mean 'magnitude'?"),
        ("schedule", "cubik", "did you mean 'cubic'?"),
        ("quantizer", "zzz", "known: apot, int, kmeans, lsq, nf4"),
        ("pattern", "zzz", "known: block, channel, column, head, layer, n:m, row, unstructured"),
    ],
)
def test_an_unknown_name_is_answered_with_what_may_be_meant(kind, name, hint):
    with pytest.raises(PluginError) as caught:
        catalog().resolve(kind, name)
    assert str(caught.value) == f"no plugin offers the {kind} '{name}'; {hint}"


def test_an_unknown_kind_names_the_nearest_one():
    manager = PluginManager([Offers(Component("criterium", "mine", Zero, ""))], autoload=False)
    assert manager.broken()[0].error == (
        "PluginError: component 'mine': there is no kind 'criterium'; did you mean 'criterion'?"
    )


class Half(Pattern):
    def check(self, shape):
        return None


class NoDataclass(Zero):
    Config = dict


LOADS_NOT = {
    "not_there_at_all:X": "cannot load 'not_there_at_all:X': No module named 'not_there_at_all'",
    "sparsehooks.builtin.criteria.magnitude:Magnitud": "cannot load .* has no attribute 'Magnitud'",
    "sparsehooks.builtin.criteria.magnitude": "cannot load",
    "breaks_on_import:X": "cannot load 'breaks_on_import:X': division by zero",
    "sparsehooks.builtin.patterns.n_of_m:NOfM": "is not a subclass of sparsehooks.Criterion",
    NOfM: "NOfM'> is not a subclass of sparsehooks.Criterion",
    NoDataclass: "the Config of NoDataclass is not a dataclass",
}


@pytest.mark.parametrize("target", LOADS_NOT)
def test_a_target_that_cannot_be_used_is_reported_when_it_is_needed(target, tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    record, _ = catalog(Offers(criterion("mine", target))).resolve("criterion", "mine")
    with pytest.raises(PluginError, match=LOADS_NOT[target]) as caught:
        record.load()
    assert str(caught.value).startswith("criterion 'mine' of plugin 'Offers' (python): ")


def test_missing_methods_are_named():
    record, _ = catalog(Offers(Component("pattern", "half", Half, ""))).resolve("pattern", "half")
    with pytest.raises(PluginError, match=r"Half does not implement expand, units\(\)"):
        record.load()


def test_a_class_is_loaded_no_sooner_than_it_is_needed(monkeypatch):
    lazy = types.ModuleType("loaded_lazily")
    loads = []
    lazy.__getattr__ = lambda name: (loads.append(name), Zero)[1]
    monkeypatch.setitem(sys.modules, "loaded_lazily", lazy)
    record, _ = catalog(Offers(criterion("lazy", "loaded_lazily:Score"))).resolve("criterion", "lazy")
    assert loads == []
    assert record.load() is Zero
    assert loads == ["Score"]


def test_records_come_by_kind_and_then_by_name():
    records = catalog(Offers(criterion("zzz"), criterion("aaa"))).records()
    keys = [(list(KINDS).index(record.component.kind), record.component.name) for record in records]
    assert keys == sorted(keys)
    assert {kind for kind, _ in itertools.groupby(record.component.kind for record in records)} == set(KINDS)
    assert [record.component.name for record in catalog().records("quantizer")] == [
        "apot",
        "int",
        "kmeans",
        "lsq",
        "nf4",
    ]


def test_create_gives_the_component_with_its_default_options():
    made = catalog().create("pattern", "n:m")
    assert (type(made), made.config) == (NOfM, NOfM.Config(2, 4))


def test_suggest_prefers_the_nearest_name():
    assert suggest("sparsty", ["sparsity", "schedule"]) == "; did you mean 'sparsity'?"
    assert suggest("zzz", ["b", "a"]) == "; known: a, b"
    assert suggest("zzz", []) == ""
