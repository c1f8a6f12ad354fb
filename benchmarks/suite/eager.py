"""The bundle's segmenter in PyTorch, in the ways that people run it: never imported where torch is not."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from multisa.benchmarks.suite.contender import CHANNELS_LAST, COMPILED, Contender
from multisa.benchmarks.suite.eager_state import fed_plainly, load_segmenter
from multisa.benchmarks.suite.gpu_memory import gpu_mib_of_this_process
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import EngineUnavailable
from multisa.training.segmenter import SegmentImages

UInt8 = npt.NDArray[np.uint8]


class EagerSegmenter:
    """The network as it was trained: not folded, its batch normalisations computed."""

    def __init__(self, bundle: Bundle, contender: Contender, threads: int, states: Path) -> None:
        """Load the network from `states`. Raises EngineUnavailable without a GPU that was asked for."""
        if contender.device == "cuda" and not torch.cuda.is_available():
            raise EngineUnavailable(f"torch {torch.__version__} sees no GPU")
        torch.set_num_threads(threads)
        self._device = torch.device(contender.device)
        network: nn.Module = SegmentImages(load_segmenter(bundle, states)).eval().to(self._device)
        self.model_bytes = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        self._channels_last = contender.engine == CHANNELS_LAST
        self._context: Callable[[], AbstractContextManager[object]] = nullcontext
        if self._channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            half = torch.bfloat16 if contender.device == "cpu" else torch.float16
            self._context = lambda: torch.autocast(contender.device, dtype=half)
        self._network: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = network
        self._is_compiled = contender.engine == COMPILED
        if self._is_compiled:
            self._network = torch.compile(network)

    def labels(self, images: UInt8) -> UInt8:
        """Segment uint8 [N, H, W, 3]; the labels uint8 [N, H, W], back on the CPU."""
        tensor = torch.from_numpy(images) if self._channels_last else fed_plainly(images)
        with torch.inference_mode(), self._context():
            labels, _ = self._network(tensor.to(self._device))
            return np.asarray(labels.cpu().numpy(), np.uint8)

    def side_by_side(self) -> bool:
        """Let images run on one thread each from now on; False where that is not possible."""
        if self._device.type == "cuda" or self._is_compiled:
            return False
        torch.set_num_threads(1)
        return True

    def device_mib(self) -> float | None:
        """MiB of the GPU that the process holds now."""
        return gpu_mib_of_this_process() if self._device.type == "cuda" else None
