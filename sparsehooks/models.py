"""Models by name: folders and Hub names, with or without their weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from sparsehooks.accelerating import restore_model
from sparsehooks.errors import SparseHooksError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".index.json")
"""How the names of weight files end."""


def open_model(name: str | Path) -> tuple[PreTrainedModel, Path]:
    """The model of a folder or a Hub name, in the class that its config names, and the folder of its files.

    Raises:
        SparseHooksError: if there is no such model.
    """
    with _naming(name):
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(name), ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx"]))
        model = architecture_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
        restore_model(model)  # it is opened to be worked on, not to run
        return model, folder


def open_skeleton(name: str | Path) -> PreTrainedModel:
    """The same model without its weights: all parameters on the meta device.

    Raises:
        SparseHooksError: if there is no such model.
    """
    with _naming(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(name)
        skeleton: PreTrainedModel = architecture_of(config)._from_config(config)
        return skeleton


def architecture_of(config: Any) -> Any:
    """The class that a config names, or ``AutoModel``."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named or transformers.MODEL_MAPPING[type(config)]


@contextmanager
def _naming(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        what = str(error).strip().splitlines()[0]
        raise SparseHooksError(f"'{name}' cannot be opened as a model folder or a model on the Hub: {what}") from error


def copy_companions(source: Path, out: Path) -> None:
    """Take along what lies beside the weights (tokenizer, pooling, model card) and is not there yet."""
    for path in sorted(source.rglob("*")):
        target = out / path.relative_to(source)
        if path.is_file() and not path.name.endswith(WEIGHTS) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def text_batches(model: str | Path, path: Path, size: int = 32, tokens: int = 512) -> list[dict[str, Any]]:
    """Calibration batches from a file of texts.

    Args:
        model: a folder or a name on the Hub, for its tokenizer.
        path: texts, one a line; empty lines do not count.
        size: texts a batch.
        tokens: longer texts are cut.

    Returns:
        what the tokenizer gives of each batch, padded, as tensors.

    Raises:
        SparseHooksError: if the file has no text, or the model no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise SparseHooksError(f"there is no file '{path}'; give one with one text a line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SparseHooksError(f"'{path}' cannot be read as text: {error}") from error
    if not texts:
        raise SparseHooksError(f"'{path}' holds no text; give a file with one text a line")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SparseHooksError(f"'{model}' has no tokenizer, which calibration texts need") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encode = {"padding": True, "truncation": True, "max_length": tokens, "return_tensors": "pt"}
    return [dict(tokenizer(texts[start : start + size], **encode)) for start in range(0, len(texts), size)]
