"""``sparsehooks check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, load_plugins, print_json, print_table


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe.")],
    model: Annotated[
        str | None, typer.Option(help="A folder or a Hub name: fit the recipe to it, without weights.")
    ] = None,
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """Check a recipe: its keys, the components it names and, with --model, the weights it means."""
    from sparsehooks.plan import Plan
    from sparsehooks.recipe import Recipe

    manager = load_plugins(plugin, no_autoload=no_autoload)
    loaded = Recipe.load(recipe, manager)
    skeleton = None
    if model is not None:
        from sparsehooks.models import open_skeleton

        skeleton = open_skeleton(model)
    plan = Plan.build(loaded, manager, skeleton)
    rows: list[dict[str, Any]] = [
        {
            "stage": stage.label,
            "components": {key: bound.record.component.name for key, bound in stage.components.items()},
            "targets": [target.parameter for target in stage.targets],
            "weights": sum(target.size for target in stage.targets),
            "notes": list(stage.notes),
        }
        for stage in plan.stages
    ]
    if json:
        print_json(rows)
        return
    print_table(
        ("stage", "components", "tensors", "weights"),
        (
            (
                row["stage"],
                ", ".join(f"{key} {name}" for key, name in row["components"].items()),
                len(row["targets"]) or "-",
                f"{row['weights']:,}" if row["targets"] else "-",
            )
            for row in rows
        ),
        right=("tensors", "weights"),
    )
    for row in rows:
        for note in row["notes"]:
            typer.echo(f"note: {row['stage']}: {note}")
    typer.echo("the recipe fits the model" if model else "the recipe is valid")
