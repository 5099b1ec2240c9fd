"""``sparsehooks components``."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, load_plugins, print_json, print_table


def run(
    kind: Annotated[str | None, typer.Argument(help="Only this kind.")] = None,
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """List the components that recipes can name, by kind."""
    from sparsehooks.components import KINDS
    from sparsehooks.errors import PluginError, suggest

    if kind is not None and kind not in KINDS:
        raise PluginError(f"there is no kind '{kind}'{suggest(kind, KINDS)}")
    records = load_plugins(plugin, no_autoload=no_autoload).catalog.records(kind)
    rows = [
        {
            "kind": record.component.kind,
            "name": record.component.name,
            "summary": record.component.summary,
            "plugin": record.plugin.name,
        }
        for record in records
    ]
    if json:
        print_json(rows)
    else:
        print_table(("kind", "name", "summary", "plugin"), (tuple(row.values()) for row in rows))
