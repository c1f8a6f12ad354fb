"""What an ONNX file asks of its reader, seen before any library opens it.

`check_onnx(data, "cam.onnx")` refuses an operator set that the engines do not know, weights that lie in
other files, and bytes that are no ONNX file. It reads the few fields that say so from the bytes alone, so
the runtime needs no onnx (onnx.proto of ONNX 1.23, https://protobuf.dev/programming-guides/encoding).
"""

from collections.abc import Iterator
from typing import NamedTuple

from multisa.runtime.errors import BackendError

OPSETS = range(9, 21)  # what TensorRT 10 documents; ONNX Runtime reads all of them
_DEEPEST = 100  # levels of messages, as protobuf itself has it

# The messages on the way to a tensor or an operator set, by the numbers of their fields.
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {
        7: "GraphProto",
        8: "OperatorSetIdProto",
        20: "TrainingInfoProto",
        25: "FunctionProto",
    },
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 9: "OperatorSetIdProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "TensorProto": {},
    "OperatorSetIdProto": {},
}
_DOMAIN, _VERSION = 1, 2  # of OperatorSetIdProto
_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
# Bits of a tag, a length and a value. protobuf in C++ cuts a longer tag off where others do not, so that a
# field can bear two numbers: what has more bits than these, or more bytes than they need, is refused.
_TAG_BITS, _LENGTH_BITS, _VALUE_BITS = 32, 31, 64


class _Field(NamedTuple):
    number: int
    wire: int  # its wire type
    integer: int  # of a varint, else 0
    content: memoryview  # of a string or message, else empty


def check_onnx(data: bytes, label: str) -> None:
    """Raise BackendError, beginning with `label`, unless `data` is an ONNX file that needs nothing but itself.

    Of operators and shapes it says nothing: those are for the libraries to check.
    """
    opsets: list[int] = []
    try:
        _visit(memoryview(data), "ModelProto", label, opsets, depth=0)
    except ValueError as error:
        raise BackendError(f"{label}: cannot be loaded: no ONNX file: {error}; export it again") from error
    if not opsets:
        raise BackendError(
            f"{label}: cannot be loaded: no ONNX file: it names no version of its operators; export it again"
        )
    for version in opsets:
        if version not in OPSETS:
            raise BackendError(
                f"{label}: got opset {version}, expected {OPSETS[0]} to {OPSETS[-1]}: "
                "export the graph again with an opset of that range (`multisa export` writes 18)"
            )


def _visit(message: memoryview, kind: str, label: str, opsets: list[int], depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"messages nested more than {_DEEPEST} deep")
    if kind == "TensorProto":
        _check_tensor(message, label)
        return
    if kind == "OperatorSetIdProto":
        _add_opset(message, opsets)
        return
    children = _MESSAGES[kind]
    for field in _fields(message):
        child = children.get(field.number)
        if child is not None:
            _visit(field.content, child, label, opsets, depth + 1)


def _check_tensor(message: memoryview, label: str) -> None:
    name, location, is_external = "", "", False
    for field in _fields(message):
        if field.number == _NAME:
            name = _text(field.content)
        elif field.number == _DATA_LOCATION:
            is_external = is_external or field.integer != 0
        elif field.number == _EXTERNAL_DATA:
            is_external = True
            entry = {part.number: _text(part.content) for part in _fields(field.content)}
            if entry.get(_KEY) == "location":
                location = entry.get(_VALUE, "")
    if is_external:
        # Whatever the path: a library would look for it where the program happens to run, unverified.
        raise BackendError(
            f"{label}: the weights of {name!r} lie in another file, {location!r}; expected all of them in "
            "this one: export with external_data=False"
        )


def _add_opset(message: memoryview, opsets: list[int]) -> None:
    domain, version = "", 0
    for field in _fields(message):
        if field.number == _DOMAIN:
            domain = _text(field.content)
        elif field.number == _VERSION:
            version = field.integer
    if domain in ("", "ai.onnx"):  # operators of other domains are for the libraries to know or refuse
        opsets.append(version)


def _fields(message: memoryview) -> Iterator[_Field]:
    """The fields of one message, in order. Raises ValueError when the bytes are no message."""
    position, end = 0, len(message)
    nothing = message[:0]
    while position < end:
        tag, position = _varint(message, position, _TAG_BITS)
        number, wire = tag >> 3, tag & 7
        integer, content = 0, nothing
        if wire == _VARINT:
            integer, position = _varint(message, position, _VALUE_BITS)
        elif wire == _BYTES:
            size, position = _varint(message, position, _LENGTH_BITS)
            content = message[position : position + size]
            position += size
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"field {number} has the wire type {wire}")
        if number == 0 or position > end:
            raise ValueError(f"field {number} ends beyond its message")
        yield _Field(number, wire, integer, content)


def _varint(message: memoryview, position: int, bits: int) -> tuple[int, int]:
    """A base-128 number of at most `bits` bits, and the position behind it."""
    value = shift = 0
    while True:
        if position >= len(message):
            raise ValueError("it ends within a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if value >> bits or (byte >= 0x80 and shift >= bits):
            raise ValueError(f"a number of more than {bits} bits, as no writer makes")
        if byte < 0x80:
            return value, position


def _text(content: memoryview) -> str:
    return bytes(content).decode("utf-8", errors="replace")
