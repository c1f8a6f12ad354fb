"""Plans on a real GPU: built here, run, and held against ONNX Runtime on the CPU."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multisa.kernels import random_walk
from multisa.runtime.backends.base import AFFINITY, CAM, SEGMENTER, GraphContract, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.tensorrt import open_tensorrt
from multisa.runtime.backends.tensorrt_runtime import LIBRARIES, default_gpu, import_library
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.errors import BackendUnavailable, MultisaError

SIZES = ((1, 160, 224), (2, 97, 131), (1, 160, 224), (1, 160, 224), (1, 320, 320), (1, 160, 224))
# TensorFloat-32 and other orders of addition; the labels are what must agree.
ABSOLUTE, AGREEMENT = 2e-2, 0.999


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(default_bundle_path())


@pytest.fixture(scope="module", params=LIBRARIES)
def built(
    request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """A library and a folder with its plans of all graphs for this GPU."""
    build = pytest.importorskip("multisa.export.tensorrt.build")
    library, cache = request.param, tmp_path_factory.mktemp("plans")
    try:
        target = "sm{}{}".format(*default_gpu().compute_capability)
        import_library(library)
    except BackendUnavailable as error:
        pytest.skip(f"no GPU or library to run on: {error}")
    options = build.BuildOptions((target,), "fp32", (), (), library, cache)
    try:
        build.build_engines(bundle, options).raise_failures()
    except MultisaError as error:
        if library == "tensorrt-rtx":  # it does not build for every GPU
            pytest.skip(f"{library} builds nothing for {target}: {error}")
        raise
    yield library, cache


def crop(batch: int, height: int, width: int) -> np.ndarray:
    with Image.open(default_bundle_path().parents[1] / "demo_images" / "chelsea.jpg") as image:
        resized = image.convert("RGB").resize((width, height + batch - 1))
    pixels = np.asarray(resized)
    return np.stack([pixels[i : i + height] for i in range(batch)])


@pytest.mark.parametrize("contract", [CAM, AFFINITY, SEGMENTER], ids=lambda contract: contract.name)
def test_equals_onnx_runtime(bundle: Bundle, built: tuple[str, Path], contract: GraphContract) -> None:
    """Plain and recorded calls, several sizes, and four threads."""
    library, cache = built
    images = [crop(*size) for size in SIZES]
    with (
        OnnxRuntimeBackend(bundle.read_file(graph_file(contract)), contract=contract) as reference,
        open_tensorrt(bundle, contract, library=library, cache=cache) as engine,
        ThreadPoolExecutor(4) as pool,
    ):
        expected = [reference.run(image) for image in images]
        for results in (map(engine.run, images), pool.map(engine.run, images)):
            for got, wanted in zip(results, expected, strict=True):
                for name, array in wanted.items():
                    assert got[name].dtype == array.dtype and got[name].shape == array.shape
                    if name == "labels":
                        assert (got[name] == array).mean() >= AGREEMENT
                    elif array.dtype == np.float32:
                        np.testing.assert_allclose(got[name], array, atol=ABSOLUTE)


def test_walk_without_a_copy(bundle: Bundle, built: tuple[str, Path]) -> None:
    """The kernels read what the network left on the device, and wait for it."""
    pytest.importorskip("pycuda")
    library, cache = built
    from multisa.kernels.cuda import calls
    from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError

    try:
        device = calls.default_device()
    except DeviceUnavailableError as error:
        pytest.skip(f"no kernels: {error}")
    image = crop(1, 160, 224)
    with open_tensorrt(bundle, AFFINITY, library=library, cache=cache) as engine:
        affinity = engine.run(image)["affinity"]
        scores = np.random.default_rng(0).random((1, 3, *affinity.shape[2:]), dtype=np.float32)
        expected = random_walk(scores, affinity, backend="cuda")
        there = calls.DeviceArray(device, scores.shape)
        device.upload(there.pointer, scores)
        for _ in range(3):
            outputs = engine.run_on_device(image)
            walked = random_walk(there, outputs["affinity"], backend="cuda").numpy()
            np.testing.assert_allclose(walked, expected, atol=1e-4)
