"""Recipes: what shall be done to a model, as frozen values; TOML is one way to write them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from sparsehooks.components import check_moment, step_of
from sparsehooks.decoding import decode
from sparsehooks.errors import RecipeError, suggest
from sparsehooks.plugins import PluginManager, as_manager


@dataclass(frozen=True)
class Use:
    """A component by name, with its options: ``"magnitude"`` or ``{ use = "cubic", end = 0.7 }`` in a recipe."""

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def __decode__(cls, value: Any, path: str) -> Use:
        if isinstance(value, Use):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise RecipeError(f"{path}: expected a name or a table {{ use = NAME, ... }}, got {value!r}")
        options = dict(value)
        name = options.pop("use", None)
        if not isinstance(name, str):
            raise RecipeError(f"{path}: a component table needs 'use', the name of the component")
        return cls(name, options)

    def to_plain(self) -> str | dict[str, Any]:
        """The shortest form that a recipe takes."""
        return {"use": self.use, **self.options} if self.options else self.use


@dataclass(frozen=True)
class Grow:
    """What grows back at each update: ``"gradient"`` or ``{ use = "gradient", fraction = 0.3, schedule = "cosine" }``.

    Attributes:
        use: the criterion by which it grows.
        fraction: of the weights that stay, how many give way to others, in (0, 1).
        schedule: how the fraction falls to 0 over the stage's window, or not at all (``"constant"``).
    """

    use: Use
    fraction: float = 0.3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"'fraction' = {self.fraction} is outside (0, 1); 0.3 replaces three of ten weights")

    @classmethod
    def __decode__(cls, value: Any, path: str) -> Grow:
        if isinstance(value, Grow):
            return value
        use = Use.__decode__(value, path)
        own = {key: use.options[key] for key in ("fraction", "schedule") if key in use.options}
        rest = {key: option for key, option in use.options.items() if key not in own}
        return decode(cls, {"use": Use(use.use, rest), **own}, path)

    def share(self, progress: float) -> float:
        """The fraction at ``progress`` in [0, 1] of the window (Evci et al. 2020, arXiv:1911.11134, section 3)."""
        if self.schedule == "constant":
            return self.fraction
        falls = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.fraction * falls

    def to_plain(self) -> dict[str, Any]:
        """The table that a recipe takes."""
        return {"use": self.use.use, "fraction": self.fraction, "schedule": self.schedule, **self.use.options}


@dataclass(frozen=True)
class TeacherUse:
    """A teacher: ``"self"``, a folder or a Hub name, or ``{ use = NAME, dtype = "bfloat16" }``.

    Attributes:
        use: ``"self"`` for the model as it was at the start, a folder, or a name on the Hub.
        dtype: of its weights; left out, the one it has.
    """

    use: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @classmethod
    def __decode__(cls, value: Any, path: str) -> TeacherUse:
        if isinstance(value, TeacherUse):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise RecipeError(f"{path}: expected a name or a table {{ use = NAME, ... }}, got {value!r}")
        return decode(cls, value, path)

    def to_plain(self) -> str | dict[str, Any]:
        """The shortest form that a recipe takes."""
        return self.use if self.dtype is None else {"use": self.use, "dtype": self.dtype}


class Teachers(tuple[TeacherUse, ...]):
    """The teachers of a stage: one, or a list of them."""

    __slots__ = ()

    @classmethod
    def __decode__(cls, value: Any, path: str) -> Teachers:
        if not isinstance(value, (list, tuple)):
            return cls((TeacherUse.__decode__(value, path),))
        teachers = [TeacherUse.__decode__(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if not teachers:
            raise RecipeError(f"{path}: is empty; leave it out for 'self'")
        if len(set(teachers)) < len(teachers):
            raise RecipeError(f"{path}: names one teacher twice; give stages of their own with another 'weight'")
        return cls(teachers)

    def to_plain(self) -> Any:
        """The shortest form that a recipe takes."""
        plain = [teacher.to_plain() for teacher in self]
        return plain[0] if len(plain) == 1 else plain


SELF = Teachers((TeacherUse("self"),))
DECODERS: Mapping[Any, Any] = {Use: Use, Use | None: Use, Grow | None: Grow, Teachers: Teachers}
"""What turns the short form of a key into its value, by the type of the key."""


@dataclass(frozen=True)
class Stage:
    """What all stages have.

    Attributes:
        targets: which modules: class names (``"Linear"``), globs over module names, or ``re:`` expressions.
        exclude: which of them not, likewise.
    """

    action: ClassVar[str]
    targets: tuple[str, ...] = ("Linear",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            decoder = DECODERS.get(hints[item.name])
            if decoder is not None and value is not None:
                object.__setattr__(self, item.name, decoder.__decode__(value, item.name))
            elif hints[item.name] == tuple[str, ...]:
                object.__setattr__(self, item.name, (value,) if isinstance(value, str) else tuple(value))
        if not self.targets:
            raise ValueError("'targets' is empty; leave it out for all Linear layers")

    @property
    def component(self) -> Use:
        """The component that gives the stage its name."""
        return getattr(self, self.action)  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``Recipe.from_dict`` takes; defaults are left out."""
        plain = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != self.action and value in (item.default, {}):
                continue
            plain[item.name] = value.to_plain() if isinstance(value, (Use, Grow, Teachers)) else value
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


@dataclass(frozen=True)
class PruneStage(Stage):
    """Remove weights.

    Attributes:
        prune: the criterion.
        sparsity: the final share of zeros, in [0, 1); a pattern that fixes it (N:M) needs none.
        pattern: the shape in which weights go.
        allocation: how the layers share the budget.
        schedule: when, and how much by then.
        grow: what grows back in place of other weights at each update; nothing if it is left out.
        solver: how the survivors are repaired, without training only.
        backend: what multiplies while the layers train, once all that shall go is masked; torch if it is left out.
        overrides: for targets of their own sparsity: class names, globs or ``re:`` expressions as in ``targets``, the
            first that matches counts. They leave the budget that the others share.
    """

    action = "prune"
    prune: Use = Use("magnitude")
    sparsity: float | None = None
    pattern: Use = Use("unstructured")
    allocation: Use = Use("uniform")
    schedule: Use = Use("oneshot")
    grow: Grow | None = None
    solver: Use | None = None
    backend: Use | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "overrides", dict(self.overrides))
        for pattern, sparsity in self.overrides.items():
            if not 0.0 <= sparsity < 1.0:
                raise ValueError(f"'overrides' gives '{pattern}' the sparsity {sparsity}, which is outside [0, 1)")
            try:
                re.compile(pattern[3:] if pattern.startswith("re:") else "")
            except re.error as error:
                raise ValueError(f"'overrides' has '{pattern}', which is not a regular expression: {error}") from error
        if isinstance(self.sparsity, str) or (self.sparsity is not None and not 0.0 <= self.sparsity < 1.0):
            raise ValueError(f"'sparsity' = {self.sparsity} is outside [0, 1); 0.8 keeps a fifth of the weights")


@dataclass(frozen=True)
class QuantizeStage(Stage):
    """Put weights on a grid.

    Attributes:
        quantize: the quantizer.
        schedule: from when on training sees the quantized weights.
        freeze: from when on the grids stay as they are: a float in [0, 1] is a fraction of the run, an integer an
            optimizer step. Left out, they follow the weights, or train, to the end.
        solver: how the weights make up for each other's rounding, without training only.
    """

    action = "quantize"
    quantize: Use = Use("int8")
    schedule: Use = Use("oneshot")
    freeze: float | int | None = None
    solver: Use | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze is not None:
            check_moment("freeze", self.freeze)

    def freezes(self, total_steps: int) -> int:
        """The step from which on the grids stay; after the run's end if they never freeze."""
        return total_steps + 1 if self.freeze is None else step_of(self.freeze, total_steps)


@dataclass(frozen=True)
class DistillStage(Stage):
    """Learn from a teacher.

    Attributes:
        distill: the loss.
        teacher: whom from. With several, the loss is the mean of theirs.
        weight: the factor of this loss; it is added to the model's own loss.
        schedule: from when on, and at which share of the weight by then.
        cache: a folder that keeps what the teachers answered: each sample is asked about once, ever.
    """

    action = "distill"
    distill: Use = Use("kl")
    teacher: Teachers = SELF
    weight: float = 1.0
    schedule: Use = Use("oneshot")
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets != ("Linear",) or self.exclude:
            raise ValueError("'targets' and 'exclude' do not apply to a distill stage; leave them out")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"'weight' = {self.weight} is not a positive number")
        if self.cache == "":
            raise ValueError("'cache' is empty; name a folder, or leave it out")


@dataclass(frozen=True)
class RegularizeStage(Stage):
    """Push weights towards zero while they train.

    Attributes:
        regularize: the penalty.
        pattern: the groups that shall vanish together.
        schedule: from when on, and at which share of its strength by then.
    """

    action = "regularize"
    regularize: Use = Use("l1")
    pattern: Use = Use("unstructured")
    schedule: Use = Use("oneshot")


@dataclass(frozen=True)
class ActivationStage(Stage):
    """Make activations sparse.

    Attributes:
        activation: how.
        sparsity: the share of zeros to reach, in (0, 1), for those that have a threshold.
        schedule: when, and how far by then.
    """

    action = "activation"
    activation: Use = Use("relu")
    sparsity: float | None = None
    schedule: Use = Use("oneshot")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"'sparsity' = {self.sparsity} is outside (0, 1); 0.5 makes half of the values zero")


@dataclass(frozen=True)
class ShrinkStage(Stage):
    """Cut away what structured pruning has masked: the model itself becomes smaller, after everything else."""

    action = "shrink"
    shrink: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shrink:
            raise ValueError("'shrink' can only be true; leave the stage out")

    @property
    def component(self) -> Use:
        """None of its own: the name for messages."""
        return Use("model")


ACTIONS: Mapping[str, type[Stage]] = {
    stage.action: stage
    for stage in (PruneStage, RegularizeStage, ActivationStage, ShrinkStage, QuantizeStage, DistillStage)
}


@dataclass(frozen=True)
class Recipe:
    """What shall be done to a model.

    Attributes:
        stages: what to do; the phase of each (prune, then quantize) orders the finishing work.
        requires: distributions that must be installed, such as ``"sparsehooks-wanda>=1.2"``.
        seed: for every component that draws random numbers.
    """

    stages: tuple[Stage, ...]
    requires: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "requires", tuple(self.requires))

    @classmethod
    def load(cls, path: str | Path, plugins: Sequence[Any] | PluginManager = ()) -> Recipe:
        """Read a recipe file (TOML, or whatever format a plugin reads), or one of the recipes that have a name.

        Raises:
            RecipeError: if the file is missing or is not a recipe.
        """
        path = Path(path)
        if not path.exists() and str(path) in named_recipes():
            path = named_recipes()[str(path)]
        if not path.is_file():
            near = "" if path.suffix or path.is_absolute() else suggest(str(path), named_recipes())
            raise RecipeError(f"{path}: there is no such recipe file{near}")
        mapping = as_manager(plugins).load_recipe(path)
        if mapping is None:
            raise RecipeError(f"{path}: neither TOML (.toml) nor a format that a plugin reads")
        try:
            return cls.from_dict(mapping)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values, as TOML has them.

        Raises:
            RecipeError: the path inside the recipe, what is wrong, and what may be meant.
        """
        if not isinstance(mapping, Mapping):
            raise RecipeError(f"recipe: expected a table, got {mapping!r}")
        known = ("stage", "requires", "seed")
        for key in mapping:
            if key not in known:
                raise RecipeError(f"recipe: unknown key '{key}'{suggest(str(key), known)}")
        stages = mapping.get("stage", ())
        if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
            raise RecipeError("recipe: needs at least one [[stage]]")
        decoded = tuple(_stage(stage, f"recipe.stage[{index}]") for index, stage in enumerate(stages))
        rest = decode(_Head, {key: value for key, value in mapping.items() if key != "stage"}, "recipe")
        return cls(decoded, rest.requires, rest.seed)

    @classmethod
    def of(cls, recipe: Recipe | Mapping[str, Any] | str | Path, plugins: Sequence[Any] | PluginManager = ()) -> Recipe:
        """The recipe that a path, a mapping or a Recipe stands for."""
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls.from_dict(recipe)
        if isinstance(recipe, (str, Path)):
            return cls.load(recipe, plugins)
        raise RecipeError(f"expected a recipe as a path, a mapping or a Recipe, got {recipe!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``Recipe.from_dict(recipe.to_dict()) == recipe``."""
        head: dict[str, Any] = {"requires": list(self.requires)} if self.requires else {}
        if self.seed:
            head["seed"] = self.seed
        return {**head, "stage": [stage.to_dict() for stage in self.stages]}

    def digest(self) -> str:
        """A fingerprint of the recipe (sha256 of its canonical JSON, 64 hexadecimal digits).

        Where a cache lies is left out: it changes nothing that is computed.
        """
        plain = self.to_dict()
        for stage in plain["stage"]:
            stage.pop("cache", None)
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Head:
    requires: tuple[str, ...] = ()
    seed: int = 0


def named_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: methods that are combinations of components."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _stage(value: Any, path: str) -> Stage:
    if isinstance(value, Stage):
        return value
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path}: expected a table, got {value!r}")
    actions = [action for action in ACTIONS if action in value]
    if len(actions) != 1:
        near = "" if actions else next((hint for key in value if "mean" in (hint := suggest(str(key), ACTIONS))), "")
        found = f"has {' and '.join(actions)}" if actions else "has none"
        raise RecipeError(f"{path}: needs exactly one of {', '.join(ACTIONS)}; it {found}{near}")
    cls = ACTIONS[actions[0]]
    own = {item.name for item in fields(cls)}
    for key in value:
        for action, other in ACTIONS.items():
            if key not in own and key in {item.name for item in fields(other)}:
                raise RecipeError(f"{path}: '{key}' belongs to {action}, not to {cls.action}")
    return decode(cls, value, path)


def read_toml(path: Path) -> Mapping[str, Any] | None:
    """A TOML file as a mapping; None if the name does not end in ``.toml``."""
    if path.suffix != ".toml":
        return None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
