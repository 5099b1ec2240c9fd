"""Padding: which tokens of a batch are real."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

CROSS = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")
"""How encoder-decoders of transformers name the attention whose keys and values come from the encoder."""
FROM_ENCODER = ("k", "v", "k_proj", "v_proj", "key", "value")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's config says that it has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@dataclass(frozen=True)
class Padding:
    """The attention masks of one call of a model.

    Attributes:
        mask: of the inputs, (sequences, tokens), True where a token is real; None if all are.
        decoder: of the decoder's inputs.
        divided: whether the model has an encoder and a decoder.
    """

    mask: Tensor | None = None
    decoder: Tensor | None = None
    divided: bool = False

    @classmethod
    def of_call(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Padding:
        """From the arguments of the model's forward."""
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        mask, decoder = (_as_mask(given.get(key)) for key in ("attention_mask", "decoder_attention_mask"))
        return cls(mask, decoder, is_encoder_decoder(model))

    def of(self, module: str) -> Tensor | None:
        """The mask of what goes into a module of this name."""
        parts = module.split(".")
        if not self.divided or "decoder" not in parts:
            return self.mask
        crosses = any(part in CROSS for part in parts) and parts[-1] in FROM_ENCODER
        return self.mask if crosses else self.decoder


def _as_mask(given: Any) -> Tensor | None:
    return given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None


def without_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values of real tokens, (tokens, features), where the mask fits; else all as they are."""
    if mask is None:
        return values
    if values.dim() > 2 and values.shape[:2] == mask.shape:
        return values[mask.to(values.device)]
    if values.dim() == 2 and values.shape[0] == mask.numel() != mask.shape[0]:
        return values[mask.to(values.device).flatten()]
    return values
