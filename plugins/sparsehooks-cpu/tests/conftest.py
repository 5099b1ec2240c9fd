"""The kernels that the tests run are those of the source as it is."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_configure():
    package = ROOT / "src" / "sparsehooks_cpu"
    sources = [ROOT / "hatch_build.py", package / "variants.py", *package.glob("*.cpp")]
    built = list(package.glob("kernels_*.so"))
    if built and min(path.stat().st_mtime for path in built) > max(path.stat().st_mtime for path in sources):
        return
    if importlib.util.find_spec("hatchling") is None:
        raise pytest.UsageError("the kernels are compiled by hatchling, which is not installed")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    problem = module.compile_kernels()
    if built and problem:
        raise pytest.UsageError(f"the kernels are older than their source: {problem}")
