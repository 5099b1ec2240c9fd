"""Recipes: one strict decoder, the path in every error, and Python objects as equal citizens."""

import dataclasses
import subprocess
import sys

import pytest

from sparsehooks import DistillStage, PluginManager, PruneStage, QuantizeStage, Recipe, RecipeError, Use, hookimpl
from sparsehooks.decoding import decode

PRUNE = {"prune": "magnitude", "sparsity": 0.5}
ACTIONS = "prune, regularize, activation, shrink, quantize, distill"
STAGE = "recipe.stage[0]"

DTYPES = "expected one of 'float32', 'bfloat16', 'float16'"
WRONG = [
    # the recipe itself
    ({}, "recipe: needs at least one [[stage]]"),
    ({"stage": []}, "recipe: needs at least one [[stage]]"),
    ({"stage": {"prune": "magnitude"}}, "recipe: needs at least one [[stage]]"),
    ({"stage": "prune"}, "recipe: needs at least one [[stage]]"),
    ({"stages": [PRUNE]}, "recipe: unknown key 'stages'; did you mean 'stage'?"),
    ({"stage": [PRUNE], "requires": "a"}, "recipe.requires: expected a list, got 'a'"),
    ({"stage": [PRUNE], "requires": ["a", 1]}, "recipe.requires[1]: expected a string, got 1"),
    ({"stage": [PRUNE], "seed": True}, "recipe.seed: expected a whole number, got True"),
    ({"stage": [PRUNE], "seed": 1.5}, "recipe.seed: expected a whole number, got 1.5"),
    ({"stage": [PRUNE, 3]}, "recipe.stage[1]: expected a table, got 3"),
    # which action
    (
        {"stage": [{"sparsity": 0.5}]},
        f"{STAGE}: needs exactly one of {ACTIONS}; it has none",
    ),
    (
        {"stage": [{"prun": "magnitude"}]},
        f"{STAGE}: needs exactly one of {ACTIONS}; it has none; did you mean 'prune'?",
    ),
    (
        {"stage": [{**PRUNE, "quantize": "int8"}]},
        f"{STAGE}: needs exactly one of {ACTIONS}; it has prune and quantize",
    ),
    ({"stage": [{**PRUNE, "teacher": "self"}]}, f"{STAGE}: 'teacher' belongs to distill, not to prune"),
    ({"stage": [{"quantize": "int8", "sparsity": 0.5}]}, f"{STAGE}: 'sparsity' belongs to prune, not to quantize"),
    ({"stage": [{"distill": "kl", "pattern": "2:4"}]}, f"{STAGE}: 'pattern' belongs to prune, not to distill"),
    # keys and types of a stage
    (
        {"stage": [{"prune": "magnitude", "sparsty": 0.5}]},
        f"{STAGE}: unknown key 'sparsty'; did you mean 'sparsity'?",
    ),
    ({"stage": [{**PRUNE, "sparsity": "0.5"}]}, f"{STAGE}.sparsity: expected a number, got '0.5'"),
    ({"stage": [{**PRUNE, "sparsity": True}]}, f"{STAGE}.sparsity: expected a number, got True"),
    ({"stage": [{**PRUNE, "targets": "Linear"}]}, f"{STAGE}.targets: expected a list, got 'Linear'"),
    ({"stage": [{**PRUNE, "targets": ["Linear", 1]}]}, f"{STAGE}.targets[1]: expected a string, got 1"),
    ({"stage": [{**PRUNE, "targets": []}]}, f"{STAGE}: 'targets' is empty; leave it out for all Linear layers"),
    (
        {"stage": [{**PRUNE, "pattern": 124}]},
        f"{STAGE}.pattern: expected a name or a table {{ use = NAME, ... }}, got 124",
    ),
    (
        {"stage": [{**PRUNE, "schedule": {"end": 0.5}}]},
        f"{STAGE}.schedule: a component table needs 'use', the name of the component",
    ),
    (
        {"stage": [{**PRUNE, "schedule": {"use": 3}}]},
        f"{STAGE}.schedule: a component table needs 'use', the name of the component",
    ),
    (
        {"stage": [{"distill": "kl", "teacher": 1}]},
        f"{STAGE}.teacher: expected a name or a table {{ use = NAME, ... }}, got 1",
    ),
    ({"stage": [{"distill": "kl", "teacher": []}]}, f"{STAGE}.teacher: is empty; leave it out for 'self'"),
    (
        {"stage": [{"distill": "kl", "teacher": ["self", {"use": "a", "dtyp": "bfloat16"}]}]},
        f"{STAGE}.teacher[1]: unknown key 'dtyp'; did you mean 'dtype'?",
    ),
    (
        {"stage": [{"distill": "kl", "teacher": {"use": "self", "dtype": "int8"}}]},
        f"{STAGE}.teacher.dtype: {DTYPES}; got 'int8'; known: bfloat16, float16, float32",
    ),
    ({"stage": [{"distill": "kl", "teacher": {"dtype": "bfloat16"}}]}, f"{STAGE}.teacher: 'use' is missing"),
    (
        {"stage": [{"distill": "kl", "teacher": ["self", "self"]}]},
        f"{STAGE}.teacher: names one teacher twice; give stages of their own with another 'weight'",
    ),
    ({"stage": [{"distill": "kl", "cache": ""}]}, f"{STAGE}: 'cache' is empty; name a folder, or leave it out"),
    # ranges
    *(
        (
            {"stage": [{**PRUNE, "sparsity": value}]},
            f"{STAGE}: 'sparsity' = {float(value)} is outside [0, 1); 0.8 keeps a fifth of the weights",
        )
        for value in (1.0, 1, -0.1, 80, float("nan"))
    ),
    (
        {"stage": [{**PRUNE, "overrides": {"0": 1.0}}]},
        f"{STAGE}: 'overrides' gives '0' the sparsity 1.0, which is outside [0, 1)",
    ),
    (
        {"stage": [{**PRUNE, "overrides": {"re:*": 0.1}}]},
        f"{STAGE}: 'overrides' has 're:*', which is not a regular expression: nothing to repeat at position 0",
    ),
    *(
        (
            {"stage": [{"distill": "kl", "weight": value}]},
            f"{STAGE}: 'weight' = {float(value)} is not a positive number",
        )
        for value in (0, -1, float("inf"), float("nan"))
    ),
]


@pytest.mark.parametrize(("mapping", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_what_is_wrong_is_told_with_its_path(mapping, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(mapping)
    assert str(caught.value) == message


@pytest.mark.parametrize("mapping", [[PRUNE], None, "prune", 3])
def test_what_is_no_table_at_all_is_refused(mapping):
    with pytest.raises(RecipeError, match="recipe: expected a table"):
        Recipe.from_dict(mapping)


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stage]\n", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        ("[[stage]]\nprune = 'magnitude'\nprune = 'random'\n", "not valid TOML"),
        ("[[stage]]\nprune = 'magnitude'\nsparsty = 1\n", "recipe.stage[0]: unknown key 'sparsty'"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(RecipeError) as caught:
            Recipe.load(path)
        assert str(caught.value) == f"{path}: there is no such recipe file"


def test_a_format_that_nobody_reads_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stage: []")
    with pytest.raises(RecipeError, match=r"neither TOML .* nor a format that a plugin reads"):
        Recipe.load(path)


class Lines:
    """Reads ``.lines``: a stage a line, its criterion and its sparsity."""

    @hookimpl
    def load_recipe(self, path):
        if path.suffix != ".lines":
            return None
        rows = [line.split() for line in path.read_text().splitlines()]
        return {"stage": [{"prune": name, "sparsity": float(sparsity)} for name, sparsity in rows]}


def test_a_plugin_reads_another_format(tmp_path):
    path = tmp_path / "recipe.lines"
    path.write_text("magnitude 0.5\nrandom 0.25\n")
    expected = Recipe((PruneStage(prune="magnitude", sparsity=0.5), PruneStage(prune="random", sparsity=0.25)))
    assert Recipe.load(path, [Lines()]) == expected
    assert Recipe.load(path, PluginManager([Lines()])) == expected
    assert Recipe.of(str(path), [Lines()]) == expected
    path.write_text("magnitude 2\n")
    with pytest.raises(RecipeError, match=r"recipe.lines: recipe.stage\[0\]: 'sparsity' = 2.0 is outside"):
        Recipe.load(path, [Lines()])


def test_a_plugin_that_reads_toml_first_wins_over_the_builtin_reader(tmp_path):
    class Ours:
        @hookimpl
        def load_recipe(self, path):
            return {"stage": [PRUNE], "seed": 5}

    path = tmp_path / "recipe.toml"
    path.write_text("not toml at all")
    assert Recipe.load(path, [Ours()]).seed == 5


# ---------------------------------------------------------------------------------------------- equal citizens

TOML = """
requires = ["sparsehooks>=0.1"]
seed = 7

[[stage]]
prune = "magnitude"
pattern = { use = "block", height = 2, width = 2 }
sparsity = 0.8
allocation = "global"
targets = ["Linear", "re:encoder\\\\..*"]
exclude = ["lm_head"]
schedule = { use = "cubic", start = 0.1, end = 0.7, every = 10 }

[[stage]]
distill = { use = "kl", temperature = 4.0 }
teacher = "org/teacher"
weight = 2

[[stage]]
quantize = "int8"
schedule = { use = "oneshot", start = 100 }
"""

PYTHON = Recipe(
    stages=(
        PruneStage(
            prune="magnitude",
            pattern={"use": "block", "height": 2, "width": 2},
            sparsity=0.8,
            allocation=Use("global"),
            targets=("Linear", r"re:encoder\..*"),
            exclude=("lm_head",),
            schedule=Use("cubic", {"start": 0.1, "end": 0.7, "every": 10}),
        ),
        DistillStage(distill=Use("kl", {"temperature": 4.0}), teacher="org/teacher", weight=2.0),
        QuantizeStage(schedule={"use": "oneshot", "start": 100}),
    ),
    requires=("sparsehooks>=0.1",),
    seed=7,
)

RECIPES = {
    "everything": PYTHON,
    "defaults": Recipe((PruneStage(sparsity=0.5),)),
    "fixed": Recipe((PruneStage(pattern="2:4"), QuantizeStage(), DistillStage())),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    return path


def test_python_objects_equal_the_toml_form(path):
    recipe = Recipe.load(path)
    assert recipe == PYTHON
    assert recipe.digest() == PYTHON.digest()
    assert Recipe.of(path) == Recipe.of(PYTHON) == Recipe.of(PYTHON.to_dict()) == PYTHON
    assert Recipe.of(PYTHON) is PYTHON


def test_stages_of_both_forms_can_be_mixed():
    mixed = Recipe.from_dict({"stage": [PruneStage(sparsity=0.5), {"prune": Use("random"), "sparsity": 0.5}]})
    assert [stage.component for stage in mixed.stages] == [Use("magnitude"), Use("random")]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_survives_plain_values(recipe):
    plain = recipe.to_dict()
    again = Recipe.from_dict(plain)
    assert again == recipe
    assert again.to_dict() == plain
    assert again.digest() == recipe.digest()


def test_defaults_are_left_out_of_the_plain_form():
    assert RECIPES["defaults"].to_dict() == {"stage": [{"prune": "magnitude", "sparsity": 0.5}]}
    assert RECIPES["fixed"].to_dict() == {
        "stage": [{"prune": "magnitude", "pattern": "2:4"}, {"quantize": "int8"}, {"distill": "kl"}]
    }


def test_digests_differ_where_recipes_do(path):
    changes = [
        dataclasses.replace(PYTHON, seed=8),
        dataclasses.replace(PYTHON, requires=()),
        dataclasses.replace(PYTHON, stages=PYTHON.stages[::-1]),
        dataclasses.replace(PYTHON, stages=PYTHON.stages[:2]),
        dataclasses.replace(PYTHON, stages=(dataclasses.replace(PYTHON.stages[0], sparsity=0.81), *PYTHON.stages[1:])),
    ]
    assert len({PYTHON.digest(), *(recipe.digest() for recipe in changes)}) == 1 + len(changes)


def test_a_digest_is_the_same_in_every_process(path):
    code = f"import sparsehooks; print(sparsehooks.Recipe.load({str(path)!r}).digest())"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert outputs == [PYTHON.digest()] * 2


def test_a_digest_does_not_depend_on_the_order_of_keys():
    one = Recipe.from_dict({"stage": [{"prune": "magnitude", "schedule": {"use": "cubic", "start": 0.1, "every": 2}}]})
    other = Recipe.from_dict(
        {"stage": [{"schedule": {"every": 2, "start": 0.1, "use": "cubic"}, "prune": "magnitude"}]}
    )
    assert one.digest() == other.digest()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneStage(sparsity=1.0), "'sparsity' = 1.0 is outside"),
        (lambda: DistillStage(weight=0.0), "'weight' = 0.0 is not a positive number"),
        (lambda: QuantizeStage(targets=()), "'targets' is empty"),
    ],
)
def test_python_objects_check_their_ranges(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -------------------------------------------------------------------------------------------------- the decoder


@dataclasses.dataclass(frozen=True)
class Options:
    count: int
    rate: float = 0.5
    moment: float | int = 0.0
    limit: int | None = None
    names: tuple[str, ...] = ()
    fast: bool = False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"count": 3}, Options(3)),
        ({"count": 3, "rate": 1}, Options(3, 1.0)),
        ({"count": 3, "limit": 4, "names": ["a"], "fast": True}, Options(3, limit=4, names=("a",), fast=True)),
    ],
)
def test_options_are_decoded(given, expected):
    decoded = decode(Options, given, "path")
    assert decoded == expected
    assert type(decoded.rate) is float


@pytest.mark.parametrize(("value", "kind"), [(1, int), (1.0, float), (0, int), (0.0, float)])
def test_a_whole_number_stays_one_where_both_are_allowed(value, kind):
    assert type(decode(Options, {"count": 1, "moment": value}, "path").moment) is kind


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "path: 'count' is missing"),
        ({"count": True}, "path.count: expected a whole number, got True"),
        ({"count": 1.0}, "path.count: expected a whole number, got 1.0"),
        ({"count": "1"}, "path.count: expected a whole number, got '1'"),
        ({"count": 1, "moment": False}, "path.moment: expected a number or a whole number, got False"),
        ({"count": 1, "limit": 0.5}, "path.limit: expected a whole number, got 0.5"),
        ({"count": 1, "fast": 1}, "path.fast: expected true or false, got 1"),
        ({"count": 1, "names": [["a"]]}, "path.names[0]: expected a string, got ['a']"),
        ({"count": 1, "fats": True}, "path: unknown key 'fats'; did you mean 'fast'?"),
        ([1], "path: expected a table, got [1]"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(given, message):
    with pytest.raises(RecipeError) as caught:
        decode(Options, given, "path")
    assert str(caught.value) == message
