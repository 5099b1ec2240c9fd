"""Discovery: where plugins come from, and what is wrong with them before they are called."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sparsehooks.errors import PluginError, suggest
from sparsehooks.hookspecs import HOOKS, PROJECT


@dataclass(eq=False)
class Plugin:
    """One plugin and how it fared.

    Attributes:
        name: what ``-p no:NAME`` takes.
        source: how it was found.
        distribution: the distribution that provides it, if any.
        version: that distribution's version.
        module: the plugin itself, once it is loaded.
        error: why it cannot be used, in one line.
        blocked: whether it was switched off.
    """

    name: str
    source: Literal["builtin", "entry point", "environment", "command line", "python"]
    distribution: str | None = None
    version: str | None = None
    module: Any = None
    error: str | None = None
    blocked: bool = False
    components: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """``'name' (distribution version)``."""
        owner = f" ({self.distribution} {self.version})" if self.distribution else f" ({self.source})"
        return f"'{self.name}'{owner}"

    @property
    def status(self) -> str:
        """``ok``, ``off``, or the error."""
        return "off" if self.blocked else self.error or "ok"

    @property
    def hooks(self) -> list[str]:
        """The hooks that it implements."""
        return [name for name, _ in implementations(self.module)] if self.module is not None else []


def implementations(plugin: Any) -> list[tuple[str, Callable[..., Any]]]:
    """The hook implementations of a plugin: (hook name, function)."""
    return [(options.get("specname") or name, getattr(plugin, name)) for name, options in marked(plugin)]


def marked(plugin: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The attributes that carry the marker, and its options; properties are not run."""
    for attribute in dir(plugin):
        function = inspect.getattr_static(plugin, attribute, None)
        options = getattr(getattr(function, "__func__", function), f"{PROJECT}_impl", None)
        if options is not None:
            yield attribute, options


def check_implementations(plugin: Any) -> None:
    """What pluggy does not check: misspelt names, arguments it would never pass, wrappers, forgotten markers.

    Raises:
        PluginError: in one sentence.
    """
    if isinstance(plugin, type):
        raise PluginError(f"{plugin.__name__} is a class; register an instance of it")
    for name, function in implementations(plugin):
        if name not in HOOKS:
            raise PluginError(f"there is no hook '{name}'{suggest(name, HOOKS)}")
        if inspect.isgeneratorfunction(function):
            raise PluginError(f"{name}() contains 'yield': hook wrappers are not supported")
        allowed = list(inspect.signature(HOOKS[name]).parameters)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in allowed:
                hint = suggest(parameter.name, allowed)
                raise PluginError(f"{name}() has no argument '{parameter.name}'{hint}")
            if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                raise PluginError(f"{name}(): '{parameter.name}' must be a plain positional argument")
    marked = {name for name, _ in implementations(plugin)}
    for name in HOOKS:
        function = inspect.getattr_static(plugin, name, None)
        function = getattr(function, "__func__", function)
        own = inspect.isfunction(function) and function is not HOOKS[name]
        if own and name not in marked:
            raise PluginError(f"{name}() is named like a hook but not marked with @sparsehooks.hookimpl")


def importer(module: str) -> Callable[[], Any]:
    """A call that imports a module."""
    return lambda: importlib.import_module(module)


def import_file(path: Path) -> Any:
    """Import a file under its stem, so that ``target="stem:Class"`` works and pickling finds it."""
    if not path.is_file():
        raise PluginError(f"there is no file '{path}'")
    if path.stem in sys.modules:
        loaded = getattr(sys.modules[path.stem], "__file__", None)
        if loaded is not None and Path(loaded).resolve() == path.resolve():
            return sys.modules[path.stem]
        raise PluginError(f"'{path}' would hide the module '{path.stem}'; rename the file")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None  # a .py file always has one,
    assert specification.loader is not None  # and a loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def from_entry_point(entry: metadata.EntryPoint, source: Any) -> Plugin:
    """The plugin of an entry point, not loaded yet."""
    return Plugin(entry.name, source, *distribution_of(entry))


def distribution_of(entry: metadata.EntryPoint) -> tuple[str | None, str | None]:
    """The name and version of an entry point's distribution; None where its metadata is damaged."""
    try:
        return (entry.dist.name, entry.dist.version) if entry.dist else (None, None)
    except Exception:  # noqa: BLE001 - a half-removed distribution raises differently in each version of Python
        return None, None


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return None


def require(requirements: Iterable[str]) -> list[str]:
    """The problems with a recipe's ``requires``: distributions that are missing or have the wrong version."""
    from packaging.requirements import InvalidRequirement, Requirement  # a dependency of transformers

    problems = []
    for text in requirements:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            problems.append(f"recipe.requires: '{text}' is not a requirement such as 'sparsehooks-wanda>=1.2'")
            continue
        version = version_of(wanted.name)
        if version is None:
            problems.append(f"recipe.requires: '{wanted.name}' is not installed; run pip install '{text}'")
        elif not wanted.specifier.contains(version, prereleases=True):
            problems.append(f"recipe.requires: '{text}' is needed, {wanted.name} {version} is installed")
    return problems
