"""What the commands share: options, tables and progress bars."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparsehooks.plugins import PluginManager

PluginNames = Annotated[
    list[str],
    typer.Option("-p", "--plugin", help="Load a plugin by name or .py file; no:NAME switches one off.", metavar="NAME"),
]
NoAutoload = Annotated[bool, typer.Option("--no-autoload", help="Load no plugins of installed packages.")]
SaveLevel = Annotated[
    str, typer.Option("--level", help="How much work to put into a smaller file: fast, balanced or small.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
held = ExitStack()
"""What holds until the command ends."""


def load_plugins(names: Sequence[str], *, no_autoload: bool) -> PluginManager:
    """The plugins that the options ask for, for all that the command does; broken ones are named on standard error."""
    from sparsehooks.plugins import PluginManager, installed

    manager = PluginManager(names, autoload=not no_autoload)
    held.enter_context(installed(manager))
    for plugin in manager.broken():
        typer.echo(f"warning: plugin {plugin.describe()} could not be loaded: {plugin.error}", err=True)
    return manager


def print_json(value: Any) -> None:
    """For programs."""
    typer.echo(json.dumps(value, indent=2))


def print_table(columns: Iterable[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """For people; where standard output is no terminal, the table takes the width it needs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console()
    if console.is_terminal:
        console.print(table, markup=False)
        return
    console = Console(width=Console(width=10_000).measure(table).maximum)
    with console.capture() as captured:
        console.print(table, markup=False)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, and the function that moves it: (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def human_bytes(count: float) -> str:
    """``1.2 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
