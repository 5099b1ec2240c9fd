"""Writing a file or a folder that appears complete or not at all."""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sparsehooks.errors import ArtifactError

WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?|(generation_)?config\.json")
"""Files of an earlier model, which a new one takes the place of, whether it has the same ones or not."""
_HERE = -100
_EXCHANGE = 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""
OLD = 86400.0
"""Seconds after which a temporary file that nobody writes to is taken for one that a killed run left."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that becomes it when the block ends, or vanishes when it raises.

    It is on the disk before it gets its name. Old temporary files of killed runs in the folder are removed.

    Args:
        path: the file to make or to replace; missing parents are made too.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_old(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        temporary.chmod(mode)  # safetensors writes 0600
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync(path.parent)


def _remove_old(folder: Path) -> None:
    for path in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):  # another rank may be faster
            if path.is_file() and time.time() - path.stat().st_mtime > OLD:
                path.unlink()


@contextmanager
def atomic_folder(out: str | os.PathLike[str], may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` when the block ends, or vanishes when it raises.

    A folder that it replaces gives way as a whole; files in it that are no weights and have no successor stay. On
    Linux both change places at once: whoever looks finds the old folder or the new one, complete.

    Args:
        out: the folder to make; missing parents are made too.
        may_replace: asked whether a folder with content that is there already may be replaced.

    Raises:
        ArtifactError: if ``out`` is refused or cannot be written.
    """
    # through links, so that a link to a folder stays one
    final = Path(os.path.realpath(out))
    # not beside a parent that would be left behind after a failure
    home = next(parent for parent in final.parents if parent.exists())
    temporary = home / f".{final.name}.{secrets.token_hex(4)}.tmp"
    _clear_up(home, final, may_replace)
    _check_free(final, may_replace)
    lock, unmoved = None, False
    try:
        temporary.mkdir()
        lock = _lock(temporary)
        yield temporary
        _check_free(final, may_replace)  # again: the block may have taken long
        _move(temporary, final)
        unmoved = True
        _keep_others(temporary, final, os.rename)  # what appeared meanwhile
        unmoved = False
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not _is_ours(error, temporary, final):
            raise  # something that the block did, and not the writing
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if unmoved:
            kept = temporary.rename(temporary.with_suffix(".kept"))  # the next run would remove the temporary one
            what = f"'{out}' is written, but other files of the old folder are still in '{kept}': {reason}"
            raise ArtifactError(what) from error
        raise ArtifactError(f"cannot write '{out}': {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # now perhaps the folder that was replaced
        if lock is not None:
            os.close(lock)


def _is_ours(error: OSError, temporary: Path, final: Path) -> bool:
    """Whether an error came of writing the folder; those of other work have no number, or name another file."""
    if error.filename is None:
        return error.errno is not None
    named = str(error.filename)
    return named.startswith((str(temporary), str(final))) or Path(named) in final.parents


def _check_free(final: Path, may_replace: Callable[[Path], bool]) -> None:
    if final.exists() and not final.is_dir():
        raise ArtifactError(f"'{final}' is a file; choose a new folder")
    if final.exists() and any(final.iterdir()) and not may_replace(final):
        raise ArtifactError(f"'{final}' already holds other files; choose a new folder")


def _clear_up(home: Path, final: Path, is_replaceable: Callable[[Path], bool]) -> None:
    """Undo what killed runs left: their temporary folders, which nobody has locked any more, and steps half done."""
    pattern = f".{glob.escape(final.name)}.{'[0-9a-f]' * 8}"
    for path in home.glob(f"{pattern}.tmp"):
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
    for path in filter(is_replaceable, home.glob(f"{pattern}.old")):
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends; None if it is locked or cannot be."""
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _move(temporary: Path, final: Path) -> None:
    """Let a finished folder take its place; one that lies there goes to the temporary place."""
    replaced = final.exists()
    mode = temporary.stat().st_mode & 0o666
    for path in temporary.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors writes 0600
            _sync(path)
    if replaced:
        _keep_others(final, temporary, _link)
    for folder, _, _ in os.walk(temporary):
        _sync(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    if not replaced:
        temporary.rename(final)
    elif not _exchange(temporary, final):
        _exchange_in_steps(temporary, final)


def _keep_others(old: Path, new: Path, place: Callable[[Path, Path], object]) -> None:
    """What else lies in the old folder is not ours to delete."""
    for path in old.iterdir() if old.exists() else ():
        if not WEIGHTS.fullmatch(path.name):
            _keep(path, new / path.name, place)


def _keep(path: Path, target: Path, place: Callable[[Path, Path], object]) -> None:
    if not os.path.lexists(target):
        place(path, target)
    elif not path.is_symlink() and path.is_dir() and target.is_dir():
        for inner in path.iterdir():
            _keep(inner, target / inner.name, place)


def _link(source: Path | str, target: Path | str) -> None:
    """Make a file or folder appear in a second place; its files are the same ones where the file system has links."""
    if Path(source).is_dir() and not Path(source).is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places at once; False where the system or the file system cannot, or does not want to."""
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


def _exchange_in_steps(temporary: Path, final: Path) -> None:
    """The same with a moment at which neither is in its place."""
    old = temporary.with_suffix(".old")
    final.rename(old)
    try:
        temporary.rename(final)
    except BaseException:
        old.rename(final)
        raise
    old.rename(temporary)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
