"""What pip gets where there is no compiler, and where there is one."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sparsehooks_cpu import variants

pytest.importorskip("hatchling", reason="hatchling is not installed")

ROOT = Path(__file__).parent.parent


def wheel(folder, **environment):
    """Built of a copy of the source, and what was said."""
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns("*.so", "__pycache__", ".*"))
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder / "source",
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = folder / done.stdout.splitlines()[-1]
    with zipfile.ZipFile(path) as archive:
        return path.name, {Path(name).name for name in archive.namelist()}, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "No such file"), (f"{sys.executable} -c exit(1)", "failed")]
)
def test_without_a_compiler_it_installs_and_says_so(tmp_path, compiler, reason):
    name, files, said = wheel(tmp_path, CXX=compiler)
    assert name.endswith("-py3-none-any.whl")
    assert "backends.py" in files
    assert not any(file.endswith(".so") for file in files)
    assert "sparsehooks-cpu has no kernels, so layers will run dense: " in said
    assert reason in said


def test_a_compiler_that_fails_leaves_what_was_compiled(tmp_path, monkeypatch):
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns("*.so", "__pycache__", ".*"))
    build = runpy.run_path(str(tmp_path / "source" / "hatch_build.py"))
    old = build["PACKAGE"] / variants.file("generic")
    old.write_text("compiled before")
    monkeypatch.setenv("CXX", f"{sys.executable} -c exit(1)")
    assert "failed" in build["compile_kernels"]()
    assert [path.read_text() for path in build["PACKAGE"].glob("*.so")] == ["compiled before"]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_a_wheel_has_the_variants_of_its_platform(tmp_path):
    name, files, _ = wheel(tmp_path)
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert variants.file("generic") in files
    assert not any(file.startswith(".") for file in files)
