"""Decoding while transformers loads: the operation that runs before any other on what a file holds.

Imported when loading begins, because it needs parts of transformers that the quantizers are imported before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, _IdentityOp

from sparsehooks.artifact.blob import Blob, decode
from sparsehooks.artifact.container import is_blob
from sparsehooks.artifact.folder import installed_codecs
from sparsehooks.artifact.stored import MAX_BYTES, MAX_EXPANSION
from sparsehooks.errors import ArtifactError


class Decode(ConversionOps):
    """Decodes and casts, then runs the operations that the model has for a parameter.

    Attributes:
        following: these operations.
        dtype: what to cast floating point tensors to; None to leave them as they are.
    """

    def __init__(self, following: Sequence[ConversionOps] = ()) -> None:
        self.following = list(following)
        self.dtype: torch.dtype | None = None

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        model: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The tensors of a parameter, as the model wants them."""
        shape = None if self.following else model.get_parameter_or_buffer(full_layer_name).shape
        found: dict[str, Any] = {}
        try:
            for pattern, tensors in input_dict.items():
                found[pattern] = [self._decode(tensor, full_layer_name, shape) for tensor in tensors]
        except ArtifactError as error:
            return cast("dict[str, Any]", _Failed(error))
        if not self.following:
            return {full_layer_name: next(iter(found.values()))}
        for operation in self.following:
            found = operation.convert(
                found,
                source_patterns=source_patterns,
                target_patterns=target_patterns,
                full_layer_name=full_layer_name,
                model=model,
                **options,
            )
        return found

    @property
    def reverse_op(self) -> ConversionOps:
        """Nothing: the quantizer encodes a state dict as a whole."""
        return _IdentityOp()

    def _decode(self, tensor: Tensor, name: str, shape: Sequence[int] | None) -> Tensor:
        if is_blob(tensor) and shape is None:
            limit = max(MAX_BYTES, MAX_EXPANSION * tensor.numel())
            tensor = decode(tensor.cpu(), installed_codecs(), name=name, max_bytes=limit)
        elif is_blob(tensor):
            blob = Blob.of(tensor.cpu(), installed_codecs(), name=name)
            if blob.header.shape != shape:
                # nothing to decode: transformers says that it does not fit, or starts afresh where that is wanted
                return torch.zeros(()).expand(blob.header.shape)
            tensor = blob.tensor()
        return tensor.to(dtype=self.dtype) if tensor.is_floating_point() else tensor


class _Failed(Mapping[str, Any]):
    """What a damaged file gives: raises when it is used, because what an operation raises is buried in a report."""

    def __init__(self, error: ArtifactError) -> None:
        self._error = error

    def __getitem__(self, key: str) -> Any:
        raise self._error

    def __iter__(self) -> Any:
        raise self._error

    def __len__(self) -> int:
        raise self._error
