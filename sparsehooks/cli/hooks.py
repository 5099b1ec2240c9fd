"""``sparsehooks hooks``."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, load_plugins, print_json, print_table


def run(
    name: Annotated[str | None, typer.Argument(help="One hook, with its signature and description.")] = None,
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """List the hooks in the order in which a run calls them, or describe one."""
    from sparsehooks.errors import PluginError, suggest
    from sparsehooks.hookspecs import HOOKS

    if name is not None and name not in HOOKS:
        raise PluginError(f"there is no hook '{name}'{suggest(name, HOOKS)}")
    plugins = load_plugins(plugin, no_autoload=no_autoload).plugins
    rows: list[dict[str, Any]] = [
        {
            "hook": hook,
            "signature": f"{hook}{inspect.signature(function)}".replace("'", ""),
            "summary": (inspect.getdoc(function) or "").splitlines()[0],
            "description": inspect.getdoc(function),
            "plugins": [found.name for found in plugins if hook in found.hooks],
        }
        for hook, function in HOOKS.items()
        if name in (None, hook)
    ]
    if json:
        print_json(rows)
    elif name is not None:
        typer.echo(f"{rows[0]['signature']}\n\n{rows[0]['description']}")
        typer.echo(f"\nimplemented by: {', '.join(rows[0]['plugins']) or 'no plugin'}")
    else:
        print_table(
            ("hook", "called when", "plugins"), ((r["hook"], r["summary"], ", ".join(r["plugins"])) for r in rows)
        )
