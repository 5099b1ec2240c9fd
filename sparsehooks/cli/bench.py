"""``sparsehooks bench``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from sparsehooks.cli.options import Json, NoAutoload, PluginNames, load_plugins, print_json, print_table

if TYPE_CHECKING:
    from torch import nn

    from sparsehooks.accelerating import Verdicts
    from sparsehooks.trials import Verdict


def run(
    model: Annotated[str, typer.Argument(help="A folder with a model, or its name on the Hub.")],
    device: Annotated[str, typer.Option(help="Where it shall run, such as cuda.")] = "cpu",
    targets: Annotated[list[str], typer.Option(help="Which layers, as in a recipe.", metavar="PATTERN")] = ["Linear"],  # noqa: B006
    exclude: Annotated[list[str], typer.Option(help="Which of them not.", metavar="PATTERN")] = [],  # noqa: B006
    plugin: PluginNames = [],  # noqa: B006
    no_autoload: NoAutoload = False,
    json: Json = False,
) -> None:
    """Time every backend on every layer, and say which would run it, and why not others.

    Everything is timed anew, and remembered in sparsehooks/speeds.json in the user's cache folder ($XDG_CACHE_HOME or
    ~/.cache) for accelerate_model; delete that to have it measure again.
    """
    from rich.console import Console

    manager = load_plugins(plugin, no_autoload=no_autoload)
    with Console(stderr=True).status(f"timing {model}"):
        import torch

        from sparsehooks.accelerating import AUTO, TOKENS, judge
        from sparsehooks.errors import SparseHooksError
        from sparsehooks.models import open_model
        from sparsehooks.speed import Speeds, machine
        from sparsehooks.targets import idle

        opened = open_model(model)[0].eval()
        try:
            opened.to(device)
        except (RuntimeError, AssertionError) as error:
            raise SparseHooksError(f"the model cannot go to '{device}': {error}".splitlines()[0]) from error
        verdicts = judge(opened, AUTO, Speeds(), targets=targets, exclude=exclude, plugins=manager)
        here = machine(torch.device(device))
    for note in idle(opened, exclude):
        typer.echo(f"warning: {note}", err=True)
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
    for use, layers in sorted(Counter(verdict.input for verdict in verdicts.values() if verdict.input).items()):
        typer.echo(
            f"{layers} of {len(verdicts)} layers: beside torch's layer with the model's {use} inputs, "
            "which torch simulates and is slower than F.linear"
        )
    reasons = Counter((key, why) for verdict in verdicts.values() for key, why in verdict.reasons.items())
    for (key, why), layers in sorted(reasons.items()):
        typer.echo(f"{key}, {layers} of {len(verdicts)} layers: {why}")
    if others := _others(opened, verdicts):
        typer.echo(f"not tried, so dense: {others}")


def _others(model: nn.Module, verdicts: Verdicts) -> str:
    """What else multiplies by a weight matrix: how many, by class."""
    from torch import nn

    from sparsehooks.accelerated import bare

    no_products = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
    matrices = (
        (name, module)
        for name, module in model.named_modules()
        if (weight := module._parameters.get("weight")) is not None
        and weight.dim() > 1
        and not isinstance(module, no_products)
    )
    counts = Counter(type(bare(module)).__name__ for name, module in matrices if name not in verdicts)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _cell(verdict: Verdict, tokens: int) -> str:
    """Who runs so many tokens, and how many times as fast as torch."""
    backend = verdict.backend(tokens)
    speed = verdict.speeds[tokens].get(backend)
    return backend if speed is None else f"{backend} {speed:.2f}"
