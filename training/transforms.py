"""Augmentations that a configuration names: transforms of torchvision (v2), or functions of one's own.

    augment = ["ColorJitter(brightness=0.3)", "RandomGrayscale(p=0.1)"]    # with their arguments
    augment = "my_module:my_function"                                     # (image, target) -> (image, target)

They get what the network would see: image uint8 [S, S, 3] and target uint8 [S, S] (class ids, 255 = ignored), float32
[K, S, S] (soft targets) or None (image-level labels), and return the same shapes and dtypes. Every draw from the
generators of torch, NumPy and `random` depends on the sample's seed alone.
"""

import ast
import importlib
import importlib.util
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import BackendUnavailable, UsageError
from multisa.runtime.files import sha256_of_file
from multisa.runtime.imaging.png import IGNORE_INDEX

Target = npt.NDArray[Any] | None
Transform = Callable[[Any, Target], tuple[Any, Target]]

# Grey level where there is no image: about zero after normalisation (PuzzleCAM pads with zero).
PADDING = 128


def parse_transform(entry: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Split "Name(1, key=2)" into name, arguments and keywords, all literals; "module:function" has no arguments.

    Raises ValueError.
    """
    module, colon, function = entry.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), function)):
        return entry, [], {}
    try:
        call = ast.parse(entry.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            return call.func.id, [ast.literal_eval(argument) for argument in call.args], keywords
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        pass
    raise ValueError(f'got {entry!r}, expected "Name(key=value, ..)" with plain values, or "module:function"')


def augment_identity(entries: tuple[str, ...]) -> list[str]:
    """What decides the results of augmentations: their text, and the digest of the file of a function."""
    return [
        f"{entry} {sha256_of_file(_source(entry))}" if ":" in entry.partition("(")[0] else entry for entry in entries
    ]


def apply_transforms(
    entries: tuple[str, ...], image: npt.NDArray[np.uint8], target: Target, seed: int
) -> tuple[npt.NDArray[np.uint8], Target]:
    """Augment an image and its target; see the module's docstring.

    Raises UsageError for an unknown name or arguments, and for results of another shape or dtype; BackendUnavailable
    without torchvision.
    """
    # Where a transform moves an image, the target is unknown; soft targets have 0 there.
    fill = IGNORE_INDEX if target is None or target.ndim == 2 else 0
    with _seeded(seed):
        for entry in entries:
            try:
                made, changed = _transform(entry, fill)(image, target)
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"augment {entry!r}: got {error!r}, expected arguments and images it can use"
                ) from error
            for got, given in ((made, image), (changed, target)):
                if _kind(got) != _kind(given):
                    raise UsageError(f"augment {entry!r}: got {_kind(got)} back, expected {_kind(given)}")
            image, target = made, changed
    return image, target


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


@cache
def _transform(entry: str, fill: int) -> Transform:
    name, arguments, keywords = parse_transform(entry)
    if ":" in name:
        module, _, function = name.partition(":")
        _source(entry)
        found = getattr(importlib.import_module(module), function, None)
        if not callable(found):
            raise UsageError(f"augment {entry!r}: got no function {function} in {module}, expected one")
        return found  # type: ignore[no-any-return]
    from multisa.training.weights import import_timm

    try:
        import_timm()  # makes torchvision importable beside another build of torch
        v2 = importlib.import_module("torchvision.transforms.v2")
        tensors = importlib.import_module("torchvision.tv_tensors")
    except ImportError as error:
        raise BackendUnavailable(f'augment {entry!r}: needs torchvision ({error}): pip install ".[train]"') from error
    kind: Any = getattr(v2, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, v2.Transform)):
        raise UsageError(f"augment {entry!r}: got {name}, expected a transform of torchvision.transforms.v2")
    if "fill" in inspect.signature(kind).parameters and "fill" not in keywords:
        keywords["fill"] = {tensors.Image: PADDING, tensors.Mask: fill}
    transform: Any = kind(*arguments, **keywords)

    def apply(image: Any, target: Target) -> tuple[Any, Target]:
        import torch

        wrapped = tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if target is None:
            return transform(wrapped).permute(1, 2, 0).contiguous().numpy(), None
        made, changed = transform(wrapped, tensors.Mask(torch.from_numpy(np.array(target))))
        return made.permute(1, 2, 0).contiguous().numpy(), changed.contiguous().numpy()

    return apply


def _source(entry: str) -> Path:
    module = entry.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        found = None
    if found is None or not found.origin:
        raise UsageError(f"augment {entry!r}: got no module {module}, expected one on the path: set PYTHONPATH")
    return Path(found.origin)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators of the CPU, and give them back their states."""
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        # Not torch.manual_seed, which would seed GPUs as well.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
