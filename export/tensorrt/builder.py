"""Build one engine from one graph: parse, check, configure, build; the same calls for every TensorRT."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from multisa.runtime.backends.base import IMAGE, GraphContract
from multisa.runtime.backends.engine_cache import FLAGS, Profile
from multisa.runtime.backends.onnx_checks import check_onnx
from multisa.runtime.backends.tensorrt_runtime import DTYPES, Library, LibraryLog, library_log
from multisa.runtime.errors import BackendError, UsageError

if TYPE_CHECKING:  # annotations name the classes: a test checks every call below against the type stubs
    import tensorrt as trt

# TensorRT-RTX looks for a GPU while it builds and logs this where there is none; a build does not need one.
_NO_GPU = "CUDA driver version is insufficient"
TURING_PRODUCT = "FP32 GEMM is not supported"
_REFUSED_NODE = (
    "export the graph again without such nodes (types of one operator must agree: TensorRT inserts no "
    "casts), or run it on ONNX Runtime"
)
_REFUSED_FILE = "the file is malformed: get the bundle again, or export it again"


def check_targets(library: Library, targets: Sequence[str]) -> None:
    """Raise UsageError for a target that TensorRT-RTX does not know; TensorRT builds for its own GPU only."""
    if not library.is_rtx:
        return
    known = _capabilities(library)
    for target in targets:
        if target not in known:
            raise UsageError(
                f"target: got {target!r}, expected one of {', '.join(known)}, which {library} builds for; "
                "for other GPUs use --library tensorrt on the machine that has one"
            )


def build_engine(
    library: Library, graph: bytes, contract: GraphContract, profiles: Sequence[Profile], targets: Sequence[str]
) -> bytes:
    """Build the ONNX file `graph` and return the serialized engine as the library gives it.

    TensorRT-RTX builds for all of `targets`, without a GPU; TensorRT for the GPU of this machine. Raises
    BackendError with every message of the parser or builder, or for a graph that breaks the contract,
    UsageError for a target that the library does not know.
    """
    label = f"{contract.name} ({', '.join(targets)})"
    check_onnx(graph, label)
    check_targets(library, targets)
    module = library.module
    logger, log = library_log(module)
    log.clear()
    builder: trt.Builder = module.Builder(logger)
    flags = 0
    if not library.is_rtx and library.major <= 10:
        # The graph decides the types: TensorRT 10 needs a flag for that, the others always do so.
        flags = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network: trt.INetworkDefinition = builder.create_network(flags)
    parser: trt.OnnxParser = module.OnnxParser(network, logger)
    # Bytes, not a path: check_onnx has made sure that no other file belongs to the graph.
    if not parser.parse(graph):
        raise BackendError(f"{label}: {library} cannot read it:{_parser_errors(parser, module, log)}")
    _check_contract(network, contract, label)
    config: trt.IBuilderConfig = builder.create_builder_config()
    _set_flags(config, module)
    if library.is_rtx:
        rtx_config: Any = config  # TensorRT's stubs do not have compute capabilities
        known = _capabilities(library)
        rtx_config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            if not rtx_config.set_compute_capability(known[target], index):
                raise BackendError(f"{library}: does not take the target {target} at place {index}")
    for profile in profiles:
        _add_profile(builder, config, profile, log, label)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(f"{label}: {library} builds no engine:{_build_errors(log)}")
    return bytes(engine)


def _set_flags(config: "trt.IBuilderConfig", module: Any) -> None:
    # Strong typing is not among FLAGS, because it is not a choice.
    for text in FLAGS:
        name, value = text.split("=")
        flag = module.BuilderFlag.__members__[name]
        (config.set_flag if int(value) else config.clear_flag)(flag)


def _check_contract(network: "trt.INetworkDefinition", contract: GraphContract, label: str) -> None:
    """Raise BackendError unless the graph has the inputs and outputs of its contract."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    got = {tensor.name: f"{_dtype(tensor)} {list(tensor.shape)}" for tensor in inputs}
    if got != {IMAGE: "uint8 [-1, -1, -1, 3]"}:
        raise BackendError(f"{label}: got the inputs {got}, expected {IMAGE}: uint8 [N, H, W, 3], all but 3 free")
    got = {tensor.name: f"{_dtype(tensor)} of rank {len(tensor.shape)}" for tensor in outputs}
    expected = {name: f"{t.dtype} of rank {len(t.axes)}" for name, t in contract.outputs.items()}
    if got != expected:
        raise BackendError(f"{label}: got the outputs {got}, expected {expected}")


def _dtype(tensor: "trt.ITensor") -> str:
    name = str(tensor.dtype.name)
    return DTYPES.get(name, name)


def _capabilities(library: Library) -> dict[str, Any]:
    members = library.module.ComputeCapability.__members__
    return {name.lower(): value for name, value in members.items() if name.startswith("SM")}


def _add_profile(
    builder: "trt.Builder", config: "trt.IBuilderConfig", profile: Profile, log: LibraryLog, label: str
) -> None:
    optimization: trt.IOptimizationProfile = builder.create_optimization_profile()
    problem = ""
    try:
        shapes = [(*shape, 3) for shape in (profile.minimum, profile.optimum, profile.maximum)]
        optimization.set_shape(IMAGE, *shapes)
    except ValueError as error:
        problem = str(error)
    if problem or not optimization or config.add_optimization_profile(optimization) < 0:
        raise BackendError(f"{label}: input {IMAGE}: profile {profile} is refused: {problem}{_lines(_errors(log))}")


def _parser_errors(parser: "trt.OnnxParser", module: Any, log: LibraryLog) -> str:
    file_errors = (module.ErrorCode.MODEL_DESERIALIZE_FAILED, module.ErrorCode.INVALID_GRAPH)
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        text = " ".join(line for line in error.desc().splitlines() if "catchCudaError" not in line)
        remedy = _REFUSED_FILE if error.code() in file_errors else _REFUSED_NODE
        where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
        lines.append(f"{where}{text} [{error.code().name}]; {remedy}")
    return _lines(lines or _errors(log) or log.warnings)


def _build_errors(log: LibraryLog) -> str:
    text = _lines(_errors(log) or log.warnings)
    if TURING_PRODUCT in text:
        text += (
            "\n  TensorRT-RTX has no float32 matrix product on Turing, and the attention of cam needs one "
            "in every precision: leave sm75 out for cam (--graph segmenter --graph affinity), or build "
            "it with --library tensorrt on the GPU itself"
        )
    return text


def _errors(log: LibraryLog) -> list[str]:
    return [message for message in log.errors if _NO_GPU not in message]


def _lines(messages: Sequence[str]) -> str:
    """Each message once, on its own line, in order."""
    return "".join(f"\n  {message}" for message in dict.fromkeys(messages)) or " it gives no reason"
