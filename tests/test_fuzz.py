"""Mutated artifacts are refused or read as what they were: benchmarks/fuzz.py, and that it would notice if not."""

import importlib.util
import mmap
import sys
from pathlib import Path

import pytest

from sparsehooks.artifact import access, folder
from sparsehooks.artifact.folder import installed_codecs
from sparsehooks.builtin.codecs.bitmap import Bitmap

specification = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent.parent / "benchmarks" / "fuzz.py")
fuzz = importlib.util.module_from_spec(specification)
sys.modules["fuzz"] = fuzz  # where dataclasses look
specification.loader.exec_module(fuzz)

SEED = 20_251_125


def test_two_thousand_mutants():
    report = fuzz.run(2000, SEED)
    assert not report.failures, "\n".join(error for _, error in report.failures)
    assert report.slowest[0] < fuzz.SECONDS
    assert report.largest[0] < fuzz.MEGABYTES
    counts = report.outcomes
    assert sum(counts.values()) == 2000
    for layer in fuzz.LAYERS:
        for repaired in (False, True):
            refused, identical, relabelled, other = (counts[layer, repaired, found] for found in fuzz.OUTCOMES[:4])
            assert refused > 200
            assert identical > 3
            assert relabelled <= 5
            assert (other > 3) == repaired


def test_the_artifacts_use_every_codec(tmp_path):
    used, most = set(), 0
    for number, artifact in enumerate(fuzz.artifacts()):
        (tmp_path / str(number)).mkdir()
        fuzz.written(tmp_path / str(number), artifact.files)
        for row in fuzz.verify(tmp_path / str(number)).tensors:
            used |= {*(row.positions or "").split("+"), *(row.values or "").split("+")}
        for data in artifact.files.values():
            if fuzz.MAGIC in data:
                header, body = fuzz.split(data)
                blobs = [
                    body[slice(*fields["data_offsets"])] for name, fields in header.items() if name != "__metadata__"
                ]
                most = max(most, *(len(fuzz.Forged.parse(blob).rows) for blob in blobs if blob.startswith(fuzz.MAGIC)))
    assert used - {""} == installed_codecs().keys()
    assert most >= 10


def test_damage_that_nobody_notices_is_a_failure(monkeypatch):
    for module in (access, folder):
        monkeypatch.setattr(module, "check_tensor", lambda *arguments: None)
    report = fuzz.run(300, SEED)
    assert any("it reads as something else" in error for _, error in report.failures)
    assert all(number % 2 == 0 for number, _ in report.failures)


@pytest.mark.parametrize("error", [ValueError("shapes"), MemoryError(), KeyError("w")])
def test_a_crash_is_a_failure(monkeypatch, tmp_path, capsys, error):
    decode = Bitmap.decode

    def crash(self, part, layout):
        try:
            return decode(self, part, layout)
        except fuzz.ArtifactError:
            raise error from None

    monkeypatch.setattr(Bitmap, "decode", crash)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--count", "200", "--start", "100", "--keep", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        fuzz.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    kept = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert kept
    for path in kept:
        assert f"number {path.name.removeprefix('0-')}: {type(error).__name__}" in printed
        assert type(error).__name__ in path.with_suffix(".txt").read_text()
        monkeypatch.undo()
        with pytest.raises(fuzz.ArtifactError):
            fuzz.verify(path)


def test_too_much_memory_or_time_is_a_failure(monkeypatch):
    verify = fuzz.verify
    monkeypatch.setattr(fuzz, "MEGABYTES", 30)

    def greedy(folder):
        pages = mmap.mmap(-1, 50 << 20)  # not from memory that the process has already
        for page in range(0, len(pages), mmap.PAGESIZE):
            pages[page] = 1
        return verify(folder)

    monkeypatch.setattr(fuzz, "verify", greedy)
    assert len(fuzz.run(2, SEED).failures) == 2
    monkeypatch.setattr(fuzz, "verify", verify)
    assert not fuzz.run(2, SEED).failures
    monkeypatch.setattr(fuzz, "SECONDS", 0)
    report = fuzz.run(2, SEED)
    assert ["it took" in error for _, error in report.failures] == [True, True]
