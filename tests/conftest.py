"""What all tests share: no network, quiet libraries, one way to reach the helpers."""

from __future__ import annotations

import itertools
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # on tiny models, threads wait for each other longer than they work
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

_TESTS = itertools.count()


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory):
    """Plugin files of one test are not there for the next."""
    yield
    home = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(home):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path_factory):
    """No plugin settings of the machine that runs the tests, nor what it has measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache{next(_TESTS)}"))
    for name in ("SPARSEHOOKS_PLUGINS", "SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _own_accelerator():
    """Accelerate keeps the precision of its first Accelerator for the whole process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
