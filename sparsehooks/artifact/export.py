"""Handing a saved model to other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from sparsehooks.artifact.folder import new_folder
from sparsehooks.artifact.reading import Folder
from sparsehooks.catalog import PACKAGES
from sparsehooks.components import Exporter
from sparsehooks.decoding import decode
from sparsehooks.errors import PluginError, SparseHooksError
from sparsehooks.plugins import as_manager, attributed
from sparsehooks.recipe import Use

if TYPE_CHECKING:
    from sparsehooks.catalog import Catalog, Record
    from sparsehooks.plugins import PluginManager


def export(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str | Mapping[str, Any],  # noqa: A002 - the name that the command line has
    *,
    plugins: Sequence[Any] | PluginManager = (),
) -> str:
    """Write a saved model in the format of another program.

    Args:
        folder: one that sparsehooks saved; it stays as it is.
        out: the folder to make; it must not exist, or be empty.
        format: the name of an exporter, or a table with its options: ``{"use": "onnx", "opset": 20}``.
        plugins: as ``PluginManager`` takes them.

    Returns:
        one line: what was written, and how close it is to the model.

    Raises:
        ArtifactError: if ``folder`` is missing, damaged, not from sparsehooks or not for this format, or ``out``
            cannot be written; then nothing is left of it.
        PluginError: if no plugin offers the format, or something that it needs is not installed.
        RecipeError: if the format has no such option.
    """
    source = Folder.open(folder)
    record, exporter = _find(Use.__decode__(format, "format"), as_manager(plugins).catalog)
    with new_folder(out, replace=False) as temporary:
        try:
            said = exporter.export(source.path, temporary)
        except SparseHooksError:
            raise  # a sentence about the model
        except Exception:
            with attributed(record):
                raise
        source.check_in_place()
    return said


def _find(use: Use, catalog: Catalog) -> tuple[Record, Exporter]:
    """The exporter that a name means, with its options."""
    try:
        record, options = catalog.resolve("exporter", use.use)
    except PluginError as error:
        offered = {found.component.name for found in catalog.records("exporter")}
        if use.use in offered or ("exporter", use.use) in PACKAGES:
            raise  # by two plugins, or the sentence names the package
        others = sorted(
            {package for (kind, name), package in PACKAGES.items() if kind == "exporter" and name not in offered}
        )
        raise PluginError(f"{error}; more in {' and '.join(others)}" if others else str(error)) from error
    cls = record.load()
    config: Any = decode(cls.Config, {**options, **use.options}, f"format '{use.use}'")
    return record, cast("Exporter", cls(config))
