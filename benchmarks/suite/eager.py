"""The bundle's segmenter in PyTorch, in the ways that people run it: never imported where torch is not."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from multisa.benchmarks.suite.contender import CHANNELS_LAST, COMPILED, Contender
from multisa.export.unfold import segmenter_from_bundle
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import EngineUnavailable
from multisa.training.segmenter import SegmentPhotographs

UInt8 = npt.NDArray[np.uint8]


class EagerSegmenter:
    """The network as it was trained: not folded, its batch normalisations computed."""

    def __init__(self, bundle: Bundle, contender: Contender, threads: int) -> None:
        """Rebuild the network of the bundle. Raises EngineUnavailable without a GPU that was asked for."""
        if contender.device == "cuda" and not torch.cuda.is_available():
            raise EngineUnavailable(f"torch {torch.__version__} sees no GPU")
        torch.set_num_threads(threads)
        self._device = torch.device(contender.device)
        network: nn.Module = SegmentPhotographs(segmenter_from_bundle(bundle)).eval().to(self._device)
        self.model_bytes = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        self._context: Callable[[], AbstractContextManager[object]] = nullcontext
        if contender.engine == CHANNELS_LAST:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            half = torch.bfloat16 if contender.device == "cpu" else torch.float16
            self._context = lambda: torch.autocast(contender.device, dtype=half)
        self._network: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = network
        if contender.engine == COMPILED:
            self._network = torch.compile(network)
        self.is_compiled = contender.engine == COMPILED

    def labels(self, images: UInt8) -> UInt8:
        """Segment uint8 [N, H, W, 3]; the labels uint8 [N, H, W], back on the CPU."""
        with torch.inference_mode(), self._context():
            labels, _ = self._network(torch.from_numpy(np.ascontiguousarray(images)).to(self._device))
            return np.asarray(labels.cpu().numpy(), np.uint8)

    def side_by_side(self) -> bool:
        """Let images run on one thread each from now on; False where that is not possible."""
        if self._device.type == "cuda" or self.is_compiled:
            return False
        torch.set_num_threads(1)
        return True

    def device_mib(self) -> float | None:
        """The most memory of the GPU that PyTorch has held at once, in MiB."""
        if self._device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_reserved() / (1 << 20), 1)

    def close(self) -> None:
        """Nothing is held that the process does not give back."""
