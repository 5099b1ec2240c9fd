"""Plugins: find, sort, isolate and list them, and name the plugin in every failure."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from sparsehooks import hookspecs
from sparsehooks.catalog import Catalog, Record, Registry, suggest
from sparsehooks.errors import PluginError

if TYPE_CHECKING:
    from sparsehooks.masks import MaskChange
    from sparsehooks.plan import Plan
    from sparsehooks.session import SessionView

ENTRY_POINTS = "sparsehooks"
BUILTINS = (
    "toml",
    "criteria",
    "patterns",
    "allocations",
    "schedules",
    "quantizers",
    "distillers",
    "codecs",
    "backends",
)
"""The built-in plugins, each the module ``sparsehooks.builtin.NAME``; they come in through the same door as others."""

HOOKS: Mapping[str, Callable[..., Any]] = {
    name: value for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")
}
"""Every hook by name, in the order in which a run calls them."""


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


class PluginManager:
    """A set of plugins: the typed way to call their hooks.

    Found in this order, which is also the order of listings: built-ins, entry points of the group ``sparsehooks``
    sorted by distribution name, ``SPARSEHOOKS_PLUGINS`` (a comma-separated list), names given here, objects given
    here. A plugin that cannot be imported or does not fit the hooks is kept with its error and left out.

    Args:
        plugins: objects (modules, instances), names of entry points or modules, paths of ``.py`` files, and
            ``"no:NAME"`` to switch a plugin off.
        autoload: whether to load entry points; ``SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD=1`` switches this off too.
    """

    def __init__(self, plugins: Sequence[Any] = (), *, autoload: bool = True) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        asked = [name.strip() for name in os.environ.get("SPARSEHOOKS_PLUGINS", "").split(",") if name.strip()]
        named = [("environment", name) for name in asked]
        named += [("command line", str(item)) for item in plugins if isinstance(item, (str, Path))]
        self._blocked = {name[3:] for _, name in named if name.startswith("no:")}
        for name in BUILTINS:
            module = f"sparsehooks.builtin.{name}"
            self._load(Plugin(name, "builtin", "sparsehooks", _version("sparsehooks")), _importer(module))
        entry_points = sorted(
            metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: (_distribution(entry)[0] or "", entry.name)
        )
        if autoload and os.environ.get("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "") in ("", "0"):
            for entry in entry_points:
                self._load(_from_entry_point(entry, "entry point"), entry.load)
        for source, name in named:
            if not name.startswith("no:"):
                self._load_named(name, source, entry_points)
        for item in plugins:
            if not isinstance(item, (str, Path)):
                self._load(Plugin(self._free_name(item), "python"), functools.partial(_itself, item))
        known = {plugin.name for plugin in self.plugins}
        for name in sorted(self._blocked - known):
            raise PluginError(f"-p no:{name}: there is no plugin '{name}'{suggest(name, known)}")
        self.catalog = Catalog(self)

    def broken(self) -> list[Plugin]:
        """The plugins that could not be loaded."""
        return [plugin for plugin in self.plugins if plugin.error]

    # ------------------------------------------------------------------------------------------ typed hook calls

    def register_components(self) -> list[Record]:
        """Call each plugin on its own; one that raises is kept with its error and offers nothing."""
        records: list[Record] = []
        for plugin in self.plugins:
            if plugin.error or plugin.blocked:
                continue
            registry = Registry(plugin)
            try:
                for name, function in implementations(plugin.module):
                    if name == "register_components":
                        function(*((registry,) if _arguments(function) else ()))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one plugin must not stop the others
                plugin.error = _one_line(error)
                self._pluggy.unregister(name=plugin.name)
                continue
            records += registry.records
            plugin.components = [f"{r.component.kind} {r.component.name}" for r in registry.records]
        return records

    def load_recipe(self, path: Path) -> Mapping[str, Any] | None:
        """The mapping of the first plugin that knows the file."""
        answers = (answer for _, answer in self._each("load_recipe", path=path))
        return next((answer for answer in answers if answer is not None), None)

    def check_plan(self, plan: Plan) -> list[str]:
        """The problems of all plugins."""
        problems: list[str] = []
        for plugin, answer in self._each("check_plan", plan=plan):
            with _attributed(plugin, "hook check_plan()"):
                problems += [answer] if isinstance(answer, str) else answer or ()
        return problems

    def session_started(self, session: SessionView) -> None:
        """Tell every plugin."""
        self._tell("session_started", session=session)

    def stage_changed(self, session: SessionView, stage: str, status: hookspecs.StageStatus) -> None:
        """Tell every plugin."""
        self._tell("stage_changed", session=session, stage=stage, status=status)

    def masks_updated(self, session: SessionView, stage: str, step: int, changes: Mapping[str, MaskChange]) -> None:
        """Tell every plugin."""
        self._tell("masks_updated", session=session, stage=stage, step=step, changes=changes)

    def step_finished(self) -> Callable[[SessionView, int], None]:
        """The call for the path of every step: nothing at all if no plugin listens."""
        if not self._pluggy.hook.step_finished.get_hookimpls():
            return _nothing
        return lambda session, step: self._tell("step_finished", session=session, step=step)

    def metrics_reported(self, session: SessionView, metrics: Mapping[str, float]) -> None:
        """Tell every plugin."""
        self._tell("metrics_reported", session=session, metrics=metrics)

    def artifact_metadata(self, session: SessionView) -> dict[str, dict[str, str]]:
        """What each plugin adds, under its name."""
        added = {}
        for plugin, answer in self._each("artifact_metadata", session=session):
            with _attributed(plugin, "hook artifact_metadata()"):
                if answer:
                    added[plugin.name] = {str(key): str(value) for key, value in answer.items()}
        return added

    def session_finished(self, session: SessionView, error: BaseException | None) -> None:
        """Tell every plugin, whatever the others raise; their errors are raised together."""
        errors: list[Exception] = []
        for plugin, call in self._calls("session_finished", session=session, error=error):
            try:
                with _attributed(plugin, "hook session_finished()"):
                    call()
            except Exception as raised:  # noqa: BLE001 - raised again, with those of the others
                errors.append(raised)
        if errors:
            raise ExceptionGroup("plugins failed in session_finished()", errors)

    def _calls(self, hook: str, **arguments: Any) -> Iterator[tuple[Plugin, Callable[[], Any]]]:
        """The plugins that implement a hook, in the order of calls, each with its call."""
        named = {plugin.name: plugin for plugin in self.plugins}
        for implementation in reversed(getattr(self._pluggy.hook, hook).get_hookimpls()):
            names = (*implementation.argnames, *implementation.kwargnames)
            given = {name: arguments[name] for name in names}
            yield named[implementation.plugin_name], functools.partial(implementation.function, **given)

    def _each(self, hook: str, **arguments: Any) -> Iterator[tuple[Plugin, Any]]:
        """What each plugin answers, one after the other."""
        for plugin, call in self._calls(hook, **arguments):
            with _attributed(plugin, f"hook {hook}()"):
                answer = call()
            yield plugin, answer

    def _tell(self, hook: str, **arguments: Any) -> None:
        for _ in self._each(hook, **arguments):
            pass

    # --------------------------------------------------------------------------------------------------- loading

    def _load_named(self, name: str, source: Any, entry_points: Sequence[metadata.EntryPoint]) -> None:
        if name.endswith(".py"):
            path = Path(name)
            self._load(Plugin(path.stem, source), lambda: _import_file(path))
        elif all(known.name != name for known in self.plugins):
            entry = next((entry for entry in entry_points if entry.name == name), None)
            if entry is None:
                self._load(Plugin(name, source), _importer(name))
            else:
                self._load(_from_entry_point(entry, source), entry.load)

    def _load(self, plugin: Plugin, importer: Callable[[], Any]) -> None:
        """Import, check and register a plugin, or keep what is wrong with it; one that is there already stays alone."""
        plugin.blocked = plugin.name in self._blocked
        if not plugin.blocked:
            try:
                plugin.module = importer()
                if any(known.module is plugin.module for known in self.plugins):
                    return
                namesake = next((known for known in self.plugins if known.name == plugin.name), None)
                if namesake is not None:
                    raise PluginError(f"its name is taken by plugin {namesake.describe()}")
                check_implementations(plugin.module)
                self._pluggy.register(_Implementations(plugin.module), name=plugin.name)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one plugin must not stop the others
                plugin.error = _one_line(error)
        self.plugins.append(plugin)

    def _free_name(self, item: Any) -> str:
        """The name of an object's module or class, with a number if that is taken."""
        base = getattr(item, "__name__", type(item).__name__)
        taken = {plugin.name for plugin in self.plugins}
        numbered = (f"{base}-{number}" for number in itertools.count(2))
        return next(name for name in itertools.chain([base], numbered) if name not in taken)


class _Implementations:
    """The hook implementations of a plugin: what pluggy gets, because it compares plugins by their own ``==``."""

    def __init__(self, plugin: Any) -> None:
        for attribute, _ in _marked(plugin):
            setattr(self, attribute, getattr(plugin, attribute))


@contextmanager
def _attributed(plugin: Plugin, where: str) -> Iterator[None]:
    """Add to an error which plugin raised it; its type stays."""
    try:
        yield
    except Exception as error:
        error.add_note(f"sparsehooks: raised by plugin {plugin.describe()} in {where}")
        error.add_note(f"             to run without it: -p no:{plugin.name}")
        raise


def attributed(record: Record) -> AbstractContextManager[None]:
    """Add to an error raised inside a component which plugin it belongs to; its type stays."""
    return _attributed(record.plugin, f"{record.component.kind} '{record.component.name}'")


def as_manager(plugins: Sequence[Any] | PluginManager = ()) -> PluginManager:
    """The manager itself, or a new one with these plugins."""
    return plugins if isinstance(plugins, PluginManager) else PluginManager(plugins)


@functools.cache
def installed_catalog() -> Catalog:
    """The components of the installed, enabled plugins: all that opening a file may use."""
    return PluginManager().catalog


def implementations(plugin: Any) -> list[tuple[str, Callable[..., Any]]]:
    """The hook implementations of a plugin: (hook name, function)."""
    return [(options.get("specname") or name, getattr(plugin, name)) for name, options in _marked(plugin)]


def _marked(plugin: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The attributes that carry the marker, and its options; properties are not run."""
    for attribute in dir(plugin):
        function = inspect.getattr_static(plugin, attribute, None)
        options = getattr(getattr(function, "__func__", function), f"{hookspecs.PROJECT}_impl", None)
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


def _arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _nothing(session: SessionView, step: int) -> None:
    """The step hook of a run that nobody listens to."""


def _itself(item: Any) -> Any:
    return item


def _importer(module: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(module)


def _import_file(path: Path) -> Any:
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


def _from_entry_point(entry: metadata.EntryPoint, source: Any) -> Plugin:
    return Plugin(entry.name, source, *_distribution(entry))


def _distribution(entry: metadata.EntryPoint) -> tuple[str | None, str | None]:
    """The name and version of an entry point's distribution; None where its metadata is damaged."""
    try:
        return (entry.dist.name, entry.dist.version) if entry.dist else (None, None)
    except Exception:  # noqa: BLE001 - a half-removed distribution raises differently in each version of Python
        return None, None


def _version(distribution: str) -> str | None:
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
        version = _version(wanted.name)
        if version is None:
            problems.append(f"recipe.requires: '{wanted.name}' is not installed; run pip install '{text}'")
        elif not wanted.specifier.contains(version, prereleases=True):
            problems.append(f"recipe.requires: '{text}' is needed, {wanted.name} {version} is installed")
    return problems
