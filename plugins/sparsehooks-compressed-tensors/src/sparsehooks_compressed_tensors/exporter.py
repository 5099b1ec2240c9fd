"""The compressed-tensors exporter."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsehooks import (
    ArtifactError,
    Exporter,
    Plan,
    PluginError,
    PluginManager,
    Recipe,
    SparseHooksError,
    safe_open,
)
from sparsehooks_compressed_tensors.search import Grid, Scheme, find_grid

WEIGHTS = (".safetensors", ".safetensors.index.json")
"""How the names of files end that are written anew."""


Format = Literal["pack-quantized", "int-quantized"]


@dataclass(frozen=True)
class Options:
    """The options of the exporter.

    Attributes:
        format: how weights lie in the file. "pack-quantized": packed to 4 or 8 bits, activations as they are;
            "int-quantized": int8, and activations too where config.json says so; "auto": packed where activations are
            not quantized and ``from_pretrained`` opens it without more ado.
    """

    format: Literal["auto", "pack-quantized", "int-quantized"] = "auto"


class CompressedTensors(Exporter):
    """Writes Linear weights that lie on grids of integers in the compressed-tensors format.

    The grids are found from the values, for each layer the coarsest with the fewest bits; all other layers are left as
    they are and ignored. ``AutoModel.from_pretrained`` opens the folder where compressed-tensors is installed.
    """

    Config = Options
    config: Options
    files = ("config.json", "*.safetensors")

    def export(self, folder: Path, out: Path) -> str:
        """Scales are float32; transformers opens them in the dtype of the model, and the line says what that costs.

        Raises:
            ArtifactError: if a weight that a recipe has quantized lies on no grid of integers, or none does; if only
                sparsehooks can open the model, because it has shrunk or its activations are sparse.
            PluginError: if compressed-tensors is not installed.
        """
        if importlib.util.find_spec("compressed_tensors") is None:
            raise PluginError("the package compressed-tensors is not installed; run 'pip install compressed-tensors'")
        config = _read_config(folder)
        activations = recorded_activations(config)
        if activations is not None and self.config.format == "pack-quantized":
            raise ArtifactError(f"'{folder}' quantizes activations, which pack-quantized cannot; use int-quantized")
        skeleton = _skeleton(folder)
        linear = {f"{name}.weight": name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
        tied = {*skeleton.all_tied_weights_keys, *skeleton.all_tied_weights_keys.values()}
        promised = _promised(config, skeleton)
        model = _Model("int-quantized" if activations else self.config.format, activations)
        ignored = set(linear)
        with safe_open(folder) as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(key)
                if key in linear and key not in tied and model.add(linear[key], tensor):
                    ignored.discard(key)
                elif key in linear and key in promised:
                    raise ArtifactError(
                        f"'{linear[key]}' was quantized with '{promised[key]}', and its values lie on no grid of "
                        "integers of 8 bits or fewer, which is all that compressed-tensors carries; quantize it with "
                        "'int4' or 'int8', or use the format 'dense'"
                    )
                else:
                    model.state[key] = tensor
        if not model.layers:
            raise ArtifactError(
                f"no Linear weight of '{folder}' lies on a grid of integers; quantize it first, for instance with "
                "quantize = \"int8\" in a recipe, or use the format 'dense'"
            )
        recorded = set(config["quantization_config"].get("activations") or ())
        if activations and (apart := sorted(recorded ^ {name for names in model.layers.values() for name in names})):
            raise ArtifactError(
                f"'{apart[0]}' quantizes its weight or its inputs but not both, which compressed-tensors carries only "
                "for whole models; give both stages of the recipe the same 'targets' and 'exclude'"
            )
        model.write(folder, out, config, sorted(linear[key] for key in ignored))
        return model.summary(len(ignored))


def recorded_activations(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How config.json says that the inputs of quantized layers are quantized.

    Args:
        config: config.json of a folder that sparsehooks saved.

    Returns:
        the arguments of ``QuantizationArgs``, such as ``{"num_bits": 8, "strategy": "token", "dynamic": True}``; None
        if they are not quantized.

    Raises:
        ArtifactError: if something else acts on activations, or not all in the same way.
    """
    recorded = config.get("quantization_config", {}).get("activations") or {}
    kinds = {}
    for name, entry in recorded.items():
        bits = re.fullmatch("int([2-8])?", str(entry.get("use")))
        if bits is None or entry.get("per", "token") != "token":
            raise ArtifactError(
                f"'{name}' has activations of '{entry.get('use')}', and compressed-tensors carries only grids that are "
                "fitted to each token; use the format 'onnx', or activation = \"int8\" in the recipe"
            )
        kinds[int(bits[1] or entry.get("bits", 8)), bool(entry.get("symmetric", True))] = name
    if len(kinds) > 1:
        raise ArtifactError(f"'{' and '.join(kinds.values())}' have activations on grids of two kinds; use one kind")
    for width, symmetric in kinds:
        return {"num_bits": width, "symmetric": symmetric, "strategy": "token", "dynamic": True}
    return None


@dataclass
class _Model:
    """A model as compressed-tensors stores it, layer by layer."""

    format: Literal["auto", "pack-quantized", "int-quantized"]
    activations: dict[str, Any] | None
    state: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[tuple[Format, Scheme], list[str]] = field(default_factory=dict)
    off: float = 0.0
    """By how much a weight differs when transformers opens it, at most."""

    def add(self, name: str, weight: Tensor) -> bool:
        """Take in a layer, if its weight lies on a grid of integers.

        Raises:
            ArtifactError: if compressed-tensors does not give back what it was given.
        """
        from compressed_tensors.compressors import BaseCompressor

        chosen = self._choose(weight) if bool(weight.isfinite().all()) else None
        if chosen is None:
            return False
        form, grid = chosen
        scheme = self._scheme(form, grid.scheme, [name])
        parts = {"weight": weight, "weight_scale": grid.scales}
        if grid.zeros is not None:  # their codes begin at the smallest integer, not at 0
            parts["weight_zero_point"] = (grid.zeros.to(torch.int16) - (1 << (grid.scheme.bits - 1))).to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(parts, scheme)
        if not torch.equal(compressor.decompress(stored, scheme)["weight"].to(weight.dtype), weight):
            raise ArtifactError(f"compressed-tensors changes the weight of '{name}'; use the format 'dense'")
        opened = compressor.decompress({**stored, "weight_scale": grid.scales.to(weight.dtype)}, scheme)["weight"]
        self.off = max(self.off, float((opened.float() - weight.float()).abs().max()))
        self.layers.setdefault((form, grid.scheme), []).append(name)
        self.state.update({f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()})
        return True

    def _choose(self, weight: Tensor) -> tuple[Format, Grid] | None:
        if self.format == "int-quantized":
            grid = find_grid(weight, (4, 8), ("tensor", "channel", "group"))
            return None if grid is None else ("int-quantized", replace(grid, scheme=replace(grid.scheme, bits=8)))
        grid = find_grid(weight, (4, 8), ("channel", "group"))
        if grid is None:
            return None
        if grid.zeros is None or self.format == "pack-quantized" or _opens_packed_zeros():
            return "pack-quantized", grid
        wider = find_grid(weight, (8,), ("channel", "group"), zeros=False)
        return ("int-quantized", grid) if wider is None else ("pack-quantized", wider)

    def write(self, folder: Path, out: Path, config: Mapping[str, Any], ignored: list[str]) -> None:
        """The folder that transformers opens."""
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
        from huggingface_hub import save_torch_state_dict

        for path in sorted(folder.rglob("*")):
            target = out / path.relative_to(folder)
            if path.is_file() and not path.name.endswith(WEIGHTS):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        (out / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
        # if there is one scheme it is that of all Linear layers but the ignored ones
        groups = {
            f"group_{index}": self._scheme(form, scheme, names if len(self.layers) > 1 else ["Linear"])
            for index, ((form, scheme), names) in enumerate(self.layers.items())
        }
        forms = {form for form, _ in self.layers}
        quantization = QuantizationConfig(
            config_groups=groups,
            format=forms.pop() if len(forms) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=ignored,
        )
        ModelCompressor(quantization_config=quantization).update_config(str(out))
        save_torch_state_dict(self.state, out, metadata={"format": "pt"})

    def summary(self, ignored: int) -> str:
        """One line."""
        said = [f"{len(names)} layers {form} with {scheme}" for (form, scheme), names in self.layers.items()]
        said += [f"{ignored} ignored"] if ignored else []
        packed_zeros = any(form == "pack-quantized" and not scheme.symmetric for form, scheme in self.layers)
        how = "CompressedTensorsConfig(dequantize=True)"
        if packed_zeros and not _opens_packed_zeros():
            equal = f"equal bit for bit, but this compressed-tensors opens packed zero points only with {how}"
        elif self.off:
            equal = f"within {self.off:.1e}, because transformers rounds scales to the dtype of the model"
            equal += f"; equal bit for bit with {how}" if len(self.layers) == 1 else ""
        else:
            equal = "equal bit for bit"
        inputs = "; inputs on grids of tokens, whose steps differ by 0.4 %" if self.activations else ""
        return f"{', '.join(said)}; weights {equal}{inputs}"

    def _scheme(self, form: Format, scheme: Scheme, targets: list[str]) -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        return QuantizationScheme(
            targets=targets,
            weights=QuantizationArgs(
                num_bits=scheme.bits, symmetric=scheme.symmetric, strategy=scheme.per, group_size=scheme.group
            ),
            input_activations=None if self.activations is None else QuantizationArgs(**self.activations),
            format=form,
        )


@functools.cache
def _opens_packed_zeros() -> bool:
    """Whether ``from_pretrained`` makes room for packed zero points; with compressed-tensors 0.20 it does not."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="channel")
    with torch.device("meta"):
        parts = {
            "weight": torch.empty(32, 32),
            "weight_scale": torch.empty(32, 1),
            "weight_zero_point": torch.empty(32, 1, dtype=torch.int8),
        }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    made = compressor.compress(parts, QuantizationScheme(targets=["Linear"], weights=weights))
    return bool(made["weight_zero_point"].shape[0] == 4)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model whose class alone says what its layers do."""
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(f"'{folder}' has no config.json, so transformers cannot open it; use the format 'dense'")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    marks = config.get("quantization_config", {})
    if marks.get("shrunk"):
        raise ArtifactError(
            f"'{folder}' has shrunk, which only sparsehooks can open; use the format 'onnx', or a recipe without it"
        )
    return config


def _skeleton(folder: Path) -> Any:
    """The model without its weights."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"'{folder}' is no model that transformers knows: its config.json names the type "
            f"{json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('model_type')!r}; "
            "use the format 'dense'"
        ) from error
    with torch.device("meta"):
        named: Any = getattr(transformers, (config.architectures or [""])[0], None)
        named = named or transformers.MODEL_MAPPING[type(config)]
        return named._from_config(config)


def _promised(config: Mapping[str, Any], skeleton: nn.Module) -> dict[str, str]:
    """The weights that the recipe in config.json has quantized, and with what."""
    recipe = config.get("quantization_config", {}).get("recipe") or {}
    stages = [stage for stage in recipe.get("stage", ()) if "quantize" in stage]
    if not stages:
        return {}
    try:
        plan = Plan.build(Recipe.from_dict({"stage": stages}), PluginManager(), skeleton)
    except SparseHooksError:
        return {}  # of another release, or of a plugin that is not here
    return {target.parameter: planned.stage.component.use for planned in plan.stages for target in planned.targets}
