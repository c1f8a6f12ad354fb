"""An ONNX file is looked at before any library opens it."""

import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, onnx_ml_pb2

from multisa.runtime.backends import onnx_checks
from multisa.runtime.backends.onnx_checks import check_onnx
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.errors import BackendError


def external(location: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def model(opset: int = 18, tensor: TensorProto | None = None, nodes: tuple = ()) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])
    labels = helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", "H", "W", 3])
    node = helper.make_node("Identity", ["image"], ["labels"])
    graph = helper.make_graph([*nodes, node], "g", [image], [labels], [tensor] if tensor else [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def test_what_is_read_are_the_fields_of_onnx() -> None:
    for kind, children in onnx_checks._MESSAGES.items():
        fields = getattr(onnx_ml_pb2, kind).DESCRIPTOR.fields
        on_the_way = {f.number: f.message_type.name for f in fields if f.message_type}
        expected = {number: name for number, name in on_the_way.items() if name in onnx_checks._MESSAGES}
        assert children == expected, kind
    tensor = TensorProto.DESCRIPTOR.fields_by_name
    assert [tensor[n].number for n in ("name", "external_data", "data_location")] == [8, 13, 14]


def test_the_graphs_of_the_package_are_taken_at_once() -> None:
    bundle = load_bundle(default_bundle_path())
    for name in (name for name in bundle.manifest.files if name.endswith(".onnx")):
        data = bundle.read_file(name)
        start = time.process_time()
        check_onnx(data, name)
        assert time.process_time() - start < 1, name


@pytest.mark.parametrize("location", ["../x", "/etc/passwd", "weights.bin", ""])
def test_weights_in_another_file_are_refused(location: str) -> None:
    data = model(tensor=external(location)).SerializeToString()
    with pytest.raises(BackendError, match=r"cam\.onnx: the weights of 'weight' lie in another file") as caught:
        check_onnx(data, "cam.onnx")
    assert repr(location) in str(caught.value)


def in_a_constant(tensor: TensorProto) -> onnx.ModelProto:
    return model(nodes=(helper.make_node("Constant", [], ["c"], value=tensor),))


def in_a_branch(tensor: TensorProto) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4])
    branch = helper.make_graph([], "branch", [], [out], [tensor])
    return model(nodes=(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch),))


def in_a_function(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    body = [helper.make_node("Constant", [], ["c"], value=tensor)]
    made.functions.append(helper.make_function("own", "f", [], ["c"], body, [helper.make_opsetid("", 18)]))
    return made


def in_a_sparse_tensor(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    made.graph.sparse_initializer.add(values=tensor)
    return made


def for_training(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    made.training_info.add().initialization.initializer.append(tensor)
    return made


def with_only_the_location_flag(tensor: TensorProto) -> onnx.ModelProto:
    tensor.ClearField("external_data")
    return model(tensor=tensor)


def with_only_a_path(tensor: TensorProto) -> onnx.ModelProto:
    tensor.ClearField("data_location")
    return model(tensor=tensor)


@pytest.mark.parametrize(
    "place",
    [
        *(in_a_constant, in_a_branch, in_a_function, in_a_sparse_tensor, for_training),
        *(with_only_the_location_flag, with_only_a_path),
    ],
)
def test_wherever_in_the_file_they_are_named(place: Callable[[TensorProto], onnx.ModelProto]) -> None:
    with pytest.raises(BackendError, match="lie in another file"):
        check_onnx(place(external("../x")).SerializeToString(), "cam.onnx")


@pytest.mark.parametrize("opset", [8, 21, 99])
def test_a_foreign_opset_is_refused(opset: int) -> None:
    with pytest.raises(BackendError, match=f"cam.onnx: got opset {opset}, expected 9 to 20"):
        check_onnx(model(opset).SerializeToString(), "cam.onnx")


def test_a_second_opset_of_the_same_domain_is_not_overlooked() -> None:
    made = model()
    made.opset_import.append(helper.make_opsetid("ai.onnx", 99))
    with pytest.raises(BackendError, match="got opset 99"):
        check_onnx(made.SerializeToString(), "cam.onnx")


def test_operators_of_other_domains_are_left_to_the_libraries() -> None:
    made = model()
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    check_onnx(made.SerializeToString(), "cam.onnx")


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"not a graph", b"\xff" * 40, model().SerializeToString()[:-3], b"\x3a\xff\xff\xff\x7f"]
)
def test_what_is_not_an_onnx_file_is_refused(data: bytes) -> None:
    with pytest.raises(BackendError, match=r"cam\.onnx: cannot be loaded: not an ONNX file"):
        check_onnx(data, "cam.onnx")


def test_a_file_nested_without_end_is_refused() -> None:
    # Graphs in attributes of nodes of graphs: each level adds its three headers.
    data = b""
    for _ in range(300):
        for number in (6, 5, 1):
            size, length = len(data), b""
            while size > 0x7F:
                length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
            data = bytes([number << 3 | 2]) + length + bytes([size]) + data
    header = len(data).to_bytes(2, "little")
    size = bytes([header[0] & 0x7F | 0x80, len(data) >> 7 & 0x7F])
    with pytest.raises(BackendError, match="cannot be loaded: not an ONNX file"):
        check_onnx(b"\x3a" + size + data, "cam.onnx")


# Bits beyond those of a number, and its bytes; protobuf in C++ reads a tag's first 32 bits.
Spelling = Callable[[int], bytes]


def plain(number: int) -> bytes:
    written = b""
    while number > 0x7F:
        written, number = written + bytes([number & 0x7F | 0x80]), number >> 7
    return written + bytes([number])


def padded(size: int) -> Spelling:
    """The same number in `size` bytes, or more where it needs them."""

    def spell(number: int) -> bytes:
        groups = [number >> 7 * i & 0x7F for i in range(max(size, len(plain(number))))]
        return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])

    return spell


def beyond_32_bits(number: int) -> bytes:
    return padded(5)(number | 1 << 32)


def field(number: int, content: bytes | int, tag: Spelling = plain, size: Spelling = plain) -> bytes:
    if isinstance(content, int):
        return tag(number << 3) + size(content)
    return tag(number << 3 | 2) + size(len(content)) + content


def hidden_weights(tag: Spelling = plain, size: Spelling = plain) -> bytes:
    """A model whose fields of external data alone are spelt so."""
    tensor = external("../x")
    entries = b"".join(field(13, e.SerializeToString(), tag, size) for e in tensor.external_data)
    tensor.ClearField("external_data"), tensor.ClearField("data_location")
    whole = tensor.SerializeToString() + entries + field(14, 1, tag)
    return model().SerializeToString() + field(7, field(5, whole))  # messages of one number are merged


def hidden_opset(tag: Spelling = plain, size: Spelling = plain) -> bytes:
    return model().SerializeToString() + field(8, field(2, 99, tag), tag, size)


@pytest.mark.parametrize("hidden", [hidden_weights, hidden_opset])
@pytest.mark.parametrize(
    ("tag", "size"),
    [(beyond_32_bits, plain), (padded(6), plain), (padded(10), plain), (plain, padded(10))],
    ids=["33 bits", "6 bytes", "10 bytes", "length of 10 bytes"],
)
def test_a_number_that_readers_take_differently_is_refused(
    hidden: Callable[[Spelling, Spelling], bytes], tag: Spelling, size: Spelling
) -> None:
    with pytest.raises(BackendError, match=r"lie in another file|got opset 99"):
        check_onnx(hidden(plain, plain), "cam.onnx")
    with pytest.raises(BackendError, match="not an ONNX file: a number of more than"):
        check_onnx(hidden(tag, size), "cam.onnx")


def test_a_length_beyond_the_file_is_refused() -> None:
    data = model().SerializeToString()
    for size in (len(data), 2**31 - 1, 2**31, 2**32 + 2, 2**64 - 1):
        with pytest.raises(BackendError, match="not an ONNX file"):
            check_onnx(data + b"\x3a" + plain(size) + b"x", "cam.onnx")


def respelt(data: bytes, kind: str, spellings: Callable[[str], Spelling]) -> bytes:
    """The same message with its numbers in other bytes."""
    written = b""
    children = onnx_checks._MESSAGES.get(kind, {})
    for entry in onnx_checks._fields(memoryview(data)):
        content: bytes | int = bytes(entry.content)
        if entry.wire == onnx_checks._VARINT:
            content = entry.integer
        elif entry.number in children:
            content = respelt(bytes(entry.content), children[entry.number], spellings)
        written += field(entry.number, content, spellings("tag"), spellings("size"))
    return written


SPELLINGS = [plain, *(padded(size) for size in (2, 3, 5, 6, 10)), beyond_32_bits]


@settings(deadline=None, max_examples=50)
@given(st.booleans(), st.sampled_from([18, 99]), st.data())
def test_what_is_taken_onnx_runtime_reads_alike(is_external: bool, opset: int, data: st.DataObject) -> None:
    """Whatever its numbers are spelt like: nothing that is looked for elsewhere, no foreign opset."""
    tensor = external("absent.bin") if is_external else numpy_helper.from_array(np.zeros(4, np.float32), "w")
    nodes = (helper.make_node("Identity", [tensor.name], ["used"]),)
    common = data.draw(st.sampled_from(SPELLINGS[:4]))
    spellings = st.sampled_from([common] * 40 + SPELLINGS)
    made = respelt(model(opset, tensor, nodes).SerializeToString(), "ModelProto", lambda _: data.draw(spellings))
    try:
        check_onnx(made, "x")
    except BackendError:
        return
    assert not is_external and opset == 18
    onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused_and_nothing_else(data: bytes) -> None:
    try:
        check_onnx(data, "x")
    except BackendError as error:
        assert str(error).startswith("x: ")


@pytest.mark.parametrize("made", [model(99), model(tensor=external("../x"))], ids=["opset 99", "path"])
def test_onnx_runtime_is_not_given_what_is_refused(made: onnx.ModelProto) -> None:
    with pytest.raises(BackendError, match=r"got opset 99|lie in another file"):
        OnnxRuntimeBackend(made.SerializeToString())
