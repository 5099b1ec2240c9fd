"""The transformers quantizer that opens an artifact in ``from_pretrained`` and writes one in ``save_pretrained``.

Imported while ``transformers.quantizers`` is, so it imports only what that package has loaded already. Importing it
makes the quantizer known to transformers.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsehooks.artifact.reading import METHOD
from sparsehooks.components import Level
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
        activations: what acts on the activations of its modules: ``sites.recorded``.
        shrunk: what ``shrinking.shrink`` returned: the sizes that do not follow from the rest of config.json.
        backend: what shall run the layers of the opened model: see ``accelerate_model``; None is torch.

    Raises:
        ArtifactError: if a newer release wrote it, or somebody damaged it.
    """

    def __init__(
        self,
        /,  # a file may hold any key, "self" too
        quant_method: str = METHOD,
        version: str = VERSION,
        recipe: Mapping[str, Any] | None = None,
        plugins: Mapping[str, Mapping[str, str]] | None = None,
        pruned: Sequence[str] = (),
        shrunk: Mapping[str, Any] | None = None,
        activations: Mapping[str, Any] | None = None,
        backend: str | None = None,
        **unknown: Any,
    ) -> None:
        if str(version) != VERSION:
            raise ArtifactError(
                f"config.json: format version {version!r} is not known to this release; upgrade sparsehooks"
            )
        self.quant_method = cast(Any, METHOD)  # transformers compares it with the names it registered
        self.version = VERSION
        from sparsehooks import shrinking, sites

        tables = (recipe or {}, plugins or {}, *(plugins.values() if isinstance(plugins, Mapping) else ()))
        what = ""
        if unknown:
            what = f"unknown key '{min(unknown)}'"
        elif not all(isinstance(table, Mapping) for table in tables):
            what = "'recipe', 'plugins' and what each plugin added must be tables"
        elif not isinstance(pruned, (list, tuple)):
            what = "'pruned' must be a list of names"
        elif not isinstance(cast(Any, backend), (str, types.NoneType)):
            what = "'backend' must be the name of one"
        else:
            what = shrinking.check({} if shrunk is None else shrunk) or ""
            what = what or sites.check({} if activations is None else activations) or ""
        if what:
            raise ArtifactError(f"config.json: quantization_config is damaged: {what}; get the file again")
        self.recipe = dict(recipe or {})
        self.plugins = {name: dict(added) for name, added in (plugins or {}).items()}
        self.pruned = [str(name) for name in pruned]
        self.shrunk = copy.deepcopy(dict(shrunk or {}))
        self.activations = copy.deepcopy(dict(activations or {}))
        self.backend = backend

    def to_dict(self) -> dict[str, Any]:
        """For config.json, without what is not there."""
        values = copy.deepcopy(self.__dict__)
        for key in ("shrunk", "activations", "backend"):
            if not values[key]:
                del values[key]
        return values


class SparseHooksQuantizer(HfQuantizer):
    """Decodes each blob on the way into its parameter; the model in memory is an ordinary dense one.

    Attributes:
        level: how much work saving may put into a smaller file.
        signed_zeros: whether saving keeps -0.0.
        given: the state dict that is saved in place of the model's own.
        conversions: how the weights in memory were made of those in the file; None if transformers shall look it up.
    """

    requires_calibration = False
    level: Level = "balanced"
    signed_zeros = False
    given: Mapping[str, Tensor] | None = None
    conversions: list[Any] | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Compare the checksums of plain tensors (those of blobs later, as they are decoded), and shrink the model."""
        from sparsehooks import shrinking
        from sparsehooks.artifact.reading import check_files

        if getattr(model.config, "distributed_config", None) is not None:
            raise ArtifactError(
                f"{model.config.name_or_path!r}: encoded tensors cannot be split between devices while they load; "
                "run 'sparsehooks decompress' and load the dense folder"
            )
        check_files(kwargs.get("checkpoint_files") or ())
        shrunk = cast(SparseHooksConfig, self.quantization_config).shrunk
        try:
            if shrunk:
                shrinking.resize(model, shrunk)
        except ValueError as error:
            raise ArtifactError(
                f"{model.config.name_or_path!r}: config.json is damaged: {error}; get the file again"
            ) from error
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Decode whatever no converter of the model takes."""
        from transformers.core_model_loading import WeightConverter

        from sparsehooks.artifact.loading import Decode

        return [WeightConverter(["(.+)"], [r"\1"], [Decode()], force_cpu=True)]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Decode before every converter of the model, so that merged experts load too."""
        from sparsehooks.artifact.loading import Decode

        for conversion in weight_conversions:
            if hasattr(conversion, "operations"):
                conversion.operations = [Decode(conversion.operations)]
                conversion.force_cpu = True  # blobs are decoded there; only what comes out moves to its device
        return weight_conversions + self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leave the cast to the operation: until it is decoded, a blob must stay the bytes that it is."""
        from sparsehooks.artifact.loading import Decode

        if hasattr(converter, "operations"):
            operation = converter.operations[0]
        else:  # of a name that the model's renamings would have spoilt
            operation = converter.quantization_operation = Decode()
        if not isinstance(operation, Decode):
            return super().get_new_dtype(converter, param, dtype)  # of an adapter
        operation.dtype = dtype
        return None

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from sparsehooks.sites import apply_activations

        # What was loaded is an ordinary model: half(), Trainer and a second save must treat it as one.
        model.is_quantized = False
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized
        kept = []
        for conversion in getattr(model, "_weight_conversions", None) or []:
            if hasattr(conversion, "operations"):
                conversion.operations = conversion.operations[0].following
            if getattr(conversion, "operations", True):
                kept.append(conversion)
        model._weight_conversions = kept
        self.take_conversions(model)
        _retie_offloaded(model)
        config = cast(SparseHooksConfig, self.quantization_config)
        try:
            apply_activations(model, config.activations)
        except ValueError as error:
            saved, here, hint = ", ".join(model.config.architectures or ()), type(model).__name__, ""
            if isinstance(error.__cause__, AttributeError) and saved not in ("", here):
                hint = f"; it was saved as {saved}, open it with that class and not with {here}"
            raise ArtifactError(f"{model.config.name_or_path!r}: config.json: {error}{hint}") from error
        if config.backend is not None:
            _accelerate(model, config.backend)
        return model

    def take_conversions(self, model: Any) -> None:
        """Keep transformers from reverting its conversions of the weights, which ``get_state_dict_and_metadata`` does.

        It would do so later, when the tensors are blobs already.
        """
        self.conversions = getattr(model, "_weight_conversions", None)
        model._weight_conversions = []

    def _return_conversions(self, model: Any) -> None:
        if self.conversions is None:
            del model._weight_conversions
        else:
            model._weight_conversions = self.conversions

    def remove_quantization_config(self, model: Any) -> None:
        """Make it a model like any other, which is saved dense."""
        self._return_conversions(model)
        del model.hf_quantizer
        vars(model).pop("save_pretrained", None)
        del model.config.quantization_config
        model.__dict__.pop("quantization_method", None)
        model.is_quantized = False

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

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The encoded state dict of the model, and what the file says about itself."""
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.integrations.accelerate import load_offloaded_parameter
        from transformers.modeling_utils import remove_tied_weights_from_state_dict, unwrap_model

        from sparsehooks.artifact.folder import encode_state_dict

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # of a model with adapters only these are saved, which nobody would decode
        unwrapped = unwrap_model(model)
        state = dict(unwrapped.state_dict() if self.given is None else self.given)
        state = remove_tied_weights_from_state_dict(state, unwrapped)
        for name, tensor in state.items():
            if tensor.is_meta:
                state[name] = load_offloaded_parameter(unwrapped, name)
        self._return_conversions(unwrapped)
        try:
            state = revert_weight_conversion(unwrapped, state)
        finally:
            self.take_conversions(unwrapped)
        return encode_state_dict(state, level=self.level, signed_zeros=self.signed_zeros)


def arm(model: Any, config: SparseHooksConfig, *, level: Level = "balanced", signed_zeros: bool = False) -> None:
    """From now on ``save_pretrained``, ``trainer.save_model`` and ``push_to_hub`` write the sparse form.

    A module that is no transformers model stays as it is. Of one that was shrunk, ever, the config says how.
    """
    from transformers import PreTrainedModel

    from sparsehooks import shrinking

    if not isinstance(model, PreTrainedModel):
        return
    disarm(model)
    if hasattr(model, shrinking.MARK):
        config.shrunk = shrinking.describe(model)
    quantizer = SparseHooksQuantizer(config, pre_quantized=True)
    quantizer.level, quantizer.signed_zeros = level, signed_zeros
    quantizer.take_conversions(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = config
    model.save_pretrained = types.MethodType(_save_pretrained, model)  # type: ignore[method-assign]


def _save_pretrained(
    self: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """The model's own, which asks its quantizer for the tensors: the quantizer shall know which were given.

    Of sharded weights rank 0 saves what all gather, so every rank has to call it.
    """
    from sparsehooks.distributed import rank
    from sparsehooks.sharding import is_sharded, whole_state

    if state_dict is None and is_sharded(self):
        state_dict, is_main_process = whole_state(self), is_main_process and rank() == 0
    quantizer = self.hf_quantizer
    quantizer.given = state_dict
    try:
        type(self).save_pretrained(self, save_directory, is_main_process, state_dict, **options)
    finally:
        quantizer.given = None


_save_pretrained.__name__ = "save_pretrained"  # so that a pickled model finds its own again


def disarm(model: Any) -> SparseHooksConfig | None:
    """Undo ``arm``, or the same state of an opened artifact; None if the model was not armed."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, SparseHooksQuantizer):
        return None
    quantizer.remove_quantization_config(model)
    return cast(SparseHooksConfig, quantizer.quantization_config)


def _retie_offloaded(model: Any) -> None:
    """Have weights that are tied to one on the disk read from where that was written decoded, not from the artifact."""
    for tied, source in model.all_tied_weights_keys.items():
        hook = getattr(model.get_submodule(tied.rpartition(".")[0]), "_hf_hook", None)
        offloaded = getattr(hook, "weights_map", None)
        if offloaded is not None and source in offloaded.dataset.index:
            offloaded.dataset.index[tied] = offloaded.dataset.index[source]


def _accelerate(model: nn.Module, backend: str) -> None:
    """Hand the layers to the backend that the config names; where it is not there, torch runs them as they are."""
    from sparsehooks.accelerating import AUTO, accelerate_model
    from sparsehooks.errors import PlanError, PluginError, RecipeError
    from sparsehooks.plugins import as_manager

    manager = as_manager()
    try:
        if backend != AUTO:
            manager.catalog.resolve("backend", backend, saved=True)
        accelerate_model(model, backend, plugins=manager)
    except (PlanError, PluginError, RecipeError) as error:
        warnings.warn(f"config.json asks for the backend '{backend}', torch runs the layers: {error}", stacklevel=2)


if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(SparseHooksConfig)
    auto.register_quantizer(METHOD)(SparseHooksQuantizer)
