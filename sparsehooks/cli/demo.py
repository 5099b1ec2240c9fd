"""``sparsehooks demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, load_plugins, print_json, print_table


def run(
    out: Annotated[Path, typer.Option(help="Where to save the compressed model.")] = Path("sparsehooks-demo"),
    recipe: Annotated[Path | None, typer.Option(help="Another recipe than the demo's own.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder with the full STS-B (train, dev and test .csv.gz).")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A short run that shows the path, not the quality.")] = False,
    seed: Annotated[int, typer.Option(help="The seed of the order of the batches.")] = 0,
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """Compress all-MiniLM-L6-v2 while it trains, without labels, and compare it with the dense model."""
    from sparsehooks.demo import run_demo

    manager = load_plugins(plugin, no_autoload=no_autoload)
    result = run_demo(out, recipe=recipe, data=data, fast=fast, seed=seed, plugins=manager)
    if json:
        print_json(result.to_dict())
        return
    print_table(("", "dense", "compressed", "ratio"), result.rows(), right=("dense", "compressed", "ratio"))
    typer.echo(f"saved in {out}; open it with: import sparsehooks; AutoModel.from_pretrained({str(out)!r})")
