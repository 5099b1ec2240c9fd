"""Write the reference pages from the code: ``python docs/generate.py``; a test compares them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

from sparsehooks.components import KINDS, ComponentBase, Need, Support
from sparsehooks.hookspecs import HOOKS
from sparsehooks.plugins import PluginManager
from sparsehooks.views import Batch, Layout, WeightView

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py; change the docstrings instead. -->"


def signature(name, function):
    """The signature as one writes it."""
    return f"{name}{inspect.signature(function)}".replace("'", "")


def hooks():
    """Every hook, in the order of a run."""
    parts = ["# Hooks", NOTE, "Implement a hook with `@sparsehooks.hookimpl`; take only the arguments you need."]
    for name, function in HOOKS.items():
        parts += [f"## `{signature(name, function)}`", _fields(inspect.getdoc(function))]
    return "\n\n".join(parts) + "\n"


def components():
    """Every kind: its contract, and what is built in."""
    records = PluginManager(autoload=False).catalog.records()
    parts = ["# Components", NOTE, "A component is a class of one of these kinds, offered in `register_components`."]
    parts += _described("Every kind", ComponentBase)
    rows = [f"| `Need.{name}` | {words} |" for name, words in needs()]
    parts.append("\n".join(["| in `needs` | what the session collects then |", "|---|---|", *rows]))
    for seen in (WeightView, Batch, Layout):
        parts += _described("What components see", seen)
    for kind, contract in KINDS.items():
        parts += _described(kind, contract)
        built_in = [record for record in records if record.component.kind == kind]
        rows = [f"| `{r.component.name}` | {r.component.summary} | {_options(r.load().Config)} |" for r in built_in]
        parts.append("\n".join(["| built in | what it does | options |", "|---|---|---|", *rows]))
        if kind == "backend":
            parts += _described("What a backend answers", Support)
            example = (HERE / "my_backend.py").read_text(encoding="utf-8")
            parts += ["## A backend in full", f"```python\n{example}```"]
    return "\n\n".join(parts) + "\n"


def needs():
    """The name of each need, and what its line in the source says."""
    lines = ast.parse(inspect.getsource(Need)).body[0].body[1:]
    for name, words in zip(lines[::2], lines[1::2], strict=True):
        yield name.targets[0].id, " ".join(words.value.value.replace("``", "`").split())


def _described(title, cls):
    """A class and its public methods."""
    parts = [f"## {title}: `sparsehooks.{cls.__name__}`", _fields(inspect.getdoc(cls))]
    for name, function in vars(cls).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            required = " (required)" if name in getattr(cls, "__abstractmethods__", ()) else ""
            parts += [f"### `{signature(name, function)}`{required}", _fields(inspect.getdoc(function))]
    return parts


def _options(config):
    fields = [f"`{field.name}: {field.type} = {field.default!r}`" for field in dataclasses.fields(config)]
    return ", ".join(fields).replace("|", "\\|") or "-"


def _fields(text):
    """A docstring: arguments, attributes and errors as a list, what is returned as a paragraph."""
    lines, section = [], None
    for line in text.replace("``", "`").splitlines():
        if line.startswith(":param "):
            name, _, words = line.removeprefix(":param ").partition(": ")
            lines.append(f"- `{name}`: {words}")
        elif line.startswith(":return: "):
            lines.append(f"- returns {line.removeprefix(':return: ')}")
        elif line in ("Args:", "Attributes:", "Returns:", "Raises:"):
            section = line
            lines.append(f"{line}\n")
        elif line.startswith("     "):
            lines.append(f"  {line.strip()}")
        elif line.startswith("    "):
            lines.append(line.strip() if section == "Returns:" else f"- {line.strip()}")
        else:
            lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip()


PAGES = {"hooks.md": hooks, "components.md": components}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
