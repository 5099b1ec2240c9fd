"""``sparsehooks compress``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, SaveLevel, human_bytes, load_plugins, print_json

if TYPE_CHECKING:
    from sparsehooks.components import Level


def run(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the Hub.")],
    recipe: Annotated[Path, typer.Option(help="The recipe; schedules do not apply, every stage acts at once.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder, or an earlier artifact to replace.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Texts, one a line, for recipes that look at what the layers see.")
    ] = None,
    level: SaveLevel = "balanced",
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """Compress a model without training and save it; AutoModel.from_pretrained opens the result."""
    from rich.console import Console

    from sparsehooks.recipe import Recipe

    manager = load_plugins(plugin, no_autoload=no_autoload)
    loaded = Recipe.load(recipe, manager)
    with Console(stderr=True).status(f"compressing {model}"):
        import transformers

        from sparsehooks.artifact.folder import inspect
        from sparsehooks.loops.posttrain import compress
        from sparsehooks.models import text_batches

        transformers.utils.logging.disable_progress_bar()
        batches = None if calibration is None else text_batches(model, calibration)
        compress(model, loaded, out, calibration=batches, plugins=manager, level=cast("Level", level))
        found = inspect(out)
    if json:
        print_json(
            {"out": str(out), "bytes": found.bytes, "dense_bytes": found.dense_bytes, "sparsity": found.sparsity}
        )
        return
    share = found.bytes / found.dense_bytes
    typer.echo(
        f"{out}: {human_bytes(found.bytes)} of {human_bytes(found.dense_bytes)} ({share:.1%}), "
        f"{found.sparsity:.1%} zeros; look inside with: sparsehooks inspect {out}"
    )
