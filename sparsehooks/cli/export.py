"""``sparsehooks export``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, load_plugins, print_json


def run(
    folder: Annotated[Path, typer.Argument(help="A folder that sparsehooks saved.")],
    format: Annotated[  # noqa: A002
        str, typer.Option(help="The format; 'sparsehooks components exporter' lists them.")
    ],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    option: Annotated[
        list[str], typer.Option("--set", help="An option of the format, such as opset=20.", metavar="KEY=VALUE")
    ] = [],  # noqa: B006
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """Write a saved model in the format of another program."""
    from rich.console import Console

    options = dict(map(_parsed, option))
    manager = load_plugins(plugin, no_autoload=no_autoload)
    with Console(stderr=True).status(f"exporting {folder}"):
        from sparsehooks.artifact.export import export

        said = export(folder, out, {**options, "use": format}, plugins=manager)
    if json:
        print_json({"out": str(out), "format": format, "said": said})
        return
    typer.echo(f"wrote {out}: {said}")


def _parsed(option: str) -> tuple[str, Any]:
    """A key and its value: TOML, or a string without quotes."""
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"'{option}' is not KEY=VALUE", param_hint="--set")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
