"""Build frozen dataclasses from plain values (JSON, TOML), checking every key and type."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

Record = TypeVar("Record")


def record_from_dict(kind: type[Record], value: object, where: str = "", *, complete: bool = False) -> Record:
    """Build the dataclass `kind`, with nested dataclasses and tuples, from a parsed object.

    Keys without a default are required (complete=True: all keys); unknown keys are errors. Raises ValueError
    that names the key below `where`, the value and what is expected.
    """
    place = where or "the top level"
    if not isinstance(value, dict):
        raise ValueError(f"{place}: got {_kind(value)}, expected an object")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise ValueError(f"{place}: unknown key {unknown[0]!r}; valid keys: {', '.join(names)}")
    missing = [f.name for f in fields if f.name not in value and (complete or _is_required(f))]
    if missing:
        raise ValueError(f"{place}: missing key {missing[0]!r}, expected {', '.join(names)}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    values = {key: _value(hints[key], item, prefix + key, complete) for key, item in value.items()}
    try:
        return kind(**values)
    except ValueError as error:  # a dataclass that checks its values knows the key but not its parents
        raise ValueError(f"{prefix}{error}") from error


def record_to_dict(record: Any) -> dict[str, Any]:
    """Convert a dataclass to dictionaries and lists for JSON."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(record)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: object, where: str, complete: bool) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return record_from_dict(hint, value, where, complete=complete)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where}: got {_kind(value)}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is types.UnionType:  # only `X | None` and `X | str` are used
        return value if type(value) in arguments else _value(arguments[0], value, where, complete)
    if origin is tuple:
        return _tuple(arguments, value, where, complete)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: got {_kind(value)}, expected an object")
        return {key: _value(arguments[1], item, f"{where}.{key}", complete) for key, item in value.items()}
    accepted = (int, float) if hint is float else (hint,)
    # True is a Python int too, but not a number.
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: got {_kind(value)}, expected {hint.__name__}")
    if hint is not float:
        return value
    try:
        return float(value)
    except OverflowError as error:  # Python's integers have no end
        raise ValueError(f"{where}: got {_kind(value)}, expected a number that float holds") from error


def _tuple(arguments: tuple[Any, ...], value: object, where: str, complete: bool) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: got {_kind(value)}, expected an array")
    endless = isinstance(arguments[-1], types.EllipsisType)
    hints = arguments[:1] * len(value) if endless else arguments
    if len(hints) != len(value):
        raise ValueError(f"{where}: got {len(value)} values, expected {len(hints)}")
    pairs = enumerate(zip(hints, value, strict=True))
    return tuple(_value(hint, item, f"{where}[{i}]", complete) for i, (hint, item) in pairs)


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"
