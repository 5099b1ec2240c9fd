"""Targets: which modules and weights a stage means."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsehooks.errors import RecipeError, suggest

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTERS = re.compile(r"(^|\.)(lora_|modules_to_save\.|original_module\b)")
"""What PEFT trains stays dense: masking a factor of a product does not make the product sparse."""


def plain_name(name: str) -> str:
    """The name that a module or parameter has without the adapters of PEFT around it."""
    return name.replace(".base_layer", "")


@dataclass(frozen=True)
class Target:
    """One weight that a stage acts on.

    Attributes:
        parameter: its name in the model.
        modules: the modules that use it (more than one if it is tied).
        shape: the parameter's shape.
        transposed: whether it lies as (input, output), as in transformers' Conv1D.
    """

    parameter: str
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as a matrix (outputs, everything else); a view where possible."""
        return tensor.t() if self.transposed else tensor.flatten(1)

    def restore(self, matrix: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The inverse of ``matrix``; a view where possible. The shape is given where the parameter has shrunk."""
        return matrix.t() if self.transposed else matrix.reshape(self.shape if shape is None else tuple(shape))

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of ``matrix(...)``."""
        if self.transposed:
            return self.shape[1], self.shape[0]
        return self.shape[0], math.prod(self.shape[1:])


def find(model: nn.Module, patterns: Iterable[str], exclude: Iterable[str]) -> tuple[list[Target], list[str]]:
    """The weights of the modules that the patterns name.

    A pattern is a class name (``Linear``), a glob over module names (``encoder.*.dense``), or ``re:`` and a regular
    expression that matches the whole module name.

    Returns:
        the targets in the order of the model's parameters, and notes on what was left out.

    Raises:
        RecipeError: a pattern that matches no module, or none with a weight matrix, in one sentence without a path.
    """
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2:
            owners.setdefault(id(weight), []).append(name)
    weighted = {name for names in owners.values() for name in names}
    wanted = _matching(modules, patterns, weighted) - _matching(modules, exclude)
    wanted = {name for name in wanted if not ADAPTERS.search(name)}
    targets, notes = [], []
    for parameter, weight in model.named_parameters():
        names = owners.get(id(weight), [])
        chosen = [name for name in names if name in wanted]
        if chosen and len(chosen) < len(names):
            rest = sorted(set(names) - set(chosen))
            notes.append(f"'{parameter}' is left out: it is tied to {', '.join(rest)}, which is not a target")
        elif chosen:
            transposed = any(base.__name__ == "Conv1D" for base in type(modules[chosen[0]]).__mro__)
            targets.append(Target(parameter, tuple(chosen), tuple(weight.shape), transposed))
    if not targets:
        classes = sorted({type(modules[name]).__name__ for names in owners.values() for name in names})
        why = f": {notes[0]}" if notes else ""
        raise RecipeError(f"no weight is left{why}; the model has weights in {', '.join(classes)}")
    return targets, notes + idle(model, exclude)


def idle(model: nn.Module, exclude: Iterable[str]) -> list[str]:
    """A note on each pattern that excludes nothing."""
    modules = dict(model.named_modules())
    unmatched = [pattern for pattern in exclude if not _matching(modules, [pattern])]
    return [f"'exclude' names '{pattern}', which matches no module" for pattern in unmatched]


def first_match(model: nn.Module, target: Target, patterns: Iterable[str]) -> str | None:
    """The first of the patterns (as ``find`` reads them) that matches a module of the target."""
    modules = {name: model.get_submodule(name) for name in target.modules}
    return next((pattern for pattern in patterns if _matching(modules, [pattern])), None)


def _matching(modules: Mapping[str, nn.Module], patterns: Iterable[str], weighted: set[str] | None = None) -> set[str]:
    """The modules that the patterns match, by their names without adapters.

    Each has to match one of ``weighted``, if that is given.
    """
    classes = {name: {base.__name__ for base in type(module).__mro__} for name, module in modules.items()}
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise RecipeError(f"target '{pattern}' is not a regular expression: {error}") from error
            matches = {name for name in modules if expression.fullmatch(plain_name(name))}
        else:
            matches = {
                name for name in modules if pattern in classes[name] or fnmatch.fnmatchcase(plain_name(name), pattern)
            }
        if weighted is not None and not matches & weighted:
            known = {type(modules[name]).__name__ for name in weighted}
            what = "matches only modules without a weight matrix" if matches else "matches no module"
            raise RecipeError(f"target '{pattern}' {what}{suggest(pattern, known)}")
        found |= matches
    return found
