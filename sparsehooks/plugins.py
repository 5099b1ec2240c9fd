"""Plugins: find, sort, isolate and list them, and name the plugin in every failure."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from sparsehooks import hookspecs
from sparsehooks.catalog import Catalog, Record, Registry
from sparsehooks.discovery import (
    Plugin,
    check_implementations,
    distribution_of,
    from_entry_point,
    implementations,
    import_file,
    importer,
    marked,
    version_of,
)
from sparsehooks.errors import PluginError, SparseHooksError, suggest

if TYPE_CHECKING:
    from sparsehooks.masks import MaskChange
    from sparsehooks.plan import Plan
    from sparsehooks.views import SessionView

ENTRY_POINTS = "sparsehooks"
BUILTINS = (
    "toml",
    "criteria",
    "patterns",
    "allocations",
    "schedules",
    "regularizers",
    "activations",
    "solvers",
    "quantizers",
    "distillers",
    "codecs",
    "kernels",
    "backends",
    "exporters",
)
"""The built-in plugins, each the module ``sparsehooks.builtin.NAME``; they come in through the same door as others."""


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
            self._load(Plugin(name, "builtin", "sparsehooks", version_of("sparsehooks")), importer(module))
        entry_points = sorted(
            metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: (distribution_of(entry)[0] or "", entry.name)
        )
        if autoload and os.environ.get("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "") in ("", "0"):
            for entry in entry_points:
                self._load(from_entry_point(entry, "entry point"), entry.load)
        for source, name in named:
            if not name.startswith("no:"):
                self._load_named(name, source, entry_points)
        for item in plugins:
            if not isinstance(item, (str, Path)):
                self._load(Plugin(self._free_name(item), "python"), functools.partial(_itself, item))
        known = {plugin.name for plugin in self.plugins}
        for name in sorted(self._blocked - known):
            raise PluginError(f"-p no:{name}: there is no plugin '{name}'{suggest(name, known)}")
        self.catalog = Catalog(self.register_components(), self.plugins)

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
                        function(*((registry,) if inspect.signature(function).parameters else ()))
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
        """The call for the path of every step, resolved once: nothing at all if no plugin listens."""
        listeners = tuple(self._listeners("step_finished"))
        if not listeners:
            return _nothing

        def tell(session: SessionView, step: int) -> None:
            for plugin, function, names in listeners:
                arguments = {"session": session, "step": step}
                with _attributed(plugin, "hook step_finished()"):
                    function(**{name: arguments[name] for name in names})

        return tell

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
        for plugin, function, names in self._listeners(hook):
            yield plugin, functools.partial(function, **{name: arguments[name] for name in names})

    def _listeners(self, hook: str) -> Iterator[tuple[Plugin, Callable[..., Any], tuple[str, ...]]]:
        named = {plugin.name: plugin for plugin in self.plugins}
        for implementation in reversed(getattr(self._pluggy.hook, hook).get_hookimpls()):
            names = (*implementation.argnames, *implementation.kwargnames)
            yield named[implementation.plugin_name], implementation.function, names

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
            self._load(Plugin(path.stem, source), lambda: import_file(path))
        elif all(known.name != name for known in self.plugins):
            entry = next((entry for entry in entry_points if entry.name == name), None)
            if entry is None:
                self._load(Plugin(name, source), importer(name))
            else:
                self._load(from_entry_point(entry, source), entry.load)

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
                if not plugin.hooks:
                    raise PluginError("it implements no hook, so it is no plugin of sparsehooks")
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
        for attribute, _ in marked(plugin):
            setattr(self, attribute, getattr(plugin, attribute))


@contextmanager
def _attributed(plugin: Plugin, where: str) -> Iterator[None]:
    """Add to an error which plugin raised it; its type stays."""
    try:
        yield
    except Exception as error:
        if plugin.source == "builtin" and isinstance(error, SparseHooksError):
            raise  # a sentence of ours about what the user gave
        error.add_note(f"sparsehooks: raised by plugin {plugin.describe()} in {where}")
        error.add_note(f"             to run without it: -p no:{plugin.name}")
        raise


def attributed(record: Record) -> AbstractContextManager[None]:
    """Add to an error raised inside a component which plugin it belongs to; its type stays."""
    return _attributed(record.plugin, f"{record.component.kind} '{record.component.name}'")


def as_manager(plugins: Sequence[Any] | PluginManager = ()) -> PluginManager:
    """The manager itself, or a new one with these plugins, which warns of those that are broken."""
    if isinstance(plugins, PluginManager):
        return plugins
    manager = PluginManager(plugins)
    for plugin in manager.broken():
        warnings.warn(f"plugin {plugin.describe()} could not be loaded: {plugin.error}", stacklevel=3)
    return manager


def installed_catalog() -> Catalog:
    """The components of the installed, enabled plugins: all that opening a file may use.

    In a command these are the plugins that its command line asks for.
    """
    return (_of_command[-1] if _of_command else _found()).catalog


_of_command: list[PluginManager] = []


@contextmanager
def installed(manager: PluginManager) -> Iterator[None]:
    """Let these plugins be the installed ones of the whole process."""
    _of_command.append(manager)
    try:
        yield
    finally:
        _of_command.pop()


@functools.cache
def _found() -> PluginManager:
    return PluginManager()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _nothing(session: SessionView, step: int) -> None:
    """The step hook of a run that nobody listens to."""


def _itself(item: Any) -> Any:
    return item
