# ruff: noqa: INP001 - hatchling looks for it here
"""Compiles the kernels into the package, beside their source; without a compiler the package has none, and says so."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent / "src" / "sparsehooks_cpu"
SOURCES = ("kernels.cpp", "routines.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")


class KernelsHook(BuildHookInterface):
    """Of wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this platform."""
        if self.target_name != "wheel":
            return
        problem = compile_kernels()
        if problem:
            self.app.display_warning(f"sparsehooks-cpu has no kernels, so layers will run dense: {problem}")
            return
        build_data["artifacts"].append("/src/sparsehooks_cpu/kernels_*.so")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def compile_kernels() -> str | None:
    """All variants that the compiler knows; what is wrong, if there are none."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler was found; install one, or set CXX"
    variants = runpy.run_path(str(PACKAGE / "variants.py"))

    def build(name: str, flags: tuple[str, ...]) -> str | None:
        out = PACKAGE / variants["file"](name)
        made = out.with_name(f".{os.getpid()}.{out.name}")  # others may be reading it
        for threads in (("-fopenmp",), ()):  # Apple's compiler has no OpenMP
            sources = [str(PACKAGE / source) for source in SOURCES]
            command = [*compiler.split(), *FLAGS, *flags, *threads, *sources, "-o", str(made)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            if done.returncode == 0:
                made.replace(out)
                return None
        return next((line for line in done.stderr.splitlines() if "error" in line), f"{compiler} failed")

    wanted = variants["of"](platform.machine())
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(build, wanted, [variant.flags for variant in wanted.values()]))
    if all(problems):
        return problems[0]  # what was compiled before stays
    for name, problem in zip(wanted, problems, strict=True):
        if problem is not None:
            (PACKAGE / variants["file"](name)).unlink(missing_ok=True)  # of another source
    return None
