"""``sparsehooks decompress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsehooks.cli.options import Json, print_json, progress_bar


def run(
    folder: Annotated[Path, typer.Argument(help="A folder that sparsehooks saved.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    json: Json = False,
) -> None:
    """Write a saved model as an ordinary dense one, for programs that do not know sparsehooks."""
    from sparsehooks.artifact.folder import decompress

    with progress_bar("decompressing") as progress:
        decompress(folder, out, progress=progress)
    if json:
        print_json({"out": str(out)})
        return
    config = out / "config.json"
    cut = config.is_file() and "quantization_config" in config.read_text(encoding="utf-8")
    what = "dense; its shape or its activations still need sparsehooks to open" if cut else "an ordinary dense model"
    typer.echo(f"wrote {out}, {what}")
