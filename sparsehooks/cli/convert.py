"""``sparsehooks convert``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sparsehooks.cli.options import Json, SaveLevel, human_bytes, print_json, progress_bar

if TYPE_CHECKING:
    from sparsehooks.components import Level


def run(
    source: Annotated[
        Path, typer.Argument(help="A model folder, or one .safetensors, .bin, .pt or .pth file; an artifact too.")
    ],
    out: Annotated[Path, typer.Option(help="A new or empty folder, or an earlier artifact to replace.")],
    level: SaveLevel = "balanced",
    signed_zeros: Annotated[bool, typer.Option("--signed-zeros", help="Keep -0.0 apart from +0.0.")] = False,
    json: Json = False,
) -> None:
    """Store a model that is there already in the sparse form; AutoModel.from_pretrained opens it with equal weights."""
    from sparsehooks.artifact.convert import convert
    from sparsehooks.artifact.folder import inspect

    began = time.monotonic()
    with progress_bar("converting") as progress:
        convert(source, out, level=cast("Level", level), signed_zeros=signed_zeros, progress=progress)
    seconds = time.monotonic() - began
    found = inspect(out)
    if json:
        sizes = {"bytes": found.bytes, "dense_bytes": found.dense_bytes, "sparsity": found.sparsity}
        print_json({"out": str(out), **sizes, "seconds": seconds})
        return
    typer.echo(
        f"{out}: {human_bytes(found.bytes)} of {human_bytes(found.dense_bytes)} ({found.ratio:.1%}), "
        f"{found.sparsity:.1%} zeros, {seconds:.1f} s; look inside with: sparsehooks inspect {out}"
    )
