"""Frozen dataclasses from plain dictionaries (TOML, JSON): every key and type is checked, none is guessed."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from multisa.runtime.errors import UsageError

T = TypeVar("T")


def record_from_dict(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass `kind` from `values`; nested dataclasses and tuples are built too.

    `where` names the place in messages. Raises UsageError for an unknown key (naming the valid ones), a
    missing one without default and a value of another type.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: expected a table of values, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [key for key in values if key not in fields]
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; valid keys: {', '.join(fields)}")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise UsageError(f"{where}: key {missing[0]!r} is missing")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def record_to_dict(record: Any) -> dict[str, Any]:
    """Turn a (nested) dataclass into dictionaries and lists that JSON and TOML can hold."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(record)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return record_from_dict(hint, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UsageError(f"{where}: got {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is types.UnionType:
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _convert(inner, value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{where}: got {value!r}, expected {getattr(hint, '__name__', hint)}")
    return value


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{where}: got {value!r}, expected a list")
    if arguments[-1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise UsageError(f"{where}: got {len(value)} values, expected {len(arguments)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))
