"""``sparsehooks bench``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, load_plugins, print_json, print_table

if TYPE_CHECKING:
    from sparsehooks.trials import Verdict


def run(
    model: Annotated[str, typer.Argument(help="A folder with a model, or its name on the Hub.")],
    device: Annotated[str, typer.Option(help="Where it shall run, such as cuda.")] = "cpu",
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """Time every backend on every layer, and say which would run it, and why not others."""
    from rich.console import Console

    manager = load_plugins(plugin, no_autoload=no_autoload)
    with Console(stderr=True).status(f"timing {model}"):
        import torch

        from sparsehooks.accelerating import AUTO, TOKENS, judge
        from sparsehooks.errors import SparseHooksError
        from sparsehooks.models import open_model
        from sparsehooks.speed import Speeds, machine

        opened = open_model(model)[0].eval()
        try:
            opened.to(device)
        except (RuntimeError, AssertionError) as error:
            raise SparseHooksError(f"the model cannot go to '{device}': {error}".splitlines()[0]) from error
        verdicts = judge(opened, AUTO, Speeds(), plugins=manager)
        here = machine(torch.device(device))
    if json:
        print_json({"machine": here, "layers": verdicts.to_dict()})
        return
    typer.echo(here)
    print_table(
        ("layer", "shape", "dtype", "sparsity", *(f"{count} tokens" for count in TOKENS)),
        (
            (
                name,
                " x ".join(map(str, verdict.shape)),
                verdict.dtype,
                f"{verdict.sparsity:.1%}",
                *(_cell(verdict, count) for count in TOKENS),
            )
            for name, verdict in verdicts.items()
        ),
        right=("sparsity",),
    )
    reasons = Counter((key, why) for verdict in verdicts.values() for key, why in verdict.reasons.items())
    for (key, why), layers in sorted(reasons.items()):
        typer.echo(f"{key}, {layers} of {len(verdicts)} layers: {why}")


def _cell(verdict: Verdict, tokens: int) -> str:
    """Who runs so many tokens, and how many times as fast as torch."""
    backend = verdict.backend(tokens)
    speed = verdict.speeds[tokens].get(backend)
    return backend if speed is None else f"{backend} {speed:.2f}"
