"""The command line: one file a command."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from sparsehooks import __version__
from sparsehooks.cli import (
    bench,
    check,
    components,
    compress,
    convert,
    decompress,
    demo,
    export,
    hooks,
    inspect,
    plugins,
    recipes,
    verify,
)
from sparsehooks.cli.options import held
from sparsehooks.errors import PlanError, SparseHooksError

app = typer.Typer(
    name="sparsehooks",
    help="Make models smaller and faster while they train.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (
    demo,
    compress,
    convert,
    inspect,
    verify,
    decompress,
    export,
    bench,
    check,
    recipes,
    plugins,
    hooks,
    components,
):
    app.command(module.__name__.rpartition(".")[2])(module.run)


@app.callback()
def program(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Make models smaller and faster while they train."""
    if version:
        typer.echo(f"sparsehooks {__version__}")
        raise typer.Exit


def main() -> None:
    """The console script: errors of ours and warnings are one line each on standard error; exit status 2 for errors."""
    try:
        with held, warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]  # it takes what it prints, and more
            app()
    except SparseHooksError as error:
        problems = error.problems if isinstance(error, PlanError) else (str(error),)
        for problem in problems:
            typer.echo(f"error: {problem}", err=True)
        for note in getattr(error, "__notes__", ()):
            typer.echo(note, err=True)
        sys.exit(2)


def _show_warning(message: Warning | str, *_: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
