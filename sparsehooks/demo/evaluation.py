"""What the demo measures, in a process of its own."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import sparsehooks  # noqa: F401 - opens the compressed model
from sparsehooks.demo.data import BATCH, Pair, load_pairs

ROUNDS = 11


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """The normalised mean of the last hidden states over real tokens; shape (sentences, 384)."""
    unique = sorted(set(sentences), key=len)
    vectors: dict[str, Tensor] = {}
    for start in range(0, len(unique), 2 * BATCH):
        chunk = unique[start : start + 2 * BATCH]
        batch = tokenizer(chunk, padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        states = model(**batch).last_hidden_state
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        vectors.update(zip(chunk, torch.nn.functional.normalize(means, dim=-1), strict=True))
    return torch.stack([vectors[sentence] for sentence in sentences])


def spearman(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """The Spearman correlation of cosine and human score, times 100."""
    from scipy.stats import spearmanr

    first = embed(model, tokenizer, [pair[0] for pair in pairs])
    second = embed(model, tokenizer, [pair[1] for pair in pairs])
    cosine = (first * second).sum(dim=-1)
    return 100 * float(spearmanr(cosine.numpy(), [pair[2] for pair in pairs]).statistic)


@torch.inference_mode()
def latencies(models: Sequence[Any], tokenizer: Any, sentences: Sequence[str]) -> list[float]:
    """Median milliseconds of a forward of the sentences, the models in turn."""
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    times: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS + 1):
        for model, own in zip(models, times, strict=True):
            began = time.perf_counter()
            model(**batch)
            own.append(1000 * (time.perf_counter() - began))
    return [statistics.median(own[1:]) for own in times]


def main(dense: str, compressed: str, data: str | None = None) -> None:
    """Print one line of JSON."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(dense)
    models = [AutoModel.from_pretrained(folder).eval() for folder in (dense, compressed)]
    pairs = load_pairs("test", Path(data) if data else None)
    result = {
        "pairs": len(pairs),
        "spearman": [spearman(model, tokenizer, pairs) for model in models],
        "latency": latencies(models, tokenizer, [pair[0] for pair in pairs[:BATCH]]),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
