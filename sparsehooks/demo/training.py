"""The training of the demo: a plain Trainer with the callback on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from sparsehooks.demo.data import BATCH, TOKENS
from sparsehooks.loops.trainer import CompressionCallback
from sparsehooks.models import copy_companions
from sparsehooks.plugins import PluginManager
from sparsehooks.recipe import Recipe


def train(
    dense: Path,
    folder: Path,
    recipe: Recipe,
    manager: PluginManager,
    texts: Sequence[str],
    scratch: Path,
    steps: int,
    learning_rate: float,
    seed: int,
    moved: Callable[[str], None],
) -> float:
    """Compress the dense model on the texts and save it.

    Args:
        dense: the folder of the model.
        folder: where to save the compressed one.
        recipe: what to do to it.
        manager: the plugins.
        texts: sentences without labels.
        scratch: the Trainer's own output folder.
        steps: optimizer steps.
        learning_rate: the peak of the linear schedule.
        seed: of the order of the batches.
        moved: called after each step with a line for the progress bar.

    Returns:
        the sparsity of the weights that the recipe pruned.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModel.from_pretrained(dense)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the student shall match its teacher, not itself with noise
    model.embeddings.word_embeddings.requires_grad_(requires_grad=False)  # half of the weights, a third of the time
    encoded = tokenizer(list(texts), truncation=True, max_length=TOKENS)
    callback = CompressionCallback(recipe, plugins=manager)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(scratch),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="group_by_length",
            learning_rate=learning_rate,
            seed=seed,
            warmup_steps=max(1, steps // 20),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=10,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=[{key: values[index] for key, values in encoded.items()} for index in range(len(texts))],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[_Progress(callback, moved)],
    )
    trainer.add_callback(callback)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    copy_companions(dense, folder)
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    return float(logged[-1]) if logged else 0.0


class _Progress(TrainerCallback):
    """Moves the progress bar."""

    def __init__(self, callback: CompressionCallback, moved: Callable[[str], None]) -> None:
        self._callback = callback
        self._moved = moved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._callback.session
        sparsity = "" if session is None else f", {session.sparsity:.1%} zeros"
        self._moved(f"training, step {state.global_step} of {state.max_steps}{sparsity}")
