"""``sparsehooks verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsehooks.cli.options import Json, human_bytes, print_json, progress_bar


def run(folder: Annotated[Path, typer.Argument(help="A folder that sparsehooks saved.")], json: Json = False) -> None:
    """Check every checksum of a saved model and decode all of it."""
    from sparsehooks.artifact.folder import verify

    with progress_bar("verifying") as progress:
        found = verify(folder, progress=progress)
    if json:
        print_json({"ok": True, "tensors": len(found.tensors), "bytes": found.bytes})
    else:
        typer.echo(f"{folder}: {len(found.tensors)} tensors in {human_bytes(found.bytes)} are whole")
