"""Exporting: the function, the command and the built-in exporter; the other ones are tested in plugins/."""

import dataclasses
import json

import pytest
import torch
from helpers import tiny_classifier
from transformers import AutoModelForSequenceClassification

import sparsehooks
from sparsehooks import ArtifactError, Component, Exporter, PluginError, PluginManager, RecipeError, hookimpl
from sparsehooks.cli import main


@dataclasses.dataclass(frozen=True)
class Options:
    lines: int = 1


class Names(Exporter):
    """The names of the tensors."""

    Config = Options
    config: Options
    files = ("names.txt",)

    def export(self, folder, out):
        with sparsehooks.safe_open(folder) as file:
            names = file.keys()
        (out / "names.txt").write_text("\n".join(names[: self.config.lines]))
        if self.config.lines == 0:
            raise ArtifactError("there is nothing to write; use one line or more")
        if self.config.lines < 0:
            raise ValueError("a bug")
        return f"{self.config.lines} names"


class Plugin:
    @hookimpl
    def register_components(self, registry):
        registry.add(Component("exporter", "names", Names, "names", shorthand=r"names-(?P<lines>\d+)"))


@pytest.fixture
def saved(tmp_path):
    return sparsehooks.save_pretrained(tiny_classifier(), tmp_path / "saved") or tmp_path / "saved"


def test_an_exporter_writes_a_folder_and_says_what(saved, tmp_path):
    out = tmp_path / "a" / "out"
    assert sparsehooks.export(saved, out, "names", plugins=[Plugin()]) == "1 names"
    assert [path.name for path in out.iterdir()] == ["names.txt"]
    manager = PluginManager([Plugin()])
    assert sparsehooks.export(saved, tmp_path / "2", {"use": "names", "lines": 2}, plugins=manager) == "2 names"
    assert sparsehooks.export(saved, tmp_path / "3", "names-3", plugins=manager) == "3 names"


def test_the_built_in_one_is_dense(saved, tmp_path):
    (saved / "1_Pooling").mkdir()
    (saved / "1_Pooling" / "config.json").write_text("{}")
    sparsehooks.export(saved, tmp_path / "out", "dense")
    sparsehooks.decompress(saved, tmp_path / "decompressed")
    for path in (tmp_path / "decompressed").rglob("*"):
        other = tmp_path / "out" / path.relative_to(tmp_path / "decompressed")
        assert path.is_dir() or other.read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "out").rglob("*"))) == len(list((tmp_path / "decompressed").rglob("*")))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in tiny_classifier().state_dict().items())


def test_nothing_is_left_of_a_failure(saved, tmp_path):
    manager = PluginManager([Plugin()])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="nothing to write") as refused:
        sparsehooks.export(saved, tmp_path / "out", "names-0", plugins=manager)
    assert not hasattr(refused.value, "__notes__")  # about the model, not about the plugin
    with pytest.raises(ValueError, match="a bug") as failed:
        sparsehooks.export(saved, tmp_path / "out", {"use": "names", "lines": -1}, plugins=manager)
    assert "raised by plugin 'Plugin'" in failed.value.__notes__[0]
    assert "exporter 'names'" in failed.value.__notes__[0]
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_wrong_is_named(saved, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        PluginError, match=r"no plugin offers the exporter 'onnx'; .*'pip install sparsehooks-onnx' adds"
    ):
        sparsehooks.export(saved, out, "onnx", plugins=PluginManager(autoload=False))
    with pytest.raises(
        PluginError, match="'gguf'; known: dense; more in sparsehooks-compressed-tensors and sparsehooks"
    ):
        sparsehooks.export(saved, out, "gguf", plugins=PluginManager(autoload=False))
    with pytest.raises(PluginError, match=r"is offered by .* and .*switch one off"):
        sparsehooks.export(saved, out, "names", plugins=[Plugin(), type("Other", (Plugin,), {})()])
    with pytest.raises(RecipeError, match="format 'dense': unknown key 'lines'"):
        sparsehooks.export(saved, out, {"use": "dense", "lines": 2})
    tiny_classifier().save_pretrained(tmp_path / "dense")
    with pytest.raises(ArtifactError, match="was not saved by sparsehooks"):
        sparsehooks.export(tmp_path / "dense", out, "dense")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="already holds other files; choose a new folder"):
        sparsehooks.export(saved, tmp_path / "full", "dense")
    assert not out.exists()


PLUGIN = """
from test_export import Names
from sparsehooks import Component, hookimpl

@hookimpl
def register_components(registry):
    registry.add(Component("exporter", "names", Names, "names"))
"""


def test_the_command(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(PLUGIN)

    def command(*arguments):
        line = ["sparsehooks", "export", saved, "-p", tmp_path / "mine.py", *arguments]
        monkeypatch.setattr("sys.argv", list(map(str, line)))
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    code, out, _ = command("--format", "names", "--set", "lines=4", "--out", tmp_path / "one")
    assert (code, out) == (0, f"wrote {tmp_path / 'one'}: 4 names\n")
    code, out, _ = command("--format", "names", "--out", tmp_path / "two", "--json")
    assert json.loads(out) == {"out": str(tmp_path / "two"), "format": "names", "said": "1 names"}
    code, _, err = command("--format", "names", "--set", "lines=some", "--out", tmp_path / "three")
    assert (code, err) == (2, "error: format 'names'.lines: expected a whole number, got 'some'\n")
    code, _, err = command("--format", "names", "--set", "lines", "--out", tmp_path / "three")
    assert code == 2
    assert "'lines' is not KEY=VALUE" in err
    code, _, err = command("--format", "name", "--out", tmp_path / "three")
    assert code == 2
    assert err.startswith("error: no plugin offers the exporter 'name'; did you mean 'names'?")
