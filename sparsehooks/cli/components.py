"""``sparsehooks components``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, load_plugins, print_json, print_table

if TYPE_CHECKING:
    from sparsehooks.catalog import Record


def run(
    kind: Annotated[str | None, typer.Argument(help="Only this kind.")] = None,
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """List the components of a kind, or of all; of kernels also which run here, and why others do not."""
    from sparsehooks.components import KINDS
    from sparsehooks.errors import PluginError, suggest

    if kind is not None and kind not in KINDS:
        raise PluginError(f"there is no kind '{kind}'{suggest(kind, KINDS)}")
    catalog = load_plugins(plugin, no_autoload=no_autoload).catalog
    rows = [
        {
            "kind": record.component.kind,
            "name": record.component.name,
            "summary": record.component.summary,
            "plugin": record.plugin.name,
            **more,
        }
        for record, more in (_kernels() if kind == "kernels" else ((record, {}) for record in catalog.records(kind)))
    ]
    if json:
        print_json(rows)
    else:
        columns = ("kind", "name", "summary", "plugin", *(("status",) if kind == "kernels" else ()))
        print_table(columns, (tuple(row.values()) for row in rows))


def _kernels() -> Iterator[tuple[Record, dict[str, str]]]:
    from sparsehooks.computing import statuses

    return ((record, {"status": status}) for record, status in statuses())
