"""Checkpoints: tensors in safetensors, everything else in JSON inside the same file, written atomically."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from multisa.runtime.errors import CheckpointError
from multisa.runtime.files import write_bytes_atomically

MODEL, MOMENTUM = "model.", "momentum."

_REMEDY = "delete it and run `multisa train` again, which makes the stage anew"


def save_checkpoint(
    path: Path, model: nn.Module, optimiser: torch.optim.SGD | None, meta: Mapping[str, Any]
) -> None:
    """Write the model's state, the optimiser's momenta (by parameter name) and `meta` to one file."""
    tensors = {MODEL + key: value.contiguous() for key, value in model.state_dict().items()}
    if optimiser is not None:
        for name, parameter in model.named_parameters():
            momentum = (
                optimiser.state[parameter].get("momentum_buffer") if parameter in optimiser.state else None
            )
            if momentum is not None:
                tensors[MOMENTUM + name] = momentum.contiguous()
    write_bytes_atomically(path, safetensors.torch.save(tensors, {"multisa": json.dumps(dict(meta))}))


def load_checkpoint(path: Path, model: nn.Module, optimiser: torch.optim.SGD | None = None) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote and return its `meta`; every key must fit the model.

    Raises CheckpointError for a file that is missing, damaged, or of another network.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, expected a trained network; run `multisa train` again")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); {_REMEDY}") from error
    if "multisa" not in metadata:
        raise CheckpointError(f"{path}: not a multisa checkpoint; {_REMEDY}")
    state = {key.removeprefix(MODEL): value for key, value in tensors.items() if key.startswith(MODEL)}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:  # its message lists every key, a page of them
        raise CheckpointError(f"{path}: of another network than the one expected; {_REMEDY}") from error
    if optimiser is not None:
        for name, parameter in model.named_parameters():
            if MOMENTUM + name in tensors:
                momentum = tensors[MOMENTUM + name].to(parameter.device)
                optimiser.state[parameter]["momentum_buffer"] = momentum
    meta: dict[str, Any] = json.loads(metadata["multisa"])
    return meta
