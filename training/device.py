"""The device networks are trained and run on."""

import torch

from multisa.runtime.errors import BackendUnavailable
from multisa.training.config import TrainConfig


def torch_device(config: TrainConfig) -> torch.device:
    """The device a configuration asks for. Raises BackendUnavailable for CUDA where torch has none."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if config.device == "cuda":
        raise BackendUnavailable(
            f"device 'cuda': torch {torch.__version__} sees no GPU; install a CUDA build of torch and a "
            "driver, or set device=auto"
        )
    return torch.device("cpu")
