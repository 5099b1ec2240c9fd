"""What the forwards of a model return for distillers: hidden states, attention maps, queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsehooks.components import Need
from sparsehooks.coupling import QKV, child, is_transposed, join
from sparsehooks.errors import SessionError
from sparsehooks.padding import CROSS, is_encoder_decoder

ARGUMENTS = {Need.HIDDEN_STATES: "output_hidden_states", Need.ATTENTIONS: "output_attentions"}
PARTS = ("queries", "keys", "values")


class Outputs:
    """What one model returns, until ``close``.

    Maps are what transformers' eager attention computes, and fused ones (sdpa, flash) do not: where maps are needed,
    the model is switched. Queries, keys and values are read by hooks on their layers.

    Args:
        model: the unwrapped model.
        needs: what of it.

    Raises:
        SessionError: if maps are needed and its attention cannot be switched.
    """

    def __init__(self, model: nn.Module, needs: Collection[Need]) -> None:
        self.needed = bool({*ARGUMENTS, Need.PROJECTIONS} & set(needs))
        self._asks = {argument: True for need, argument in ARGUMENTS.items() if need in needs}
        self._seen: dict[str, tuple[Tensor, ...]] = {}
        self._listens = False
        self._places = list(_projections(model)) if Need.PROJECTIONS in needs else []
        self._switch = _switch_to_eager(model) if Need.ATTENTIONS in needs else None
        self._handles: list[RemovableHandle] = [
            model.get_submodule(name).register_forward_hook(self._reading(name))
            for place in self._places
            for name in place
        ]

    def ask(self) -> dict[str, bool]:
        """A forward begins: the arguments that it takes in addition."""
        self._listens = True
        self._seen.clear()
        return self._asks

    def complete(self, output: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the forward has returned, together with what was read inside."""
        self._listens = False
        layers = [[part for name in place for part in self._seen.get(name, ())] for place in self._places]
        self._seen.clear()
        if not layers or any(len(layer) != len(PARTS) for layer in layers):
            return output
        return {**output, **dict(zip(PARTS, zip(*layers, strict=True), strict=True))}

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        if self._switch is not None:
            self._switch()
        self._handles, self._switch = [], None

    def _reading(self, name: str) -> Callable[..., None]:
        def read(module: nn.Module, _: Any, output: Tensor) -> None:
            if self._listens:
                self._seen[name] = output.chunk(len(PARTS), dim=-1) if is_transposed(module) else (output,)

        return read


def _projections(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """The layers that give the queries, keys and values of each self-attention: three, or one for all (GPT-2).

    None of an encoder-decoder, whose two halves are as different as two models.
    """
    if is_encoder_decoder(model):
        return
    for name, module in model.named_modules():
        if set(name.split(".")) & set(CROSS):
            continue
        trio = next((trio for trio in QKV if all(isinstance(child(module, part), nn.Module) for part in trio)), ())
        if trio:
            yield tuple(join(name, part) for part in trio)
        elif is_transposed(getattr(module, "c_attn", nn.Identity())):
            yield (join(name, "c_attn"),)


def _switch_to_eager(model: nn.Module) -> Callable[[], None] | None:
    """Make a model of transformers compute its attention maps; how to go back, if it did not do so before."""
    config = getattr(model, "config", None)
    switch = getattr(model, "set_attn_implementation", None)
    if switch is None or config is None:
        return None  # no model of transformers: whether it returns maps will be seen
    before = _implementation(config)
    switch("eager")
    if config._attn_implementation != "eager":
        raise SessionError(
            f"{type(model).__name__} returns no attention maps with its '{config._attn_implementation}' attention, and "
            "cannot be switched; use relation or hidden"
        )
    return None if _implementation(config) == before else lambda: switch(before)


def _implementation(config: Any) -> str | dict[str, Any]:
    """The attention of a config and of the configs inside, as ``set_attn_implementation`` takes it."""
    inside = {
        key: _implementation(part) for key in config.sub_configs if (part := getattr(config, key, None)) is not None
    }
    own: str = config._attn_implementation
    return {"": own, **inside} if inside else own
