"""Teacher outputs on disk: each sample is asked about once, and read ever after.

A cache is a folder with one folder a teacher, named by the fingerprint of its weights and config. In it lie
safetensors files that appear complete and never change. A file holds, for many samples, the outputs that a loss has
read; a tensor's name is ``sample/output#form``:

* sample: a digest of the sample's own inputs as the teacher gets them, without padding. The order of the samples, what
  else is in their batch and the padding behind them change nothing. Padding before them does: it moves positions.
* output: a key of the model output, such as ``logits``; of a tuple one of its tensors, such as ``hidden_states/6``.
* form: how the sample's part was cut out of the batch, see ``Samples.form``; or ``absent``, where the teacher was asked
  and gave no such output.

The metadata has the number of tensors of each tuple, and a CRC-32 of each tensor's bytes, which is compared before the
values are used.
"""

from __future__ import annotations

import json
import secrets
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
from accelerate.state import GradientState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsehooks.artifact.atomic import atomic_file
from sparsehooks.distributed import rank, world_size
from sparsehooks.errors import SessionError
from sparsehooks.samples import Samples, raw_bytes, samples_of

VERSION = 1
FLUSH = 1 << 26
"""Bytes of answers that are held in memory before they become a file."""
SECONDS = 30.0
"""Fewer become one after this time, so that no more is lost with a killed run."""
AGAIN = 3.0
"""The same once they are wanted again: an epoch has passed, and other ranks look for them."""
ABSENT = "absent"

Ask = Callable[[], Mapping[str, Any]]


class TeacherCache:
    """What one teacher has answered.

    What is trained is worth more than the cache: where it cannot be written a run is warned once, keeps no more and
    goes on.

    Args:
        folder: of the cache; it may hold answers of other teachers.
        fingerprint: of the teacher, in hexadecimal.
        pads: whether the attention mask says which tokens of a sample are padding; not for encoder-decoders, of which
            padding counts as part of the sample.

    Raises:
        SessionError: if the folder cannot be made, or a file in it is damaged.
    """

    def __init__(self, folder: Path, fingerprint: str, *, pads: bool = True) -> None:
        self._folder = folder / fingerprint[:32]
        self._pads = pads
        self._files: dict[Path, _File] = {}
        self._places: dict[str, tuple[_File, str]] = {}
        self._pending: dict[str, tuple[Tensor, str]] = {}
        self._bytes = 0
        self._again = False
        self._flushed = time.monotonic()
        self._keeps = True
        self.counts: dict[str, int] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SessionError(f"the teacher cache '{folder}' cannot be made: {error.strerror}") from error
        self._scan()
        if not self._files and any(folder.glob("*/*.safetensors")):
            warnings.warn(
                f"the teacher cache '{folder}' holds answers of other teachers only: they are not used, and those of "
                "this one are added",
                stacklevel=2,
            )

    def answer(self, inputs: Mapping[str, Any], ask: Ask) -> Mapping[str, Any]:
        """The teacher's outputs for a batch, as a mapping that reads them, or asks for them, when a loss wants them.

        Args:
            inputs: the keyword arguments that the teacher gets.
            ask: its forward on them.

        Raises:
            SessionError: if the inputs do not fall into samples.
        """
        return _Answer(self, samples_of(inputs, pads=self._pads), ask)

    def find(self, batch: Samples, output: str) -> Tensor | None:
        """An output for a batch, on its device; padding is zero. None if it is not there for all samples.

        Raises:
            KeyError: if the teacher gives no such output.
        """
        found = [self._find(f"{sample}/{output}") for sample in batch.digests]
        if world_size() > 1 and None in found:
            self._scan()  # other ranks may have asked meanwhile
            found = [self._find(f"{sample}/{output}") for sample in batch.digests]
        rows = [entry for entry in found if entry is not None]
        forms = {form for _, form in rows}
        if len(rows) < len(found) or len(forms) > 1:
            return None
        if forms == {ABSENT}:
            raise KeyError(output)
        return batch.join([row for row, _ in rows], forms.pop())

    def keep(self, batch: Samples, output: str, value: Tensor | None) -> None:
        """Take in an output for a batch, of the samples that lack it; None if the teacher gives no such output.

        Raises:
            SessionError: if it does not fall into samples.
        """
        if value is not None and (not value.dim() or len(value) != len(batch.digests)):
            raise SessionError(
                f"a teacher cache keeps samples, and the teacher's '{output}' of shape {tuple(value.shape)} has none; "
                "leave 'cache' out"
            )
        if not self._keeps:
            return
        form = ABSENT if value is None else batch.form(value)
        value = None if value is None else value.detach().cpu()
        for index, sample in enumerate(batch.digests):
            name = f"{sample}/{output}"
            if name not in self._pending and name not in self._places:
                row = torch.empty(0) if value is None else batch.cut(value, index, form)
                self._pending[name] = row, form
                self._bytes += row.nbytes

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def flush(self, *, due: bool = False) -> None:
        """Write what is held in memory to a new file.

        Args:
            due: only if it is much or old, or an epoch ends, for in the next one other ranks look for it.
        """
        if not self._pending or (due and not self._is_due()):
            return
        tensors = {f"{name}#{form}": row for name, (row, form) in self._pending.items()}
        metadata = {"version": VERSION, "counts": self.counts, "crc": {n: _crc(row) for n, row in tensors.items()}}
        path = self._folder / f"{rank()}-{secrets.token_hex(8)}.safetensors"
        try:
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, {"sparsehooks": json.dumps(metadata)})
            self._open(path)
        except (OSError, SafetensorError, SessionError) as error:
            self._keeps = False
            warnings.warn(
                f"the teacher cache '{self._folder}' cannot be written, so the run keeps no more answers: {error}",
                stacklevel=2,
            )
        self._pending.clear()
        self._bytes = 0
        self._again = False
        self._flushed = time.monotonic()

    def _is_due(self) -> bool:
        old = time.monotonic() - self._flushed > (AGAIN if self._again else SECONDS)
        return self._bytes >= FLUSH or old or GradientState().end_of_dataloader

    def _find(self, name: str) -> tuple[Tensor, str] | None:
        if name in self._pending:
            self._again = True
            return self._pending[name]
        if name not in self._places:
            return None
        file, form = self._places[name]
        return file.read(f"{name}#{form}"), form

    def _scan(self) -> None:
        """Take in the files that are new."""
        for path in sorted(self._folder.glob("*.safetensors")):
            if path not in self._files:
                self._open(path)

    def _open(self, path: Path) -> None:
        file = self._files[path] = _File(path)
        self.counts.update(file.counts)
        for name in file.names:
            place, _, form = name.rpartition("#")
            self._places.setdefault(place, (file, form))


class _File:
    """A file of answers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = file = cast(Any, safe_open(path, "pt"))
            metadata = json.loads((file.metadata() or {})["sparsehooks"])
            version, self.counts, self._crc = metadata["version"], dict(metadata["counts"]), dict(metadata["crc"])
            self.names = set(file.keys())
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged() from error
        if version != VERSION:
            raise SessionError(f"'{path}' in the teacher cache has version {version}; upgrade sparsehooks or delete it")
        if self.names != self._crc.keys():
            raise self._damaged()

    def read(self, name: str) -> Tensor:
        """A tensor, after its bytes were checked."""
        row: Tensor = self._file.get_tensor(name)
        if _crc(row) != self._crc[name]:
            raise self._damaged()
        return row

    def _damaged(self) -> SessionError:
        return SessionError(
            f"'{self._path}' in the teacher cache is damaged; delete it, and the teacher is asked again"
        )


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(raw_bytes(tensor))


class _Answer(Mapping[str, Any]):
    """The model output of a teacher that is asked only for what the cache lacks; what a loss reads is kept."""

    def __init__(self, cache: TeacherCache, batch: Samples, ask: Ask) -> None:
        self._cache = cache
        self._batch = batch
        self._ask = ask
        self._live: Mapping[str, Any] | None = None
        self._read: dict[str, Tensor] = {}
        self._absent: set[str] = set()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __getitem__(self, key: str) -> Any:
        if key in self._absent:
            raise KeyError(key)
        if key not in self._cache.counts:
            found = self._find(key)
            if found is not None:
                return found
            answer = self._asked()
            if key not in answer:
                self._cache.keep(self._batch, key, None)
                self._absent.add(key)
                raise KeyError(key)
            value = answer[key]
            if isinstance(value, Tensor):
                return self._keep(key, value)
            if not isinstance(value, (tuple, list)) or not all(isinstance(part, Tensor) for part in value):
                return value
            self._cache.counts[key] = len(value)
        return _Parts(self._cache.counts[key], lambda index: self._part(key, index))

    def __iter__(self) -> Iterator[str]:
        return iter(self._asked())

    def __len__(self) -> int:
        return len(self._asked())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _part(self, key: str, index: int) -> Tensor:
        output = f"{key}/{index}"
        found = self._find(output)
        return self._keep(output, self._asked()[key][index]) if found is None else found

    def _find(self, output: str) -> Tensor | None:
        if output not in self._read:
            found = self._cache.find(self._batch, output)
            if found is None:
                return None
            self._read[output] = found
        return self._read[output]

    def _keep(self, output: str, value: Tensor) -> Tensor:
        self._cache.keep(self._batch, output, value)
        self._read[output] = value
        return value

    def _asked(self) -> Mapping[str, Any]:
        if self._live is None:
            self._live = self._ask()
        return self._live


class _Parts(Sequence[Tensor]):
    """The tensors of a tuple in a model output, each read when it is used."""

    def __init__(self, count: int, part: Callable[[int], Tensor]) -> None:
        self._count = count
        self._part = part

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        place = range(self._count)[index]  # raises what a tuple raises
        return self._part(place) if isinstance(place, int) else tuple(map(self._part, place))
