"""``sparsehooks recipes``."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsehooks.cli.options import Json, print_json, print_table


def run(
    name: Annotated[str | None, typer.Argument(help="Print this one, to start a recipe of your own.")] = None,
    json: Json = False,
) -> None:
    """List the recipes that have a name, or print one as TOML."""
    from sparsehooks.errors import RecipeError, suggest
    from sparsehooks.recipe import named_recipes

    recipes = named_recipes()
    if name is not None:
        if name not in recipes:
            raise RecipeError(f"there is no recipe '{name}'{suggest(name, recipes)}")
        typer.echo(recipes[name].read_text(encoding="utf-8").rstrip())
        return
    rows = [
        {"name": key, "what": path.read_text(encoding="utf-8").splitlines()[0][2:]} for key, path in recipes.items()
    ]
    if json:
        print_json(rows)
    else:
        print_table(("name", "what"), (tuple(row.values()) for row in rows))
