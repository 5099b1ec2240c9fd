"""The packages in plugins/ are what third parties would publish: complete, typed, and built on public names only."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sparsehooks

FOLDER = Path(__file__).parent.parent / "plugins"
PLUGINS = sorted(path.parent for path in FOLDER.glob("*/pyproject.toml"))
LOOPS = {"sparsehooks-lightning"}
"""What drives a session instead of being called by one: there is nothing to find."""
each_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)


def run(*command, **environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SPARSEHOOKS", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def project(plugin):
    return tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))


def entry_points(plugin):
    return project(plugin)["project"].get("entry-points", {}).get("sparsehooks", {})


def test_every_folder_is_a_package():
    folders = {path for path in FOLDER.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert folders == set(PLUGINS) != set()


@each_plugin
def test_a_plugin_has_what_a_package_needs(plugin):
    metadata = project(plugin)["project"]
    assert metadata["name"] == plugin.name
    assert metadata["license"] == "Apache-2.0"
    assert len(entry_points(plugin)) == (0 if plugin.name in LOOPS else 1)
    assert "sparsehooks>=0.1,<0.2" in metadata["dependencies"]
    (module,) = (plugin / "src").glob("*/__init__.py")
    assert module.parent.name == plugin.name.replace("-", "_")
    assert (module.parent / "py.typed").is_file()
    assert (plugin / "LICENSE").read_bytes() == (FOLDER.parent / "LICENSE").read_bytes()
    assert len((plugin / "README.md").read_text(encoding="utf-8").splitlines()) < 60
    assert list((plugin / "tests").glob("test_*.py"))


@each_plugin
def test_a_plugin_uses_public_names_only(plugin):
    paths = sorted((plugin / "src").rglob("*.py"))
    assert paths
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        aliases = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    if name.name.split(".")[0] == "sparsehooks":
                        assert name.name == "sparsehooks", f"{path}:{node.lineno}: import from sparsehooks itself"
                        aliases.add(name.asname or name.name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsehooks":
                assert node.module == "sparsehooks", f"{path}:{node.lineno}: import from sparsehooks itself"
                for name in node.names:
                    assert name.name in sparsehooks.__all__, f"{path}:{node.lineno}: {name.name} is not public"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                assert node.attr in sparsehooks.__all__, f"{path}:{node.lineno}: {node.attr} is not public"


@pytest.mark.parametrize("plugin", [path for path in PLUGINS if entry_points(path)], ids=lambda path: path.name)
def test_an_installed_plugin_is_found_by_its_entry_point(plugin, tmp_path):
    site = tmp_path / "site"
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", site, plugin)
    code = (
        "import json, sys\n"
        "from sparsehooks import PluginManager\n"
        "plugins = [vars(p) | dict(status=p.status, hooks=p.hooks, module=None) for p in PluginManager().plugins]\n"
        "print(json.dumps([plugins, [name for name in ('torch', 'transformers') if name in sys.modules]]))"
    )
    plugins, imported = json.loads(run("-W", "error", "-c", code, PYTHONPATH=str(site)))
    metadata = project(plugin)["project"]
    (name,) = entry_points(plugin)
    (found,) = [entry for entry in plugins if entry["distribution"] == plugin.name]
    assert (found["name"], found["source"], found["status"]) == (name, "entry point", "ok")
    assert found["version"] == metadata["version"]
    assert found["hooks"]
    assert imported == []


@each_plugin
def test_the_tests_of_a_plugin_pass(plugin):
    for requirement in project(plugin)["project"]["dependencies"]:
        name = re.match(r"[\w.-]+", requirement).group().replace("-", "_")
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", plugin / "tests")
    assert " passed" in output
