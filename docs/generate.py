"""Write the reference pages from the code: ``python docs/generate.py``; a test compares them."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from pathlib import Path

from sparsehooks.components import KINDS
from sparsehooks.hookspecs import HOOKS
from sparsehooks.plugins import PluginManager

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
    for kind, contract in KINDS.items():
        parts += [f"## {kind}: `sparsehooks.{contract.__name__}`", inspect.getdoc(contract).replace("``", "`")]
        for name, function in vars(contract).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                required = " (required)" if name in contract.__abstractmethods__ else ""
                parts += [f"### `{signature(name, function)}`{required}", _fields(inspect.getdoc(function))]
        built_in = [record for record in records if record.component.kind == kind]
        rows = [f"| `{r.component.name}` | {r.component.summary} | {_options(r.load().Config)} |" for r in built_in]
        parts.append("\n".join(["| built in | what it does | options |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _options(config):
    fields = [f"`{field.name}: {field.type} = {field.default!r}`" for field in dataclasses.fields(config)]
    return ", ".join(fields).replace("|", "\\|") or "-"


def _fields(text):
    lines = []
    for line in text.replace("``", "`").splitlines():
        if line.startswith(":param "):
            name, _, words = line.removeprefix(":param ").partition(": ")
            lines.append(f"- `{name}`: {words}")
        elif line.startswith(":return: "):
            lines.append(f"- returns {line.removeprefix(':return: ')}")
        elif line in ("Args:", "Returns:", "Raises:"):
            lines.append(f"{line}\n")
        elif line.startswith("    "):
            lines.append(f"- {line.strip()}" if not line.startswith("     ") else f"  {line.strip()}")
        else:
            lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip()


PAGES = {"hooks.md": hooks, "components.md": components}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
