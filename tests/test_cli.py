"""The command line, as a program of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from helpers import same_state, tiny_bert
from transformers import AutoModel, GPT2Config, GPT2ForSequenceClassification

import sparsehooks as library
from sparsehooks.cli import main
from sparsehooks.recipe import named_recipes

RECIPE = """
[[stage]]
prune = "magnitude"
sparsity = 0.8
exclude = ["*pooler*"]

[[stage]]
quantize = "int8"
targets = ["Linear", "Embedding"]
"""


def sparsehooks(*arguments, status=0):
    """The program in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "sparsehooks", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def inside(monkeypatch, capsys):
    """The same in this process, which has imported torch and transformers already."""

    def run(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["sparsehooks", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == status, captured.out + captured.err
        return captured

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model, a recipe and the artifact that the command line made of them."""
    home = tmp_path_factory.mktemp("cli")
    tiny_bert().save_pretrained(home / "dense")
    (home / "recipe.toml").write_text(RECIPE)
    sparsehooks("compress", home / "dense", "--recipe", home / "recipe.toml", "--out", home / "sparse")
    return home


def test_help_is_fast_and_leaves_torch_alone():
    code = "import sys; sys.argv = ['sparsehooks', '--help']; from sparsehooks.cli import main\ntry: main()\n"
    code += "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    ours, typer_alone = [], []
    for _ in range(5):
        for times, code in (
            (ours, "import sys; sys.argv[1:] = ['--help']; from sparsehooks.cli import main; main()"),
            (typer_alone, "import typer, typer.rich_utils, rich.table, rich.markdown"),
        ):
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
            times.append(time.monotonic() - began)
    assert min(ours) < max(0.3, 1.2 * min(typer_alone)), "on a slow machine what the libraries take is the measure"


def test_every_command_has_help():
    listed = sparsehooks("--help").stdout
    for command in (
        *("demo", "compress", "convert", "inspect", "verify", "decompress", "export"),
        *("check", "plugins", "hooks", "components"),
    ):
        assert command in listed
        assert "Usage" in sparsehooks(command, "--help").stdout


def test_compress_inspect_verify_decompress(folder, inside):
    found = json.loads(inside("inspect", folder / "sparse", "--json").out)
    assert {row["values"] for row in found["tensors"] if row["bytes"] < row["dense_bytes"]} <= {"grid", "int"}
    assert 0.9 < found["totals"]["bytes"] / found["totals"]["entropy_bytes"] < 1.5
    text = inside("inspect", folder / "sparse").out
    assert all(row["name"] in text for row in found["tensors"])
    assert json.loads(inside("verify", folder / "sparse", "--json").out)["ok"] is True
    inside("decompress", folder / "sparse", "--out", folder / "again")
    assert same_state(AutoModel.from_pretrained(folder / "again"), AutoModel.from_pretrained(folder / "sparse"))
    assert library.inspect(folder / "sparse").to_dict() == found


def test_check_with_and_without_a_model(folder, inside):
    rows = json.loads(inside("check", folder / "recipe.toml", "--model", folder / "dense", "--json").out)
    assert [len(row["targets"]) for row in rows] == [12, 16]
    assert "valid" in inside("check", folder / "recipe.toml").out


def test_components_hooks_and_plugins(inside):
    criteria = json.loads(inside("components", "criterion", "--json").out)
    assert any({"kind": "criterion", "name": "magnitude"}.items() <= row.items() for row in criteria)
    hooks = json.loads(inside("hooks", "--json").out)
    assert hooks[0]["hook"] == "register_components"
    assert "masks_updated(session: SessionView, stage: str" in inside("hooks", "masks_updated").out
    plugins = json.loads(inside("plugins", "--json", "-p", "no:distillers").out)
    assert {plugin["name"]: plugin["status"] for plugin in plugins}["distillers"] == "off"


def test_a_file_is_a_plugin(folder, inside):
    (folder / "mine.py").write_text(
        "from sparsehooks import Component, Criterion, hookimpl\n"
        "class Inverse(Criterion):\n"
        "    def score(self, view):\n"
        "        return -view.weight.abs()\n"
        "@hookimpl\n"
        "def register_components(registry):\n"
        "    registry.add(Component('criterion', 'inverse', 'mine:Inverse', 'the smallest'))\n"
    )
    recipe = folder / "inverse.toml"
    recipe.write_text(RECIPE.replace("magnitude", "inverse"))
    inside("check", recipe, "-p", folder / "mine.py")
    assert "no plugin offers the criterion 'inverse'" in inside("check", recipe, status=2).err


def test_the_kernels_of_the_command_line_compute(folder, inside, monkeypatch):
    (folder / "loops.py").write_text(
        "import sys\n"
        "from sparsehooks import Component, hookimpl\n"
        "from sparsehooks.builtin.kernels.reference import Numpy\n"
        "class Loops(Numpy):\n"
        "    def problem(self):\n"
        "        print('asked', file=sys.stderr)\n"
        "@hookimpl\n"
        "def register_components(registry):\n"
        "    registry.add(Component('kernels', 'a', Loops, 'of a test'))\n"
    )

    def status(*plugins):
        rows = json.loads(inside("components", "kernels", "--json", *plugins).out)
        return {row["name"]: row["status"] for row in rows if row["plugin"] in ("loops", "kernels")}

    plugin = ("-p", folder / "loops.py")
    assert status(*plugin) == {"a": "runs", "numpy": "not needed"}
    assert "a" not in status()
    compress = ("compress", folder / "dense", "--recipe", folder / "recipe.toml", "--out", folder / "sparse-too")
    assert "asked" in inside(*compress, *plugin).err
    assert "asked" not in inside(*compress).err
    monkeypatch.setenv("SPARSEHOOKS_PLUGINS", str(folder / "loops.py"))
    assert "asked" in inside(*compress).err
    assert "asked" not in inside(*compress, "-p", "no:loops").err


def test_warnings_are_a_line_each_without_source(folder, tmp_path):
    (tmp_path / "warns.py").write_text(
        "import warnings\n"
        "from sparsehooks import hookimpl\n"
        "@hookimpl\n"
        "def check_plan(plan):\n"
        "    warnings.warn('two\\nlines', stacklevel=1)\n"
    )
    command = ("check", folder / "recipe.toml", "-p", tmp_path / "warns.py")
    done = subprocess.run(
        [sys.executable, "-m", "sparsehooks", *command], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == "warning: two lines\n"


def test_tables_that_are_piped_have_no_padding(inside):
    lines = inside("plugins").out.splitlines()
    assert len(lines) > 3
    assert not any(line.endswith(" ") for line in lines)


BAD_RECIPES = {
    "key": ('sparsty = 0.8\nprune = "magnitude"', r"unknown key 'sparsty'; did you mean 'sparsity'?"),
    "method": ('prune = "magnitud"\nsparsity = 0.8', "did you mean 'magnitude'?"),
    "pattern": ('prune = "magnitude"\npattern = "3:7"', "do not divide by 7"),
    "target": ('prune = "magnitude"\nsparsity = 0.8\ntargets = ["Linera"]', "did you mean 'Linear'?"),
    "sparsity": ('prune = "magnitude"\nsparsity = 1.0', "outside [0, 1)"),
    "schedule": (
        'prune = "magnitude"\nsparsity = 0.8\nschedule = { use = "cubic", start = 0.7, end = 0.2 }',
        "before it starts",
    ),
    "end": ('prune = "magnitude"\nsparsity = 0.8\nschedule = { use = "cubic", end = 1 }', "1.0"),
    "teacher": ('distill = "kl"\nteacher = "no/such-teacher"', "no/such-teacher"),
    "claim": ('prune = "magnitude"\nsparsity = 0.8\n[[stage]]\nprune = "random"\nsparsity = 0.5', "both prune"),
    "toml": ("prune = ", "not valid TOML"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes_are_one_sentence_and_status_2(folder, inside, tmp_path, name):
    text, message = BAD_RECIPES[name]
    (tmp_path / "bad.toml").write_text(f"[[stage]]\n{text}\n")
    done = inside("check", tmp_path / "bad.toml", "--model", folder / "dense", status=2)
    lines = done.err.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert message in lines[0]
    done = inside("compress", folder / "dense", "--recipe", tmp_path / "bad.toml", "--out", tmp_path / "out", status=2)
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_plan_come_at_once(folder, inside, tmp_path):
    (tmp_path / "bad.toml").write_text(
        'requires = ["not-installed>=1"]\n[[stage]]\nprune = "magnitud"\nsparsity = 0.8\n'
        '[[stage]]\nprune = "magnitude"\npattern = "3:7"\n[[stage]]\nquantize = "int8"\ntargets = ["nothing*"]\n'
    )
    done = inside("check", tmp_path / "bad.toml", "--model", folder / "dense", status=2)
    lines = done.err.strip().splitlines()
    assert all(any(word in line for line in lines) for word in ("not-installed", "magnitud", "3:7", "nothing*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "no-such-folder"),
        ("verify", "no-such-folder"),
        ("decompress", "no-such-folder", "--out", "out"),
        ("export", "no-such-folder", "--format", "dense", "--out", "out"),
        ("check", "no-such-recipe.toml"),
        ("compress", "no-such-model", "--recipe", "{recipe}", "--out", "out"),
        ("components", "criterium"),
        ("hooks", "mask_updated"),
        ("plugins", "-p", "no:nothing"),
    ],
)
def test_what_is_not_there_is_named(folder, inside, tmp_path, arguments):
    filled = [argument.format(recipe=folder / "recipe.toml") for argument in arguments]
    done = inside(*filled, status=2)
    (line,) = done.err.strip().splitlines()
    assert line.startswith("error: ")


def test_out_is_checked_before_the_work(folder, inside, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    compress = ("compress", folder / "dense", "--recipe", folder / "recipe.toml", "--out")
    assert "already holds" in inside(*compress, tmp_path / "out", status=2).err
    assert "error: " in inside(*compress, "/proc/no-room/model", status=2).err


def test_a_dense_folder_is_not_an_artifact(folder, inside):
    assert "error: " in inside("inspect", folder / "dense", status=2).err


def test_no_room_on_disk_leaves_nothing(folder, tmp_path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        f"sys.argv = ['sparsehooks', 'compress', {str(folder / 'dense')!r}, '--recipe', "
        f"{str(folder / 'recipe.toml')!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "from sparsehooks.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "error: cannot write" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed_and_printed(inside):
    rows = json.loads(inside("recipes", "--json").out)
    for row in rows:
        comment, following = named_recipes()[row["name"]].read_text().splitlines()[:2]
        assert comment == f"# {row['what']}"
        assert row["what"].endswith(".")
        assert not following.startswith("#")
    assert {"rigl", "wanda", "movement"} <= {row["name"] for row in rows}
    assert 'grow = { use = "gradient"' in inside("recipes", "rigl").out
    assert "did you mean 'rigl'" in inside("recipes", "rigll", status=2).err


def test_bench_times_every_layer(folder, inside):
    found = json.loads(inside("bench", folder / "sparse", "--json").out)
    assert "torch" in found["machine"]
    layer = found["layers"]["encoder.layer.0.intermediate.dense"]
    assert (layer["shape"], layer["dtype"], round(layer["sparsity"], 2)) == ([128, 64], "float32", 0.8)
    assert list(layer["speeds"]) == ["1", "16", "128", "512"]
    assert layer["speeds"]["1"]["dense_packed"] > 0
    assert layer["lanes"][-1][0] is None
    assert "it rounds what the model does not round" in layer["reasons"]["int8"]
    shown = inside("bench", folder / "sparse").out
    assert "128 tokens" in shown
    assert "int8, 13 of 13 layers: it rounds what the model does not round; name it to use it all the same" in shown
    assert "not tried" not in shown, "embeddings multiply by nothing"
    assert "F.linear" not in shown
    assert "the model cannot go to 'warp'" in inside("bench", folder / "sparse", "--device", "warp", status=2).err


def test_bench_says_where_speeds_are_remembered(inside):
    assert "sparsehooks/speeds.json" in inside("bench", "--help").out


def test_bench_names_what_else_multiplies(inside, tmp_path):
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    assert inside("bench", tmp_path).out.endswith("\nnot tried, so dense: 4 Conv1D\n")


def test_bench_takes_targets_and_says_what_it_compares_with(folder, inside, tmp_path):
    library.compress(tiny_bert(), {"stage": [{"activation": "int8", "exclude": ["*pooler*"]}]}, tmp_path / "coarse")
    arguments = ("bench", tmp_path / "coarse", "--targets", "*query", "--targets", "*pooler*", "--exclude", "*layer.1*")
    shown = inside(*arguments, "--exclude", "classifier")
    assert shown.err.endswith("warning: 'exclude' names 'classifier', which matches no module\n")
    assert "\n1 of 2 layers: beside torch's layer with the model's int8 inputs, which torch simulates" in shown.out
    assert "\nnot tried, so dense: 11 Linear\n" in shown.out
    layers = json.loads(inside(*arguments, "--json").out)["layers"]
    assert {name: layer["input"] for name, layer in layers.items()} == {
        "encoder.layer.0.attention.self.query": "int8",
        "pooler.dense": "",
    }
