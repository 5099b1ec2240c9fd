"""One strict decoder from plain mappings to frozen dataclasses, with the path in every error."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sparsehooks.errors import RecipeError, suggest

T = TypeVar("T")


def decode(cls: type[T], value: Any, path: str) -> T:
    """An instance of the dataclass ``cls`` from a mapping.

    Strict: unknown keys, missing keys and wrong types are errors; a bool is not an int; an int is taken for a float
    only where no int is allowed.

    Raises:
        RecipeError: ``path.key: what is wrong; did you mean ...?``
    """
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path}: expected a table, got {value!r}")
    assert dataclasses.is_dataclass(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in fields:
            raise RecipeError(f"{path}: unknown key '{key}'{suggest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise RecipeError(f"{path}: '{name}' is missing")
    arguments = {key: _convert(hints[key], item, f"{path}.{key}") for key, item in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is typing.Literal:
        if value in args and not isinstance(value, bool):
            return value
        near = suggest(value, args) if isinstance(value, str) else ""
        raise RecipeError(f"{path}: expected one of {', '.join(map(repr, args))}; got {value!r}{near}")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise RecipeError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        return _convert_table(args[1], value, path)
    decoder = getattr(hint, "__decode__", None)
    if decoder is not None:
        return decoder(value, path)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or type(value) is hint:
        return value
    raise RecipeError(f"{path}: expected {_words(hint)}, got {value!r}")


def _convert_table(hint: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path}: expected a table, got {value!r}")
    return {str(key): _convert(hint, item, f"{path}.{key}") for key, item in value.items()}


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if type(value) in options:
        return value
    others = [option for option in options if option is not types.NoneType]
    if len(others) == 1:
        return _convert(others[0], value, path)
    for option in others:
        if typing.get_origin(option) is not None or hasattr(option, "__decode__"):
            try:
                return _convert(option, value, path)
            except RecipeError:
                continue
    raise RecipeError(f"{path}: expected {' or '.join(_words(option) for option in others)}, got {value!r}")


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", tuple: "a list"}
    return names.get(typing.get_origin(hint) or hint, getattr(hint, "__name__", str(hint)))
