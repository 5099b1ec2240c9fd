"""Make transformers able to open our artifacts, in whichever order the two are imported.

transformers has no entry point for quantizers, so importing sparsehooks has to register one. Importing transformers
for that would be slow and unasked for: if it is not there yet, a finder waits for ``transformers.quantizers``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

QUANTIZERS = "transformers.quantizers"


def register() -> None:
    """Register the quantizer now if transformers is loaded, else as soon as it is. Never raises."""
    loaded = sys.modules.get(QUANTIZERS)
    if loaded is None:
        if not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting())
        return
    specification = getattr(loaded, "__spec__", None)
    if getattr(specification, "_initializing", False):
        importlib.import_module(QUANTIZERS)  # waits for the thread that imports it
    _register()


def _register() -> None:
    try:
        importlib.import_module("sparsehooks.artifact.quantizer")  # registers at its end
    except Exception as error:  # noqa: BLE001 - whatever it is must never become a broken ``import transformers``
        warnings.warn(f"sparsehooks could not register with transformers: {error!r}", RuntimeWarning, stacklevel=2)


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds ``transformers.quantizers`` the ordinary way, once, and registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        specification = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if specification is not None and specification.loader is not None:
            specification.loader = _Loader(specification.loader)
        return specification


class _Loader(importlib.abc.Loader):
    def __init__(self, original: importlib.abc.Loader) -> None:
        self._original = original

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._original
        if module.__spec__ is not None:
            module.__spec__.loader = self._original
        self._original.exec_module(module)
        _register()
