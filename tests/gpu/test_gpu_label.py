"""Label maps and the whole GpuPipeline on a real GPU: the checks of the CPU, at realistic sizes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from label_checks import check_argmax, check_enlarge, check_errors, check_probabilities, check_resize
from PIL import Image

from multisa.kernels.cuda.device import Device
from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError, PycudaDevice
from multisa.runtime.backends.base import AFFINITY, CAM, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.tensorrt import TensorRTOptions, open_tensorrt
from multisa.runtime.backends.tensorrt_runtime import default_gpu, import_library
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.errors import BackendUnavailable, MultisaError
from multisa.runtime.gpu.pipeline import GpuPipeline
from multisa.runtime.gpu.stages import GpuLabels
from multisa.runtime.predict.postprocess import pseudo_mask, walk_scores

IMAGES = {"astronaut": ("person",), "chelsea": ("cat",), "coffee": ("person", "dog")}
LIBRARY = "tensorrt"


@pytest.fixture(scope="module")
def device() -> PycudaDevice:
    try:
        return PycudaDevice()
    except DeviceUnavailableError as error:
        pytest.skip(f"no GPU to run on: {error}")


@pytest.mark.parametrize(
    ("count", "source", "target"),
    [(1, (1, 1), (1, 1)), (3, (94, 125), (375, 500)), (20, (24, 32), (94, 125)), (2, (64, 80), (13, 17))],
)
def test_resize(device: Device, count: int, source: tuple[int, int], target: tuple[int, int]) -> None:
    check_resize(device, count, source, target)


def test_probabilities_argmax_and_errors(device: Device) -> None:
    check_probabilities(device, 3, (94, 125), (375, 500), to_peak=True, gains=(1.0, 1.75, 0.5))
    check_argmax(device, 21, 375, 500)
    check_errors(device)


@pytest.mark.parametrize(
    ("classes", "source", "target"),
    [(1, (1, 1), (1, 1)), (7, (96, 128), (1500, 2000)), (21, (94, 125), (375, 500)), (5, (80, 90), (13, 17))],
)
def test_enlarge(device: Device, classes: int, source: tuple[int, int], target: tuple[int, int]) -> None:
    check_enlarge(device, classes, source, target)


@pytest.fixture(scope="module")
def engine_cache(tmp_path_factory: pytest.TempPathFactory, device: PycudaDevice) -> Iterator[Path]:
    """Engines of cam and affinity for this GPU."""
    build = pytest.importorskip("multisa.export.tensorrt.build")
    cache = tmp_path_factory.mktemp("engines")
    try:
        target = "sm{}{}".format(*default_gpu().compute_capability)
        import_library(LIBRARY)
    except BackendUnavailable as error:
        pytest.skip(f"no GPU or library to run on: {error}")
    options = build.BuildOptions((target,), "fp32", (), (), LIBRARY, cache)
    try:
        build.build_engines(load_bundle(default_bundle_path()), options).raise_failures()
    except MultisaError as error:
        pytest.skip(f"{LIBRARY} builds nothing for {target}: {error}")
    yield cache


def test_masks_of_images(engine_cache: Path, device: PycudaDevice) -> None:
    """Against the CPU; twice, so that the second call works in memory that is there."""
    bundle = load_bundle(default_bundle_path())
    parameters = bundle.manifest.parameters.label
    with (
        OnnxRuntimeBackend(bundle.read_file(graph_file(CAM)), contract=CAM) as cam_here,
        OnnxRuntimeBackend(bundle.read_file(graph_file(AFFINITY)), contract=AFFINITY) as affinity_here,
        open_tensorrt(bundle, CAM, TensorRTOptions(library=LIBRARY, engine_cache=engine_cache)) as cam,
        open_tensorrt(bundle, AFFINITY, TensorRTOptions(library=LIBRARY, engine_cache=engine_cache)) as affinity,
        GpuPipeline(cam, affinity, bundle.manifest, device) as pipeline,
    ):
        for name, classes in list(IMAGES.items()) * 2:
            with Image.open(default_bundle_path().parents[1] / "demo_images" / f"{name}.jpg") as image:
                rgb = np.asarray(image.convert("RGB").resize((320, 240)))
            ids = tuple(bundle.manifest.classes.index(label) for label in classes)
            maps = cam_here.run(rgb[None])["cam"][0][[index - 1 for index in ids]]
            walked = walk_scores(maps, affinity_here.run(rgb[None])["affinity"], parameters)
            expected = pseudo_mask(rgb, walked, ids, parameters)
            (got,) = pipeline.label(rgb[None], [classes])
            assert isinstance(got, GpuLabels), got
            # TensorFloat-32 in the networks; the CRF decides at edges by little.
            assert (got.mask == expected.mask).mean() >= 0.99
            assert np.abs(got.confidence - 255 * expected.probabilities.max(axis=0)).mean() <= 3
