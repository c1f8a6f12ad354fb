"""Check an ONNX file before any library opens it.

`check_onnx(data, "cam.onnx")` refuses operator sets that the backends do not support, weights stored in other
files, and bytes that are not an ONNX file. It decodes the few protobuf fields it needs, so the runtime does
not depend on the onnx package (onnx.proto of ONNX 1.23, https://protobuf.dev/programming-guides/encoding).
"""

from collections.abc import Iterator
from typing import NamedTuple

from multisa.runtime.errors import BackendError

OPSETS = range(9, 21)  # supported by TensorRT 10 as documented, and by ONNX Runtime
_MAX_DEPTH = 100  # of nested messages: protobuf's own limit

# The messages that lead to a tensor or an operator set: field number -> message type.
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 8: "OperatorSetIdProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
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
# Bits of a tag, a length and a value. protobuf in C++ truncates a longer tag where other parsers do not, so
# the same bytes could mean different fields. Numbers with more bits, or more bytes than needed, are refused.
_TAG_BITS, _LENGTH_BITS, _VALUE_BITS = 32, 31, 64


class _Field(NamedTuple):
    number: int
    wire: int  # wire type
    integer: int  # value of a varint, else 0
    content: memoryview  # bytes of a string or message, else empty


def check_onnx(data: bytes, label: str) -> None:
    """Raise BackendError unless `data` is a self-contained ONNX file of a supported operator set.

    label: prefix of the message. Operators and shapes are left to the libraries.
    """
    opsets: list[int] = []
    try:
        _visit(memoryview(data), "ModelProto", label, opsets, depth=0)
    except ValueError as error:
        raise BackendError(f"{label}: cannot be loaded: not an ONNX file: {error}; export it again") from error
    if not opsets:
        raise BackendError(f"{label}: cannot be loaded: not an ONNX file: it declares no operator set; export it again")
    for version in opsets:
        if version not in OPSETS:
            raise BackendError(
                f"{label}: got opset {version}, expected {OPSETS[0]} to {OPSETS[-1]}: "
                "export the graph again with an opset in that range (`multisa export` writes 18)"
            )


def _visit(message: memoryview, kind: str, label: str, opsets: list[int], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"messages nested more than {_MAX_DEPTH} levels deep")
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
        # Refused whatever the path: a library would read it relative to the working directory, unverified.
        raise BackendError(
            f"{label}: the weights of {name!r} lie in another file, {location!r}; expected all weights in "
            "this one: export with external_data=False"
        )


def _add_opset(message: memoryview, opsets: list[int]) -> None:
    domain, version = "", 0
    for field in _fields(message):
        if field.number == _DOMAIN:
            domain = _text(field.content)
        elif field.number == _VERSION:
            version = field.integer
    if domain in ("", "ai.onnx"):  # operators of other domains are left to the libraries
        opsets.append(version)


def _fields(message: memoryview) -> Iterator[_Field]:
    """Yield the fields of one message, in order. Raises ValueError if the bytes are not a message."""
    position, end = 0, len(message)
    nothing = message[:0]
    while position < end:
        tag, position = _varint(message, position, _TAG_BITS)
        number = tag >> 3
        wire = tag & 7
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
    """Decode a base-128 number of at most `bits` bits; return it and the position after it."""
    value = shift = 0
    while True:
        if position >= len(message):
            raise ValueError("it ends inside a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if value >> bits or (byte >= 0x80 and shift >= bits):
            raise ValueError(f"a number of more than {bits} bits, which no encoder writes")
        if byte < 0x80:
            return value, position


def _text(content: memoryview) -> str:
    return bytes(content).decode("utf-8", errors="replace")
