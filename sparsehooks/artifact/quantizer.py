"""The transformers quantizer that opens an artifact in ``from_pretrained`` and writes one in ``save_pretrained``.

Imported while ``transformers.quantizers`` is, so it imports only what that package has loaded already. Importing it
makes the quantizer known to transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsehooks.artifact.reading import METHOD
from sparsehooks.components import Backend
from sparsehooks.errors import ArtifactError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

VERSION = "1"


class SparseHooksConfig(QuantizationConfigMixin):
    """What config.json says about an artifact.

    Args:
        version: the format version.
        recipe: the recipe that made it, as plain values.
        plugins: what plugins added, under their names.
        pruned: the parameters whose zeros are masks if the model is trained further.

    Raises:
        ArtifactError: if a newer release wrote it, or somebody damaged it.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        version: str = VERSION,
        recipe: Mapping[str, Any] | None = None,
        plugins: Mapping[str, Mapping[str, str]] | None = None,
        pruned: Sequence[str] = (),
        **unknown: Any,
    ) -> None:
        if str(version) != VERSION:
            raise ArtifactError(
                f"config.json: format version {version!r} is not known to this release; upgrade sparsehooks"
            )
        self.quant_method = cast(Any, METHOD)  # transformers compares it with the names it registered
        self.version = VERSION
        if unknown or not all(isinstance(value, Mapping) for value in (recipe or {}, plugins or {})):
            what = f"unknown key '{min(unknown)}'" if unknown else "'recipe' and 'plugins' must be tables"
            raise ArtifactError(f"config.json: quantization_config is damaged: {what}; get the file again")
        self.recipe = dict(recipe or {})
        self.plugins = {name: dict(added) for name, added in (plugins or {}).items()}
        self.pruned = [str(name) for name in pruned]


class SparseHooksQuantizer(HfQuantizer):
    """Decodes each blob on the way into its parameter; the model in memory is an ordinary dense one."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Compare every checksum first: transformers would bury what a damaged file says in a report."""
        from sparsehooks.artifact.reading import check_files

        check_files(kwargs.get("checkpoint_files") or ())
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Decode whatever no converter of the model takes."""
        from transformers.core_model_loading import WeightConverter

        return [WeightConverter(["(.+)"], [r"\1"], [_decoder(self, last=True)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Decode before every converter of the model, so that merged experts load too."""
        from transformers.core_model_loading import WeightConverter

        return [
            conversion.copy(
                conversion._original_source_patterns,
                conversion._original_target_patterns,
                operations=[_decoder(self, last=False), *conversion.operations],
            )
            if isinstance(conversion, WeightConverter)
            else conversion
            for conversion in weight_conversions
        ] + self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # What was loaded is an ordinary model: half(), Trainer and a second save must treat it as one.
        model.is_quantized = False
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized
        kept = []
        for conversion in getattr(model, "_weight_conversions", None) or []:
            operations = getattr(conversion, "operations", None)
            if operations is not None:
                conversion.operations = [op for op in operations if not getattr(op, "decodes_blobs", False)]
            if operations is None or conversion.operations:
                kept.append(conversion)
        model._weight_conversions = kept
        _convert(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return model

    def is_serializable(self) -> bool:
        """Yes: ``save_pretrained`` writes the sparse form."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The encoded state dict of the model, and what the file says about itself."""
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict, unwrap_model

        from sparsehooks.artifact.folder import encode_state_dict

        unwrapped = unwrap_model(model)
        state = remove_tied_weights_from_state_dict(unwrapped.state_dict(), unwrapped)
        # transformers reverts its own conversions after this call, when the tensors are blobs already
        return encode_state_dict(revert_weight_conversion(unwrapped, state))


def arm(model: Any, config: SparseHooksConfig) -> None:
    """From now on ``save_pretrained``, ``trainer.save_model`` and ``push_to_hub`` write the sparse form.

    A module that is no transformers model stays as it is.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    model.hf_quantizer = SparseHooksQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.config.quantization_config = config


def disarm(model: Any) -> SparseHooksConfig | None:
    """Undo ``arm``, or the same state of an opened artifact; None if the model was not armed."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, SparseHooksQuantizer):
        return None
    quantizer.remove_quantization_config(model)  # type: ignore[no-untyped-call]
    return cast(SparseHooksConfig, quantizer.quantization_config)


def _convert(model: nn.Module) -> None:
    """Hand each layer to the backend that shall run it."""
    from sparsehooks.plugins import installed_catalog

    catalog = installed_catalog()
    if not any(record.component.name == "dense" for record in catalog.records("backend")):
        return  # switched off: torch runs the layers as they are
    backend = cast(Backend, catalog.create("backend", "dense"))
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2 and backend.supports(module, weight.device).ok:
            converted = backend.convert(module)
            if converted is not module:
                model.set_submodule(name, converted)


def _decoder(quantizer: SparseHooksQuantizer, *, last: bool) -> Any:
    """The loading operation; made here because transformers' base class cannot be imported any earlier."""
    from transformers.core_model_loading import ConversionOps, _IdentityOp

    from sparsehooks.artifact.container import decode, is_blob
    from sparsehooks.artifact.folder import installed_codecs

    codecs = installed_codecs()

    class Decode(ConversionOps):
        decodes_blobs = True

        def __init__(self) -> None:
            self.hf_quantizer = quantizer

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            *,
            full_layer_name: str = "",
            model: Any = None,
            **_: Any,
        ) -> dict[str, Any]:
            parameter = model.get_parameter_or_buffer(full_layer_name)
            decoded = {}
            for key, tensors in input_dict.items():
                many = tensors if isinstance(tensors, list) else [tensors]
                decoded[key] = [self._decode(tensor, full_layer_name, parameter) for tensor in many]
            if not last:
                return decoded
            ((tensor,),) = decoded.values()
            return {full_layer_name: tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor}

        def _decode(self, tensor: Tensor, name: str, parameter: torch.nn.Parameter) -> Tensor:
            if not is_blob(tensor):
                return tensor
            shape = tuple(parameter.shape) if last else None
            return decode(tensor.cpu(), codecs, name=name, shape=shape).to(tensor.device)

        @property
        def reverse_op(self) -> Any:
            return _IdentityOp()

    return Decode()


if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(SparseHooksConfig)
    auto.register_quantizer(METHOD)(SparseHooksQuantizer)
