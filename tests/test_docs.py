"""What is written is true: the README's code runs, the reference is what the code says, and the house rules hold."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import arguments, labelled, tiny_classifier
from transformers import Trainer

import sparsehooks
from sparsehooks.components import KINDS
from sparsehooks.hookspecs import HOOKS
from sparsehooks.testing import check_component

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def write_files(folder):
    """Blocks whose first line names a file."""
    for _, text in BLOCKS:
        if name := re.match(r"# ([\w.]+\.(?:py|toml))\n", text):
            (folder / name[1]).write_text(text)


def test_the_readme_runs(tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = labelled(16)
    batch = {
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    net = tiny_classifier()
    names = {
        "trainer": Trainer(
            model=tiny_classifier(), args=arguments(tmp_path / "a", max_steps=20), train_dataset=labelled()
        ),
        "other_trainer": Trainer(
            model=tiny_classifier(),
            args=arguments(tmp_path / "b", max_steps=20, label_smoothing_factor=0.1),
            train_dataset=labelled(),
        ),
        "net": net,
        "optimizer": torch.optim.AdamW(net.parameters()),
        "batches": [batch] * 4,
    }
    for language, text in BLOCKS:
        if language == "python" and not text.startswith("# my_"):
            exec(compile(text, "README.md", "exec"), names)
    assert sparsehooks.inspect("small").zeros > 0
    assert sparsehooks.inspect("smaller").bytes < sparsehooks.inspect("small-too").bytes
    for _, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert ((module.weight.reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_the_readmes_plugin_installs_by_entry_point_and_prunes_in_a_trainer(tmp_path):
    write_files(tmp_path)
    criterion = (tmp_path / "my_criterion.py").read_text()
    assert len([line for line in criterion.splitlines() if line.strip()]) <= 10
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([sys.executable, *install, str(tmp_path)], check=True, capture_output=True, timeout=120)
    (tmp_path / "my_criterion.py").unlink()
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from transformers import Trainer
import sparsehooks
from helpers import arguments, expected_zeros, labelled, prune, tiny_classifier, zeros
trainer = Trainer(model=tiny_classifier(), args=arguments({str(tmp_path / "run")!r}), train_dataset=labelled())
trainer.add_callback(sparsehooks.CompressionCallback(prune(prune="distance")))
trainer.train()
assert zeros(trainer.model) == expected_zeros(trainer.model, 0.8) > 0
record, _ = sparsehooks.PluginManager().catalog.resolve("criterion", "distance")
print(record.plugin.describe())
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=180)
    assert done.stdout.splitlines()[-1] == "'my-criterion' (my-criterion 1.0)", done.stderr


def test_the_reference_is_what_the_code_says():
    specification = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    for page, make in generate.PAGES.items():
        assert (ROOT / "docs" / page).read_text(encoding="utf-8") == make(), f"run python docs/generate.py ({page})"
    hooks, components = generate.hooks(), generate.components()
    assert all(f"## `{generate.signature(name, function)}`" in hooks for name, function in HOOKS.items())
    items = [line for line in (hooks + components).splitlines() if line.startswith("- ")]
    assert all(re.match(r"- (returns |`?\w+`?: )", item) for item in items)
    assert "Returns:\n\n- " not in components
    text = re.sub(r"^```.*?^```", "", components, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^    ", text, re.MULTILINE)
    assert all(f"## {kind}: `sparsehooks.{contract.__name__}`" in components for kind, contract in KINDS.items())
    assert all(f"\n- {field.name}: " in components for field in dataclasses.fields(sparsehooks.Support))


def test_the_backend_of_the_reference_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(# my_backend.py\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_backend.py").write_text(block)
    plugins = [str(tmp_path / "my_backend.py")]
    check_component(sparsehooks.PluginManager(plugins).catalog, "backend", "rows")
    layer = torch.nn.Linear(8, 4).eval()
    torch.nn.init.zeros_(layer.weight[:3])
    model = torch.nn.Sequential(layer)
    expected = model(torch.ones(2, 8))
    (verdict,) = sparsehooks.accelerate_model(model, "rows", plugins=plugins).values()
    assert [lane.backend for lane in verdict.lanes] == ["rows"]
    assert torch.allclose(model(torch.ones(2, 8)), expected)


@pytest.mark.parametrize("path", sorted((ROOT / "sparsehooks" / "builtin").rglob("*.py")), ids=lambda path: path.name)
def test_built_ins_import_public_names_and_their_siblings_only(path):
    siblings = {".".join(other.relative_to(ROOT).with_suffix("").parts) for other in path.parent.glob("[!_]*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("sparsehooks") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("sparsehooks")):
            if node.module in siblings and not node.level:
                continue
            assert node.module == "sparsehooks"
            assert {alias.name for alias in node.names} <= set(sparsehooks.__all__)


def test_the_public_names_exist_and_are_what_the_type_checker_sees():
    for name in sparsehooks.__all__:
        assert getattr(sparsehooks, name) is not None
    tree = ast.parse((ROOT / "sparsehooks" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body for alias in node.names}
    assert seen | {"__version__"} == set(sparsehooks.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sparsehooks.nothing  # noqa: B018


def test_every_kind_has_a_component_that_the_conformance_suites_run_over():
    from sparsehooks.plugins import installed_catalog

    assert {record.component.kind for record in installed_catalog().records()} == set(KINDS)
