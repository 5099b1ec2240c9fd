"""Recipes in TOML: the reader that is tried last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsehooks import hookimpl, read_toml


@hookimpl(trylast=True)
def load_recipe(path: Path) -> Mapping[str, Any] | None:
    """Read files whose name ends in ``.toml``."""
    return read_toml(path)
