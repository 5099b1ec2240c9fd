"""``sparsehooks inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsehooks.cli.options import Json, human_bytes, print_json, print_table, progress_bar


def run(folder: Annotated[Path, typer.Argument(help="A folder that sparsehooks saved.")], json: Json = False) -> None:
    """Show what lies in a saved model: each tensor's sparsity, codecs, bytes and bits a weight."""
    from sparsehooks.artifact.folder import inspect

    with progress_bar("reading") as progress:
        found = inspect(folder, progress=progress)
    if json:
        print_json(found.to_dict())
        return
    print_table(
        ("tensor", "shape", "dtype", "sparsity", "positions", "values", "bytes", "bits/weight", "x ideal"),
        (
            (
                row.name,
                " x ".join(map(str, row.shape)),
                row.dtype,
                f"{row.sparsity:.1%}",
                row.positions or "",
                row.values or "",
                f"{row.bytes:,}",
                f"{row.bits_per_weight:.2f}",
                f"{row.over_entropy:.2f}" if row.values and row.over_entropy >= 1 else "",
            )
            for row in found.tensors
        ),
        right=("sparsity", "bytes", "bits/weight", "x ideal"),
    )
    over = found.bytes / max(1, found.entropy_bytes)
    ideal = f", {over:.2f} x what an ideal code needs that knows how often values occur" if over >= 1 else ""
    typer.echo(
        f"{len(found.tensors)} tensors, {found.parameters:,} parameters, {found.sparsity:.1%} zeros, "
        f"{human_bytes(found.bytes)} of {human_bytes(found.dense_bytes)} ({found.ratio:.1%})" + ideal
    )
