"""One layer on trial: which backend may run it, and which is the fastest for how many tokens."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsehooks.accelerated import Engine, Group, Lane, bare, choose, original, swap, unswap
from sparsehooks.catalog import Record
from sparsehooks.components import Backend, Support
from sparsehooks.sharding import is_sharded
from sparsehooks.speed import Speeds, ratio

DENSE = "dense"
"""What torch's own layer is called."""
MARGIN = 1.03
"""How many times as fast as torch a backend has to be."""
CHECKED = (1, 5, 70)
"""For how many tokens outputs are compared: kernels differ by size."""
INEXACT = 0.05
"""How far outputs may lie from torch's where a backend rounds, as a share of their norm; 7 bits give 0.02."""


class Candidate(NamedTuple):
    """A backend and where it came from."""

    record: Record
    backend: Backend


@dataclass(frozen=True)
class Verdict:
    """Who runs a layer, and why.

    Attributes:
        shape: of the weight, (outputs, inputs) of a Linear.
        dtype: of the weight.
        sparsity: the share of zeros in it.
        input: the component that zeroes or rounds what enters the layer, if the model has one. Torch's layer, which the
            others are compared with, does so too, and is slower than ``F.linear``.
        lanes: (most, backend): who runs inputs of up to so many tokens, in ascending order; None is torch.
        speeds: for each number of tokens that was timed: how many times as fast as torch's layer each backend is.
        reasons: why others do not run the layer, by the name of the backend.
    """

    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    input: str = ""
    lanes: tuple[Lane, ...] = ()
    speeds: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def backend(self, tokens: int) -> str:
        """Who runs inputs of so many tokens; ``"dense"`` is torch's own layer."""
        return choose(self.lanes, tokens) or DENSE

    def __str__(self) -> str:
        entering = f", {self.input} inputs" if self.input else ""
        return f"{' x '.join(map(str, self.shape))}, {self.dtype}{entering}: {', '.join(self._shares()) or DENSE}"

    def _shares(self) -> Iterator[str]:
        """Who runs how many tokens, in words."""
        for most, backend in self.lanes:
            tokens = "for 1 token" if most == 1 else "for more" if most == math.inf else f"up to {most:g}"
            yield f"{backend or DENSE} {tokens}" if len(self.lanes) > 1 else backend or DENSE


class Trial:
    """A layer, and the backends that may run it.

    Compares their outputs with torch's at once; ``named`` or ``timed`` then says who runs the layer.

    Args:
        name: of the layer.
        layer: not swapped.
        candidates: the backends by name.
        speeds: what is known, and remembers.
        group: of the layers of its model.
        unfit: why none may run it, if that is known.
    """

    @torch.no_grad()
    def __init__(
        self,
        name: str,
        layer: nn.Module,
        candidates: Mapping[str, Candidate],
        speeds: Speeds,
        group: Group,
        *,
        unfit: str | None = None,
    ) -> None:
        self._layer: Any = layer
        self._candidates, self._speeds = candidates, speeds
        self._reasons: dict[str, str] = {}
        unfit = unfit or _unfit(layer)
        self._weight = cast(Tensor, layer.weight)
        self._sparsity = 0.0 if unfit else 1 - int(self._weight.count_nonzero()) / self._weight.numel()
        site = vars(layer).get("_sparsehooks_site")
        self._site = "" if site is None else site.use
        supports = self._supports = dict[str, Support]()
        if unfit is not None:
            self._reasons = dict.fromkeys(candidates, unfit)
            return
        for key, (_, backend) in candidates.items():
            with self._failing(key):
                supports[key] = group.supports(backend, layer)
                if not supports[key].ok:
                    self._reasons[key] = supports[key].reason
        swap(layer, name, {key: candidate.backend for key, candidate in candidates.items()}, (), group)
        self._engine = cast(Engine, layer._sparsehooks_engine)
        for key in self._usable():
            with self._failing(key):
                differ = (self._differs(key, tokens, exact=supports[key].exact) for tokens in CHECKED)
                if (why := next(filter(None, differ), None)) is not None:
                    self._reasons[key] = why

    def named(self) -> Verdict:
        """The only candidate runs the layer, if it can."""
        return self._settle([Lane(math.inf, key) for key in self._usable()], {})

    @torch.no_grad()
    def timed(self, counts: Sequence[int]) -> Verdict:
        """The fastest runs the layer; timed for these numbers of tokens."""
        speeds: dict[int, dict[str, float]] = {tokens: {} for tokens in counts}
        for tokens in counts:
            for key in self._usable():
                with self._failing(key):
                    measure = functools.partial(self._time, key, tokens)
                    speeds[tokens][key] = self._speeds.of(self._weight.device, self._describe(key, tokens), measure)
        usable = self._usable()
        for found in speeds.values():
            for key in found.keys() - usable:
                del found[key]
        lanes = fastest(speeds)
        if slower := self._slows(lanes, counts):
            self._reasons |= dict.fromkeys(usable, slower)
            lanes, usable = [], []
        for key in usable:
            if not any(lane.backend == key for lane in lanes):
                why = f"it is nowhere the fastest, or not {MARGIN:g} times as fast as torch"
                self._reasons[key] = why if counts else "the example does not reach the layer"
        return self._settle(lanes, speeds)

    def _usable(self) -> list[str]:
        return [key for key in self._candidates if key not in self._reasons]

    @contextmanager
    def _failing(self, key: str) -> Iterator[None]:
        """A backend that fails does not run the layer; that is all."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of a plugin, a library or a driver
            self._reasons[key] = f"it failed: {type(error).__name__}: {error}".splitlines()[0]
        except BaseException:  # the user's own: what is half tried runs nothing
            unswap(self._layer)
            raise

    def _inputs(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        made = torch.randn(tokens, self._weight.shape[1], generator=generator)
        return made.to(self._weight.device, self._weight.dtype)

    def _differs(self, key: str, tokens: int, *, exact: bool) -> str | None:
        """Whether the outputs are others than torch's."""
        layer, inputs = self._layer, self._inputs(tokens)
        found = self._engine.run(key, inputs)
        # one that rounds takes the place of the grid that torch's layer may have
        expected = original(layer).forward(layer, inputs) if exact else F.linear(inputs, layer.weight, layer.bias)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"its outputs are {found.dtype} of shape {tuple(found.shape)}"
        error, size = (found.float() - expected.float()).abs(), expected.float().abs()
        if not exact:
            wrong = not bool(error.norm() <= INEXACT * size.norm())
        else:
            # a sum of n products, in float32, is rounded n times on its way; and once more in the end
            spread = (inputs.float().square() @ layer.weight.float().square().t()).sqrt()
            bias = 0 if layer.bias is None else layer.bias.float().abs()
            steps = torch.finfo(torch.float32).eps * math.sqrt(inputs.shape[1]) * spread
            last = torch.finfo(found.dtype).eps * (size + spread + bias)
            wrong = not bool((error <= 4 * (steps + last)).all())
        return f"its outputs are wrong by up to {float(error.max()):.3g}" if wrong else None

    def _time(self, key: str, tokens: int) -> float:
        """Through the swapped layer: small ones may lose to what it costs to find the backend."""
        layer, inputs = self._layer, self._inputs(tokens)
        self._engine.lanes = (Lane(math.inf, key),)
        slow = functools.partial(original(layer).forward, layer, inputs)
        return ratio(slow, functools.partial(layer.forward, inputs), inputs.device)

    def _describe(self, key: str, tokens: int) -> str:
        """Whatever changes the ratio, but for the machine."""
        plugin = self._candidates[key].record.plugin
        rows, columns = self._weight.shape
        return (
            f"{key} {plugin.describe()}: {rows} x {columns} {self._weight.dtype}, bias {self._layer.bias is not None}, "
            f"{round(self._sparsity * 20) * 5} % zeros, input {self._site or 'plain'}, {tokens} tokens"
            + (f", {depends}" if (depends := self._supports[key].depends) else "")
        )

    def _slows(self, lanes: Sequence[Lane], counts: Sequence[int]) -> str | None:
        """Whether torch's layer, behind the look-up that finds it, would lose more than backends may."""
        tokens = next((tokens for tokens in counts if choose(lanes, tokens) is None), None)
        if tokens is None or not any(lane.backend for lane in lanes):
            return None
        layer, inputs = self._layer, self._inputs(tokens)
        self._engine.lanes = (Lane(math.inf, None),)
        alone = functools.partial(original(layer).forward, layer, inputs)
        measure = functools.partial(ratio, alone, functools.partial(layer.forward, inputs), inputs.device)
        rows, columns = self._weight.shape
        key = f"looked up: {rows} x {columns} {inputs.dtype}, bias {layer.bias is not None}, {tokens} tokens"
        if self._speeds.of(inputs.device, key, measure) >= 1 / MARGIN:
            return None
        return (
            f"torch would run inputs of {tokens} token{'s' * (tokens > 1)}, and looking up who runs the layer costs "
            f"more than {MARGIN - 1:.0%} of its time there; give an example of the sizes that matter"
        )

    def _settle(self, lanes: Sequence[Lane], speeds: Mapping[int, Mapping[str, float]]) -> Verdict:
        if any(lane.backend for lane in lanes):
            self._engine.settle(lanes)
        else:
            unswap(self._layer)
        dtype = str(self._weight.dtype).removeprefix("torch.")
        shape = tuple(self._weight.shape)
        return Verdict(shape, dtype, self._sparsity, self._site, tuple(lanes), speeds, self._reasons)


def fastest(speeds: Mapping[int, Mapping[str, float]]) -> list[Lane]:
    """Who runs how many tokens.

    Between two numbers that were timed, what is the fastest by the slower of its two ratios; below the first, torch.
    """
    counts = sorted(speeds)
    lanes = [Lane(counts[0] - 1, None)] if counts and counts[0] > 1 else []
    for count, following in itertools.pairwise(counts):
        here, there = speeds[count], speeds[following]
        lanes.append(Lane(count, _best(here)))
        if following > count + 1:
            lanes.append(Lane(following - 1, _best({key: min(here[key], there[key]) for key in here})))
    lanes += [Lane(math.inf, _best(speeds[count])) for count in counts[-1:]]
    return [lane for lane, after in itertools.pairwise(lanes) if after[1] != lane[1]] + lanes[-1:]


def _best(ratios: Mapping[str, float]) -> str | None:
    best = max(ratios, key=lambda key: ratios[key], default=None)
    return best if best is not None and ratios[best] >= MARGIN else None


def _unfit(layer: Any) -> str | None:
    """Why no backend can run a layer."""
    cls = type(bare(layer))
    if cls is not nn.Linear:
        return f"it is a {cls.__name__}, not a Linear"
    if not layer.weight.numel():
        return f"its weight of shape {tuple(layer.weight.shape)} is empty"
    if "forward" in vars(layer):
        return "it has a forward of its own (offloading does this)"
    if layer.weight.is_meta:
        return "its weight is not loaded"
    return "its weight is sharded" if is_sharded(layer) else None
