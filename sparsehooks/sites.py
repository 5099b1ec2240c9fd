"""Where activations become sparse or coarse: modules whose class is swapped for one that changes its values."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from sparsehooks import swapping
from sparsehooks.components import Activation
from sparsehooks.decoding import decode
from sparsehooks.errors import PluginError, RecipeError
from sparsehooks.plugins import installed_catalog
from sparsehooks.sampling import Sample


@dataclass
class Site:
    """What a swapped module does to its values.

    Attributes:
        use: the component's name.
        options: its options.
        component: itself.
        amount: what was fitted, or the share of a function; None: nothing yet.
        learned: the amount that trains, instead.
        sample: collects the values, during calibration.
    """

    use: str
    options: Mapping[str, Any]
    component: Activation
    amount: float | None = None
    learned: Tensor | None = None
    sample: Sample | None = None

    def act(self, values: Tensor) -> Tensor:
        """The values that go on."""
        if self.sample is not None:
            self.sample.add(values)
        amount = self.amount if self.learned is None else self.learned
        return values if amount is None else self.component.apply(values, amount)

    def to_plain(self) -> dict[str, Any]:
        """For config.json."""
        return {**self.options, "use": self.use, "amount": self.amount}


class Sparse:
    """The mixin of all swapped modules."""

    _sparsehooks_site: Site


class SparseInput(Sparse):
    """A layer that zeroes inputs."""

    def _sparsehooks_incoming(self, values: Tensor) -> Tensor:
        return self._sparsehooks_site.act(values)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """The layer's forward of the sparse input."""
        return super().forward(self._sparsehooks_site.act(input))  # type: ignore[misc,no-any-return]


class SparseOutput(Sparse):
    """An activation function that zeroes outputs."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The function's forward, made sparse."""
        return self._sparsehooks_site.act(super().forward(input))  # type: ignore[misc]


class MixedFunction(Sparse):
    """An activation function that turns into another one."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The mix of both."""
        site, before = self._sparsehooks_site, super().forward(input)  # type: ignore[misc]
        return before if site.amount is None else site.component.apply(input, site.amount, before)


MIXINS: Mapping[str, type[Sparse]] = {"input": SparseInput, "output": SparseOutput, "function": MixedFunction}


@functools.cache
def _made(mixin: type[Sparse], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Sparse{cls.__name__}", (mixin, cls), {})


def put(module: Any, site: Site) -> None:
    """Swap the class of a module, below that of an effective weight."""
    take(module)
    cls, effective = own(module)
    made: Any = _made(MIXINS[site.component.place], cls)  # type: ignore[arg-type]
    module.__class__ = swapping.effective_class(made) if effective else made
    module._sparsehooks_site = site


def take(module: nn.Module) -> Site | None:
    """Undo ``put``, and give what it had put."""
    if not isinstance(module, Sparse):
        return None
    swapped: Any = module
    cls, effective = own(swapped)
    original: Any = swapping.inner(cls)
    site = module._sparsehooks_site
    swapped.__class__ = swapping.effective_class(original) if effective else original
    del swapped._sparsehooks_site
    return site


def own(module: nn.Module) -> tuple[type[nn.Module], bool]:
    """The module's class without an effective weight, and whether it has one."""
    cls = type(module)
    effective = issubclass(cls, swapping.EffectiveWeight)
    return (swapping.inner(cls) if effective else cls), effective


def replace(model: nn.Module, module: nn.Module, site: Site) -> bool:
    """Put the function that the component ends in under every name of the module."""
    made: Any = site.component.replacement()
    if made is None:
        return False
    made.train(module.training)
    made._sparsehooks_site = site
    for name in [name for name, other in model.named_modules(remove_duplicate=False) if other is module]:
        model.set_submodule(name, made)
    return True


def recorded(model: nn.Module) -> dict[str, Any]:
    """What acts on the activations of a finished model: for ``SparseHooksConfig(activations=...)``."""
    found = {}
    for name, module in model.named_modules():
        site = vars(module).get("_sparsehooks_site")
        if site is not None and site.amount is not None:
            found[name] = site.to_plain()
    return found


def check(entries: Any) -> str | None:
    """Why this is not what ``recorded`` gives, or None."""
    if not isinstance(entries, Mapping):
        return "'activations' must be a table"
    for name, entry in entries.items():
        if not (isinstance(entry, Mapping) and isinstance(entry.get("use"), str)):
            return f"'activations' needs 'use' for '{name}'"
        amount = entry.get("amount")
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < math.inf:
            return f"'activations' gives '{name}' the amount {amount!r}"
    return None


def apply_activations(model: nn.Module, entries: Mapping[str, Any]) -> None:
    """Put on a model what ``recorded`` gave of another.

    Raises:
        ValueError: if a component or a module is missing, or an option is wrong.
    """
    made: dict[str, Activation] = {}
    catalog = installed_catalog() if entries else None
    for name, entry in entries.items():
        options = {key: value for key, value in entry.items() if key not in ("use", "amount")}
        key = repr((entry["use"], sorted(options.items(), key=str)))
        try:
            if key not in made:
                assert catalog is not None
                record, given = catalog.resolve("activation", entry["use"])
                cls = record.load()
                config: Any = decode(cls.Config, {**given, **options}, f"activations '{name}'")
                made[key] = cast(Activation, cls(config))
            module = model.get_submodule(name)
        except (RecipeError, PluginError, AttributeError) as error:
            raise ValueError(str(error)) from error
        site = Site(entry["use"], options, made[key], float(entry["amount"]))
        if "forward" in vars(module):
            raise ValueError(f"'{name}' has a forward of its own (offloading does this); load it on one device")
        if not (site.component.place == "function" and site.amount == 1.0 and replace(model, module, site)):
            put(module, site)
