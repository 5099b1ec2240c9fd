"""Writing a folder that appears complete or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsehooks.errors import ArtifactError

WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?|(generation_)?config\.json")
"""Files of an earlier model, which a new one takes the place of, whether it has the same ones or not."""


@contextmanager
def atomic_folder(out: str | os.PathLike[str], may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` when the block ends, or vanishes when it raises.

    A folder that it replaces gives way as a whole; files in it that are no weights and have no successor move over.

    Args:
        out: the folder to make; missing parents are made too.
        may_replace: asked whether a folder with content that is there already may be replaced.

    Raises:
        ArtifactError: if ``out`` is refused or cannot be written.
    """
    # through links, so that a link to a folder stays one
    final = Path(os.path.realpath(out))
    _check_free(final, may_replace)
    # not beside a parent that would be left behind after a failure
    home = next(parent for parent in final.parents if parent.exists())
    temporary = home / f".{final.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        _check_free(final, may_replace)  # again: the block may have taken long
        final.parent.mkdir(parents=True, exist_ok=True)
        _move(temporary, final)
    except (OSError, SafetensorError) as error:
        culprit = error.filename if isinstance(error, OSError) else None
        if culprit is not None and not str(culprit).startswith((str(temporary), str(final))):
            raise  # something that the block did, and not the writing
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArtifactError(f"cannot write '{out}': {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(final: Path, may_replace: Callable[[Path], bool]) -> None:
    if final.exists() and not final.is_dir():
        raise ArtifactError(f"'{final}' is a file; choose a new folder")
    if final.exists() and any(final.iterdir()) and not may_replace(final):
        raise ArtifactError(f"'{final}' already holds other files; choose a new folder")


def _settle(folder: Path) -> None:
    """Ordinary permissions (safetensors writes 0600), and everything on the disk."""
    mode = folder.stat().st_mode & 0o666
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode)
        _sync(path)


def _move(temporary: Path, final: Path) -> None:
    old = temporary.with_suffix(".old")
    if final.exists():
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    if old.exists():
        for path in old.iterdir():  # what else lay there is not ours to delete
            if not WEIGHTS.fullmatch(path.name) and not (final / path.name).exists():
                path.rename(final / path.name)
        shutil.rmtree(old)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
