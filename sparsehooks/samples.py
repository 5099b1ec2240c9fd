"""A batch taken apart into its samples, each known by a digest of its own inputs; outputs cut up and put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsehooks.errors import SessionError


@dataclass(frozen=True)
class Samples:
    """The samples of a batch.

    Attributes:
        digests: of each.
        real: which tokens are no padding, bool, (samples, tokens), on the CPU; None if padding counts.
        device: where the losses want their tensors.
    """

    digests: list[str]
    real: Tensor | None
    device: torch.device

    def form(self, value: Tensor) -> str:
        """How a sample's part is cut out: where its tokens lie in an output.

        ``tokens``: (samples, tokens, ...), such as hidden states. ``pairs``: (samples, ..., tokens, tokens), such as
        attention probabilities. ``rowN``: (samples, N) with N the tokens, padding included, which may also be classes.
        ``whole``: anything else.
        """
        if self.real is None:
            return "whole"
        tokens = self.real.shape[1]
        if value.dim() > 3 and value.shape[-1] == value.shape[-2] == tokens:
            return "pairs"
        if value.dim() > 1 and value.shape[1] == tokens:
            return "tokens" if value.dim() > 2 else f"row{tokens}"
        return "whole"

    def cut(self, value: Tensor, index: int, form: str) -> Tensor:
        """The part of an output that belongs to a sample; a copy."""
        row = value[index]
        if self.real is not None and form == "tokens":
            row = row[self.real[index]]
        elif self.real is not None and form == "pairs":
            row = row[..., self.real[index], :][..., self.real[index]]
        return row.clone(memory_format=torch.contiguous_format)

    def join(self, rows: list[Tensor], form: str) -> Tensor | None:
        """An output made of the parts of all samples; None where they do not fit together here."""
        if self.real is None or form not in ("tokens", "pairs"):
            padded = None if self.real is None else f"row{self.real.shape[1]}"
            if len({row.shape for row in rows}) > 1 or (form.startswith("row") and form != padded):
                return None
            return torch.stack(rows).to(self.device)
        samples, tokens = self.real.shape
        if form == "tokens":
            whole = rows[0].new_zeros((samples, tokens, *rows[0].shape[1:]))
            whole[self.real] = torch.cat(rows)
        else:
            whole = rows[0].new_zeros((samples, *rows[0].shape[:-2], tokens, tokens))
            for index, row in enumerate(rows):
                real = self.real[index].nonzero().flatten()
                whole[index][..., real[:, None], real] = row
        return whole.to(self.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def samples_of(inputs: Mapping[str, Any], *, pads: bool) -> Samples:
    """Take a batch apart.

    Raises:
        SessionError: an input that has no sample dimension.
    """
    tensors = {name: value for name, value in sorted(inputs.items()) if isinstance(value, Tensor)}
    others = {name: value for name, value in sorted(inputs.items()) if name not in tensors and value is not None}
    if not tensors:
        raise SessionError(
            "a teacher cache needs tensors to know samples by, and the batch has none; leave 'cache' out"
        )
    size = next((len(value) for value in tensors.values() if value.dim()), 0)
    for name, value in inputs.items():
        if name in tensors and (not value.dim() or len(value) != size):
            raise SessionError(
                f"a teacher cache keeps samples, and the input '{name}' of shape {tuple(value.shape)} has none: its "
                f"first dimension is not {size} as of the others; leave 'cache' out"
            )
        if name in others and not isinstance(value, (bool, int, float, str)):
            raise SessionError(
                f"a teacher cache cannot tell one {type(value).__name__} from another, and the input '{name}' is one; "
                "leave 'cache' out"
            )
    device = next(iter(tensors.values())).device
    here = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    mask = here.get("attention_mask")
    real = mask.bool() if pads and mask is not None and mask.dim() == 2 else None
    autocast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else ""
    common = json.dumps([autocast, others]).encode()
    return Samples([_digest(here, real, index, common) for index in range(size)], real, device)


def _digest(inputs: Mapping[str, Tensor], real: Tensor | None, index: int, common: bytes) -> str:
    total = hashlib.blake2b(common, digest_size=16)
    places = None
    if real is not None:
        places = real[index].nonzero().flatten()
        total.update(raw_bytes(places))
    for name, value in inputs.items():
        row = value[index]
        if real is not None and value.shape[:2] == real.shape:
            row = row[places]
        total.update(f"{name} {row.dtype} {tuple(row.shape)}".encode())
        total.update(raw_bytes(row))
    return total.hexdigest()


def raw_bytes(tensor: Tensor) -> Any:
    """What lies in memory, as a buffer."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
