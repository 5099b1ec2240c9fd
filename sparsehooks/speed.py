"""How fast one way to compute is beside another, on this machine; and a file that remembers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsehooks.artifact.atomic import atomic_file

BLOCK = 2e-3
"""Seconds of each timing, at least: so many calls in a row."""
ROUNDS, MORE = 7, 21
"""Pairs of timings, and how many where the first ones are close."""
CLOSE = (0.9, 1.15)
"""Ratios between which more rounds decide."""


def ratio(slow: Callable[[], object], fast: Callable[[], object], device: torch.device) -> float:
    """How many times as fast the second is as the first: the median over pairs of timings, each pair in turn.

    Args:
        slow: called without arguments.
        fast: likewise.
        device: where both run; they count until it has finished.
    """
    both = (slow, fast)
    for function in both:
        function()  # whatever is made at the first call
    calls = [max(1, math.ceil(BLOCK / max(_seconds(function, 1, device), 1e-9))) for function in both]
    found: list[float] = []
    while len(found) < ROUNDS or (len(found) < MORE and CLOSE[0] < statistics.median(found) < CLOSE[1]):
        turn = (0, 1) if len(found) % 2 else (1, 0)
        seconds = {which: _seconds(both[which], calls[which], device) / calls[which] for which in turn}
        found.append(seconds[0] / max(seconds[1], 1e-9))
    return statistics.median(found)


def _seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    # of one thread, the time that it had the CPU: what else the machine does counts less
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _finish(device)
    start = clock()
    for _ in range(calls):
        function()
    _finish(device)
    return clock() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Speeds:
    """What was measured, by machine; kept in ``sparsehooks/speeds.json`` in $XDG_CACHE_HOME or ~/.cache.

    A file that is missing, damaged or cannot be written costs only time.

    Args:
        known: ratios by key, by machine.
    """

    def __init__(self, known: dict[str, dict[str, float]] | None = None) -> None:
        self._known = known or {}
        self._new: dict[str, dict[str, float]] = {}

    @classmethod
    def load(cls) -> Speeds:
        """Those of the file."""
        return cls(_read())

    def of(self, device: torch.device, key: str, measure: Callable[[], float]) -> float:
        """The known ratio, or the one that is measured now."""
        here = machine(device)
        found = self._new.get(here, {}).get(key) or self._known.get(here, {}).get(key)
        if found is None:
            found = self._new.setdefault(here, {})[key] = measure()
        return found

    def save(self) -> None:
        """Add what is new to the file."""
        if not self._new:
            return
        merged = _read()
        for here, speeds in self._new.items():
            merged.setdefault(here, {}).update(speeds)
        with contextlib.suppress(OSError, RuntimeError), atomic_file(_path()) as file:
            file.write_text(json.dumps(merged, indent=0), encoding="utf-8")


def _path() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sparsehooks" / "speeds.json"


def _read() -> dict[str, dict[str, float]]:
    try:
        found: Any = json.loads(_path().read_text(encoding="utf-8"))
        return {
            str(here): {str(key): float(value) for key, value in speeds.items() if 0 < value < math.inf}
            for here, speeds in found.items()
        }
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError):
        return {}


def machine(device: torch.device) -> str:
    """Whatever else changes how fast layers run: the device, torch, sparsehooks, threads."""
    from sparsehooks import __version__

    parts = [_cpu(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", f"sparsehooks {__version__}"]
    if device.type == "cuda":
        library = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
        parts[:2] = [torch.cuda.get_device_name(device), f"cuSPARSELt {library}"]
    return ", ".join(parts)


@functools.cache
def _cpu() -> str:
    """Its name and, as virtual machines give many the same one, a digest of what it can do."""
    able = torch.cpu.get_capabilities()
    digest = hashlib.sha256(json.dumps(able, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{able.get('cpu_name', platform.machine())} {digest}"
