"""The text of the demo: what lies in ``data/``, or the full STS-B."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

from sparsehooks.errors import SparseHooksError

DATA = Path(__file__).parent / "data"
BATCH, TOKENS = 32, 32
"""Sentences of a batch, and tokens that are kept of each."""

Pair = tuple[str, str, float]
"""Two sentences, and how alike people found them (0 to 5)."""


def load_texts(data: Path | None = None) -> list[str]:
    """Sentences to teach on, without labels: the training pairs and WikiText-2; each once."""
    with gzip.open(DATA / "wikitext-sentences.txt.gz", "rt", encoding="utf-8") as file:
        wikitext = file.read().splitlines()
    pairs = load_pairs("train", data) + ([] if data else load_pairs("dev"))
    return list(dict.fromkeys([sentence for pair in pairs for sentence in pair[:2]] + wikitext))


def load_pairs(split: str, data: Path | None = None) -> list[Pair]:
    """The labelled pairs of a split: image captions and SNLI, or with ``data`` all of STS-B.

    Raises:
        SparseHooksError: if ``data`` is no folder with STS-B.
    """
    if data is None:
        with gzip.open(DATA / "stsb-captions.csv.gz", "rt", encoding="utf-8", newline="") as file:
            rows = [list(row.values())[1:] for row in csv.DictReader(file) if row["split"] == split]
    else:
        path = data / f"{split}.csv.gz"
        if not path.is_file():
            raise SparseHooksError(f"--data {data}: there is no {path.name}; it takes the full STS-B as .csv.gz files")
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    return [(first, second, float(score)) for first, second, score in rows]
