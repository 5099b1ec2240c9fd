"""The ONNX exporter."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsehooks import ArtifactError, Exporter, PluginError, restore_model

FILE = "model.onnx"
COMPANIONS = ("token", "vocab", "merges", "special_tokens", "preprocessor", "spiece", "sentencepiece")
"""How the names of files begin that a program needs beside the model: how texts and images become inputs."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.float64: 1e-3}
"""How far outputs may be from the model's, as a share of the largest."""


@dataclass(frozen=True)
class Options:
    """The options of the exporter.

    Attributes:
        architecture: the transformers class to export, such as "BertForMaskedLM"; default: that of config.json.
        opset: the version of the ONNX operators; default: that of torch.
        check: whether to compare the outputs with the model, where onnxruntime is installed.
    """

    architecture: str | None = None
    opset: int | None = None
    check: bool = True

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset < 18:
            raise ValueError(f"'opset' = {self.opset} is too old for torch.onnx; use 18 or more")


class Onnx(Exporter):
    """Writes model.onnx with torch.onnx, as sparsehooks opens the model: shrunk layers and sparse activations too.

    Of models of texts the inputs are ``input_ids`` and, where the model takes them, ``attention_mask`` and
    ``token_type_ids``, with free batch and sequence axes; of models of images ``pixel_values`` with a free batch axis.
    Weights are dense, those of bfloat16 models in float32.
    """

    Config = Options
    config: Options
    files = (FILE,)

    def export(self, folder: Path, out: Path) -> str:
        """Compare what is written with the model where onnxruntime is installed, on inputs of other sizes.

        Raises:
            ArtifactError: if the model takes other inputs, or torch.onnx cannot export it.
            PluginError: if onnx or onnxscript is not installed.
        """
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise PluginError(f"{' and '.join(missing)} must be installed; run 'pip install {' '.join(missing)}'")
        model = _open(folder, self.config.architecture)
        acting = getattr(getattr(model.config, "quantization_config", None), "activations", {})
        rounded = [name for name, entry in acting.items() if entry["use"].startswith(("int", "static", "pact"))]
        if rounded:
            raise ArtifactError(
                f"'{rounded[0]}' of '{folder}' puts its inputs on a grid, which torch.onnx cannot export; use "
                "'compressed-tensors', or a recipe whose 'activation' has no grids"
            )
        inputs, axes = _inputs(model, batch=2, sequence=8)
        path = out / FILE
        try:
            plain = _Plain(model, inputs)
            with _quietly():
                program = torch.onnx.export(
                    plain,
                    tuple(inputs.values()),
                    dynamo=True,
                    input_names=list(inputs),
                    output_names=plain.names,
                    dynamic_shapes=(tuple(axes.values()),),
                    opset_version=self.config.opset,
                    verbose=False,
                )
        except Exception as error:
            raise ArtifactError(
                f"torch.onnx cannot export {type(model).__name__} of '{folder}': {_one_line(error)}; "
                "use another format, or another class by the option 'architecture'"
            ) from error
        assert program is not None
        program.save(path)
        for companion in sorted(folder.iterdir()):
            if companion.is_file() and companion.name.startswith(COMPANIONS):
                shutil.copyfile(companion, out / companion.name)
        compared = self._compare(plain, path)
        return f"{type(model).__name__}, {', '.join(inputs)} to {', '.join(plain.names)}; {compared}"

    def _compare(self, model: _Plain, path: Path) -> str:
        """How far the outputs are from the model's, on inputs of other sizes than those it was exported with."""
        if not self.config.check:
            return "not compared with the model"
        if importlib.util.find_spec("onnxruntime") is None:
            return "not compared with the model; for that, 'pip install onnxruntime'"
        import onnxruntime

        inputs, _ = _inputs(model.model, batch=3, sequence=13)
        with torch.no_grad():
            expected = [output.double() for output in model(*inputs.values())]
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            found = session.run(model.names, {name: value.numpy() for name, value in inputs.items()})
        except Exception as error:
            raise ArtifactError(
                f"onnxruntime cannot run what torch.onnx wrote: {_one_line(error)}; set 'check' to false to keep it"
            ) from error
        pairs = zip(found, expected, strict=True)
        off = float(torch.stack([(torch.from_numpy(one).double() - other).abs().max() for one, other in pairs]).max())
        reach = float(torch.stack([output.abs().max() for output in expected]).max())
        said = f"onnxruntime is within {off:.1e} of the model, whose outputs reach {reach:.1e}"
        if not off <= TOLERANCE[model.model.dtype] * reach:
            raise ArtifactError(f"{said}: that is too far, so nothing is written; set 'check' to false to keep it")
        return said


class _Plain(nn.Module):
    """A transformers model with tensors in and out, and nothing else."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.takes = list(inputs)
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad():
            outputs = model(**inputs, **self.options)
        self.names = [name for name, value in outputs.items() if isinstance(value, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**dict(zip(self.takes, tensors, strict=True)), **self.options)
        return tuple(outputs[name] for name in self.names)


def _open(folder: Path, architecture: str | None) -> Any:
    """The model in the class that its config names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{folder}' is no model of transformers: there is no config.json that it knows") from error
    name = architecture or (config.architectures or ["AutoModel"])[0]
    cls: Any = getattr(transformers, name, None)
    if cls is None:
        raise ArtifactError(f"transformers has no class '{name}'; name one with the option 'architecture'")
    model = cls.from_pretrained(folder).eval()
    restore_model(model)
    return model.float() if model.dtype == torch.bfloat16 else model  # which onnxruntime does not run on CPUs


def _inputs(model: Any, *, batch: int, sequence: int) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Inputs of a model, drawn with a fixed seed, and the names of their free axes."""
    generator = torch.Generator().manual_seed(0)
    config, main = model.config, model.main_input_name
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, getattr(config, "num_channels", 3), height, width)
        pixels = torch.randn(shape, generator=generator).to(model.dtype)
        return {main: pixels}, {main: {0: "batch"}}
    if main != "input_ids" or getattr(config, "is_encoder_decoder", False):
        raise ArtifactError(
            f"{type(model).__name__} does not take 'input_ids' or 'pixel_values' alone; name another class of the "
            "model with the option 'architecture', such as its encoder"
        )
    config = config.get_text_config()
    inputs = {main: torch.randint(0, config.vocab_size, (batch, sequence), generator=generator)}
    takes = inspect.signature(model.forward).parameters
    if "attention_mask" in takes:
        inputs["attention_mask"] = (torch.arange(sequence) < sequence - torch.arange(batch)[:, None]).long()
    if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.randint(0, 2, (batch, sequence), generator=generator)
    return inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch.onnx says to its own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
