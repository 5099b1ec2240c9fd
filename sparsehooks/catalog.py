"""The components that plugins offer: one record each, looked up by kind and name, loaded on demand."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from sparsehooks.components import KINDS, ComponentBase
from sparsehooks.discovery import Plugin
from sparsehooks.errors import PluginError, suggest

PACKAGES = {
    ("backend", "cpu_pair"): "sparsehooks-cpu",
    ("backend", "cpu_quad"): "sparsehooks-cpu",
    ("backend", "cpu_unstructured"): "sparsehooks-cpu",
    ("exporter", "compressed-tensors"): "sparsehooks-compressed-tensors",
    ("exporter", "onnx"): "sparsehooks-onnx",
}
"""The packages of their own that bring components, by kind and name."""


@dataclass(frozen=True)
class Component:
    r"""What a plugin offers under a name.

    Attributes:
        kind: one of the component kinds (``sparsehooks components`` lists them).
        name: the name that recipes use; one spelling only.
        target: the class, or its import string ``"package.module:Class"``. A string keeps the plugin cheap to
            import: the class and what it needs are loaded when a recipe uses them.
        summary: one line for listings.
        shorthand: a regular expression whose named groups become options, for families of names:
            ``r"(?P<n>\d+):(?P<m>\d+)"`` lets ``"2:4"`` mean ``{ use = "n:m", n = 2, m = 4 }``.
    """

    kind: str
    name: str
    target: str | type[ComponentBase]
    summary: str
    shorthand: str | None = None


@dataclass(frozen=True)
class Record:
    """A component and the plugin that registered it."""

    component: Component
    plugin: Plugin

    def load(self) -> type[ComponentBase]:
        """The component's class.

        Raises:
            PluginError: if it cannot be imported or does not implement the contract of its kind.
        """
        where = f"{self.component.kind} '{self.component.name}' of plugin {self.plugin.describe()}"
        target = self.component.target
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            try:
                target = getattr(importlib.import_module(module), attribute)
            except Exception as error:
                raise PluginError(f"{where}: cannot load '{self.component.target}': {error}") from error
        contract = KINDS[self.component.kind]
        if not (isinstance(target, type) and issubclass(target, contract)):
            raise PluginError(f"{where}: {target!r} is not a subclass of sparsehooks.{contract.__name__}")
        missing = sorted(getattr(target, "__abstractmethods__", ()))
        if missing:
            raise PluginError(f"{where}: {target.__name__} does not implement {', '.join(missing)}()")
        if not (isinstance(target.Config, type) and is_dataclass(target.Config)):
            raise PluginError(f"{where}: the Config of {target.__name__} is not a dataclass")
        return target


class Registry:
    """What ``register_components`` receives: the one place to hand in components."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self.records: list[Record] = []

    def add(self, component: Component) -> None:
        """Offer a component.

        Raises:
            PluginError: if its kind does not exist, or its shorthand is no regular expression.
        """
        if component.kind not in KINDS:
            hint = suggest(component.kind, KINDS)
            raise PluginError(f"component '{component.name}': there is no kind '{component.kind}'{hint}")
        try:
            re.compile(component.shorthand or "")
        except re.error as error:
            raise PluginError(
                f"component '{component.name}': its shorthand is no regular expression: {error}"
            ) from error
        self.records.append(Record(component, self._plugin))


class Catalog:
    """All components of a set of plugins.

    Two components of one kind and name are kept as a conflict, which raises when a recipe needs that name: a clash
    stops nothing else.

    Args:
        records: what they registered.
        plugins: the set, with those that are broken.
    """

    def __init__(self, records: Iterable[Record], plugins: Sequence[Plugin]) -> None:
        self._plugins = plugins
        self._records: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            key = (record.component.kind, record.component.name)
            self._records.setdefault(key, []).append(record)

    def records(self, kind: str | None = None) -> list[Record]:
        """Every record, of one kind or of all, in the order of kinds and then of names."""
        order = list(KINDS)
        keys = sorted(self._records, key=lambda key: (order.index(key[0]), key[1]))
        return [record for key in keys for record in self._records[key] if kind in (None, key[0])]

    def resolve(self, kind: str, name: str, *, saved: bool = False) -> tuple[Record, Mapping[str, Any]]:
        """The record that a name in a recipe means, and the options that the name itself carries.

        Args:
            kind: of component.
            name: as it is written.
            saved: whether it meant one where it was saved, so that no other name may be meant.

        Raises:
            PluginError: if no plugin offers it, or more than one does.
        """
        if (kind, name) in self._records:
            return self._only(kind, name), {}
        matches = {
            record.component.name: match
            for record in self.records(kind)
            if record.component.shorthand and (match := re.fullmatch(record.component.shorthand, name))
        }
        if len(matches) > 1:
            raise PluginError(f"the {kind} '{name}' can mean {' or '.join(matches)}; write {{ use = NAME, ... }}")
        for full, match in matches.items():
            given = {key: value for key, value in match.groupdict().items() if value is not None}
            options = {key: int(value) if value.isdecimal() else value for key, value in given.items()}
            return self._only(kind, full), options
        if package := PACKAGES.get((kind, name)):
            hint = f"; 'pip install {package}' adds it"
        elif saved:
            hint = "; install the package that brings it"
        else:
            hint = suggest(name, [key[1] for key in self._records if key[0] == kind])
        broken = "".join(f"; plugin {p.describe()} failed to load: {p.error}" for p in self._plugins if p.error)
        raise PluginError(f"no plugin offers the {kind} '{name}'{hint}{broken}")

    def create(self, kind: str, name: str) -> ComponentBase:
        """The component with its default options, where no recipe chooses any (codecs, backends)."""
        record, _ = self.resolve(kind, name)
        return record.load()()

    def _only(self, kind: str, name: str) -> Record:
        records = self._records[kind, name]
        if len(records) > 1:
            owners = " and ".join(record.plugin.describe() for record in records)
            raise PluginError(
                f"the {kind} '{name}' is offered by {owners}; switch one off with -p no:{records[-1].plugin.name}"
            )
        return records[0]
