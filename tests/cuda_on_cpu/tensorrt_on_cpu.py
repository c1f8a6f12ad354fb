"""TensorRTBackend on the CPU: test_runtime_tensorrt.py runs these tests in a process with the CPU's libcuda.

fake_tensorrt.py computes the engines; every byte goes through pycuda, the driver's streams and CUDA graphs.
"""

import dataclasses
import gc
import itertools
import json
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import make_engine, make_library
from PIL import Image

from multisa.kernels import random_walk
from multisa.kernels.cuda import calls
from multisa.kernels.cuda.driver import Driver, DriverError
from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError, PycudaDevice
from multisa.runtime.backends import tensorrt as tensorrt_backend
from multisa.runtime.backends import tensorrt_context, tensorrt_runtime
from multisa.runtime.backends.base import AFFINITY, CAM, SEGMENTER, GraphContract, graph_file
from multisa.runtime.backends.engine_cache import FLAGS, EngineCache, EngineKey, Profile, this_platform
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.registry import BackendRequest, select_backend
from multisa.runtime.backends.tensorrt import TensorRTBackend, TensorRTOptions, open_tensorrt
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle
from multisa.runtime.errors import BackendError, BackendUnavailable, UsageError
from multisa.runtime.gpu.pipeline import GpuPipeline
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.run import run as run_job
from multisa.runtime.jobs.spec import RunOptions, make_job
from multisa.runtime.predict import walk

PROFILES = [((1, 32, 32), (1, 64, 64), (2, 96, 96)), ((1, 32, 32), (1, 96, 128), (4, 160, 160))]
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
MAGIC = 0xBA55ED50.to_bytes(4, "little")


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return load_bundle(default_bundle_path())


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Both libraries installed; at the end no rule of theirs was broken."""
    modules = {name: make_library(name.replace("-", "_"), version) for name, version in VERSIONS.items()}
    for module in modules.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    tensorrt_runtime.start_runtime.cache_clear()
    yield modules
    for module in modules.values():
        assert module.Runtime._broken_rules == []


@pytest.fixture(params=VERSIONS)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Store = Callable[..., Path]


@pytest.fixture
def store(bundle: Bundle, tmp_path: Path) -> Store:
    """Puts engines into a cache as the builder does."""

    def put(contract: GraphContract, library: str = "tensorrt", *, data: bytes | None = None, **key: Any) -> Path:
        name = graph_file(contract)
        facts = {
            "graph": contract.name,
            "precision": "fp32",
            "onnx_sha256": bundle.manifest.files[name].sha256,
            "library": library,
            "library_version": VERSIONS[library],
            "target": "sm89",
            "gpu": "CPU",
            "profiles": tuple(Profile(*profile) for profile in PROFILES),
            "flags": FLAGS,
            "platform": this_platform(),
        }
        built = data if data is not None else make_engine(bundle.read_file(name), PROFILES)
        EngineCache(tmp_path / "cache").get_or_build(EngineKey(**facts | key), lambda: built)
        return tmp_path / "cache"

    return put


def crop(height: int, width: int, batch: int = 1) -> np.ndarray:
    """Pieces of an image, uint8 [batch, height, width, 3]."""
    with Image.open(default_bundle_path().parents[1] / "demo_images" / "chelsea.jpg") as image:
        pixels = np.asarray(image.convert("RGB"))
    return np.stack([pixels[9 * i : 9 * i + height, 7 * i : 7 * i + width] for i in range(batch)])


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every launch of a CUDA graph."""
    seen: list[int] = []
    launch = Driver.launch_graph

    def count(self: Driver, executable: int, stream: int) -> None:
        seen.append(executable)
        launch(self, executable, stream)

    monkeypatch.setattr(Driver, "launch_graph", count)
    return seen


@pytest.mark.parametrize("contract", [CAM, AFFINITY, SEGMENTER], ids=lambda contract: contract.name)
def test_equals_onnx_runtime(bundle: Bundle, store: Store, library: str, contract: GraphContract) -> None:
    cache = store(contract, library)
    reference = OnnxRuntimeBackend(bundle.read_file(graph_file(contract)), contract=contract)
    images = [crop(64, 80), crop(33, 47, batch=2), crop(64, 80)[:, ::-1], crop(64, 80)]
    with reference, open_tensorrt(bundle, contract, TensorRTOptions(library=library, engine_cache=cache)) as backend:
        assert backend.name == library and backend.contract is contract
        for image in images:
            assert_equal(backend.run(image), reference.run(image))


def test_captured_calls(bundle: Bundle, store: Store, launches: list[int]) -> None:
    """Two plain calls of a shape, then its CUDA graph; other shapes in between change nothing."""
    cache = store(SEGMENTER)
    reference = OnnxRuntimeBackend(bundle.read_file("segmenter.onnx"))
    with reference, open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=cache)) as backend:
        kept = backend.run(crop(64, 64))  # must not change with later calls
        first = {name: array.copy() for name, array in kept.items()}
        for shift in range(4):
            image = np.roll(crop(64, 64), 9 * shift, axis=2)
            assert_equal(backend.run(image), reference.run(image))
            assert_equal(backend.run(crop(40, 50)), reference.run(crop(40, 50)))
        assert len(launches) == 5 and len(set(launches)) == 2
        assert_equal(kept, first)
        # Larger memory than the graphs know, in the same profile, and back.
        assert_equal(backend.run(crop(96, 96, 2)), reference.run(crop(96, 96, 2)))
        for _ in range(3):
            assert_equal(backend.run(crop(64, 64)), reference.run(crop(64, 64)))


def test_a_folder_of_many_sizes_captures_a_few(
    bundle: Bundle, store: Store, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_context, "MAX_GRAPHS", 2)
    destroyed: list[int] = []
    destroy = Driver.destroy_graph
    monkeypatch.setattr(Driver, "destroy_graph", lambda self, e: (destroyed.append(e), destroy(self, e))[1])
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER))) as backend:
        backend.run(crop(96, 96))  # memory for all that follow
        for _, height in itertools.product(range(2), (40, 48, 56)):
            backend.run(crop(height, 40))
        assert launches == [] and len(destroyed) == 1
        backend.run(crop(56, 40))
        assert len(launches) == 1
    assert len(destroyed) == 3


def test_rtx_captures_by_itself(bundle: Bundle, store: Store, launches: list[int]) -> None:
    cache = store(SEGMENTER, "tensorrt-rtx")
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library="tensorrt-rtx", engine_cache=cache)) as backend:
        results = [backend.run(crop(64, 64)) for _ in range(4)]
    assert_equal(results[3], results[0])
    assert launches == []


def test_what_cannot_be_captured_runs(
    bundle: Bundle, store: Store, launches: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    data = make_engine(bundle.read_file("segmenter.onnx"), PROFILES, not_capturable=True)
    reference = OnnxRuntimeBackend(bundle.read_file("segmenter.onnx"))
    with (
        reference,
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER, data=data))) as backend,
    ):
        for shift in range(4):
            image = np.roll(crop(64, 64), shift, axis=1)
            assert_equal(backend.run(image), reference.run(image))
    assert launches == []
    (message,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "not captured as CUDA graphs" in message and "a loop cannot be captured" in message


def test_threads(bundle: Bundle, store: Store, library: str) -> None:
    """Eight threads, two profiles, shapes that are captured on the way."""
    cache = store(SEGMENTER, library)
    images = [crop(*size) for size in ((64, 64), (48, 80), (120, 140), (33, 159, 3))]
    with (
        OnnxRuntimeBackend(bundle.read_file("segmenter.onnx")) as reference,
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library=library, engine_cache=cache)) as backend,
        ThreadPoolExecutor(8) as pool,
    ):
        expected = [reference.run(image) for image in images]
        for got, wanted in zip(pool.map(backend.run, images * 8), expected * 8, strict=True):
            assert_equal(got, wanted)


def test_the_narrowest_profile_is_chosen(bundle: Bundle, store: Store) -> None:
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER))) as backend:
        assert [str(profile) for profile in backend.profiles] == [
            "1x32x32:1x64x64:2x96x96",
            "1x32x32:1x96x128:4x160x160",
        ]
        backend.run(crop(64, 64))
        assert list(backend._contexts) == [0]
        backend.run(crop(64, 64, 3))
        assert list(backend._contexts) == [0, 1]
        with pytest.raises(
            BackendError,
            match=r"got an image of 1x161x40 .*1x32x32:1x64x64:2x96x96, 1x32.*multisa build .* --target sm89 "
            ".*--profile 1x64x40:1x161x40:1x161x40",
        ):
            backend.run(crop(161, 40))
        with pytest.raises(BackendError, match="expected uint8"):
            backend.run(crop(64, 64)[0])


def use_kernels_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PycudaDevice:
    """Let `multisa.kernels` work on the tests' driver, with a fatbin of no content."""
    (folder / "kernels.fatbin").write_bytes(MAGIC)
    device = PycudaDevice(fatbin=folder / "kernels.fatbin")
    monkeypatch.setattr(calls, "default_device", lambda: device)
    return device


def test_walk_on_what_the_network_left_on_the_device(
    bundle: Bundle, store: Store, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The affinity never leaves the GPU; a later call and closing the backend do not change it."""
    device = use_kernels_in(tmp_path, monkeypatch)
    image = crop(64, 64)
    with OnnxRuntimeBackend(bundle.read_file("affinity.onnx")) as reference:
        affinity = reference.run(image)["affinity"]
    scores = np.random.default_rng(1).random((1, 2, *affinity.shape[2:]), dtype=np.float32)
    there = calls.DeviceArray(device, scores.shape)
    device.upload(there.pointer, scores)
    with open_tensorrt(
        bundle, AFFINITY, TensorRTOptions(library=library, engine_cache=store(AFFINITY, library))
    ) as backend:
        outputs = backend.run_on_device(image)
        assert outputs["affinity"].__cuda_array_interface__["shape"] == affinity.shape
        walked = random_walk(there, outputs["affinity"], steps=8, backend="cuda")
        other = backend.run_on_device(image[:, ::-1])
    np.testing.assert_array_equal(outputs["affinity"].numpy(), affinity)
    assert not np.array_equal(other["affinity"].numpy(), affinity)
    expected = random_walk(scores, affinity, steps=8, backend="cpu")
    np.testing.assert_allclose(walked.numpy(), expected, atol=1e-4)


def test_arrays_of_the_device(bundle: Bundle, store: Store, library: str) -> None:
    """Work on the default stream waits for them; any thread may release them."""
    image = crop(64, 64)
    with (
        OnnxRuntimeBackend(bundle.read_file("segmenter.onnx")) as reference,
        open_tensorrt(
            bundle, SEGMENTER, TensorRTOptions(library=library, engine_cache=store(SEGMENTER, library))
        ) as backend,
        warnings.catch_warnings(record=True) as told,
    ):
        kept = [backend.run_on_device(image)]
        got = {name: array.numpy() for name, array in kept[0].items()}
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
        assert_equal(got, reference.run(image))
    assert [str(warning.message) for warning in told] == []


def test_run_after_run_on_device(bundle: Bundle, store: Store) -> None:
    """The next call does not overwrite the image of a call that nobody waited for."""
    images = [np.roll(crop(64, 64), 11 * i, axis=1) for i in range(6)]
    with (
        OnnxRuntimeBackend(bundle.read_file("segmenter.onnx")) as reference,
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER))) as backend,
    ):
        left = [backend.run_on_device(image) for image in images]
        assert_equal(backend.run(images[0]), reference.run(images[0]))
        for arrays, image in zip(left, images, strict=True):
            got = {name: array.numpy() for name, array in arrays.items()}
            assert_equal(got, reference.run(image))


def test_closed_and_forgotten(bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend releases its streams and graphs, in whatever thread it is garbage-collected."""
    alive: set[int] = set()
    create, destroy = Driver.create_stream, Driver.destroy_stream

    def created(self: Driver) -> int:
        stream = create(self)
        alive.add(stream)
        return stream

    monkeypatch.setattr(Driver, "create_stream", created)
    monkeypatch.setattr(
        Driver, "destroy_stream", lambda self, stream: (alive.discard(stream), destroy(self, stream))[1]
    )
    backend = open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER)))
    backend.run(crop(64, 64))
    assert len(alive) == 1
    backend.close()
    backend.close()
    assert not alive
    with pytest.raises(BackendError, match="closed"):
        backend.run(crop(64, 64))

    forgotten = [open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER)))]
    for _ in range(3):
        forgotten[0].run(crop(64, 64))
    assert len(alive) == 1
    thread = threading.Thread(target=forgotten.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert not alive


def test_failing_driver(bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver error becomes a BackendError, and the next call works again."""
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER))) as backend:
        expected = backend.run(crop(64, 64))
        with monkeypatch.context() as patch:

            def refuse(*_: Any) -> None:
                raise DriverError("cuMemcpyHtoDAsync_v2: an illegal address (CUDA error 700)")

            patch.setattr(Driver, "upload", refuse)
            with pytest.raises(BackendError, match=r"segmenter: cannot be run on CPU: .*illegal address"):
                backend.run(crop(64, 64))
        assert_equal(backend.run(crop(64, 64)), expected)


@pytest.mark.parametrize(
    "library_call", ["set_input_shape", "set_tensor_address", "execute_async_v3", "set_optimization_profile_async"]
)
def test_every_refusal_is_reported(
    bundle: Bundle, store: Store, libraries: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, library_call: str
) -> None:
    """A call that returns False ends in an error with its name, not in a wrong answer."""
    context = libraries["tensorrt"].IExecutionContext
    monkeypatch.setattr(context, library_call, lambda *_: False)
    with (
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER))) as backend,
        pytest.raises(BackendError, match=f"tensorrt refused {library_call}"),
    ):
        backend.run(crop(64, 64))


def test_no_engine(bundle: Bundle, store: Store, tmp_path: Path) -> None:
    cache = store(SEGMENTER, target="sm80")
    store(SEGMENTER, library_version="10.13.3.9")
    store(SEGMENTER, onnx_sha256="0" * 64)
    with pytest.raises(BackendUnavailable) as caught:
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=cache))
    message = str(caught.value)
    assert caught.value.exit_code == 5
    for name, version in VERSIONS.items():
        assert f"{name} {version}: no engine for sm89 (CPU)" in message
        build = f"multisa build {bundle.path} --target sm89 --graph segmenter --library {name}"
        assert f"{build} --engine-cache {cache}" in message
    with pytest.raises(BackendUnavailable, match=r"^tensorrt 11\.4\.0\.106: no engine for sm89 [^;]*$"):
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library="tensorrt", engine_cache=tmp_path / "none"))


def test_the_library_with_an_engine_is_taken(bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = store(SEGMENTER, "tensorrt-rtx", gpu="")
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=cache)) as backend:
        assert backend.name == "tensorrt-rtx"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(
        BackendUnavailable, match=r"tensorrt-rtx is not installed: .*pip install tensorrt-rtx-cu13-bindings "
    ):
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=cache))


def test_an_engine_of_this_gpu_comes_first(bundle: Bundle, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "multisa.runtime.tensorrt")
    cache = store(SEGMENTER, gpu="Another GPU")
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=cache)):
        assert "tuned on Another GPU and may be slow on CPU" in caplog.text
    store(SEGMENTER, gpu="CPU")
    caplog.clear()
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=cache)):
        assert "tuned on" not in caplog.text and "model.plan on CPU" in caplog.text


@pytest.mark.parametrize("damage", ["refused by the library", "bytes on the disk"])
def test_an_engine_that_cannot_be_loaded_is_quarantined(bundle: Bundle, store: Store, damage: str) -> None:
    broken = b"not an engine\n" if damage == "refused by the library" else None
    cache = store(SEGMENTER, data=broken)
    if broken is None:
        (path,) = cache.glob("*/model.plan")
        altered = bytearray(path.read_bytes())
        altered[-1] ^= 1
        path.write_bytes(altered)
    reason = "magicTag failed" if broken else "damaged"
    with pytest.raises(BackendUnavailable, match=f"{reason}.*multisa build .* --target sm89"):
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library="tensorrt", engine_cache=cache))
    assert not list(cache.glob("[0-9a-f]*/model.plan"))
    (kept,) = (cache / "quarantine").glob("*/reason.txt")
    assert kept.read_text().strip()
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER))) as backend:
        backend.run(crop(64, 64))


def test_the_next_engine_is_tried(bundle: Bundle, store: Store) -> None:
    store(SEGMENTER, data=b"not an engine\n")
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER, gpu=""))) as backend:
        assert isinstance(backend, TensorRTBackend)


@pytest.mark.parametrize(
    ("refusal", "error", "remedy"),
    [
        ("[defaultAllocator] CUDA Out of Memory", BackendError, "free memory of CPU"),
        ("CUDA driver version is insufficient", BackendUnavailable, "update the NVIDIA driver"),
    ],
    ids=["memory", "driver"],
)
def test_a_good_engine_stays(bundle: Bundle, store: Store, refusal: str, error: type[Exception], remedy: str) -> None:
    """If the machine is at fault, the engine is not quarantined."""
    cache = store(SEGMENTER, data=make_engine(b"", PROFILES, refused=refusal))
    with pytest.raises(error, match=f"{refusal.replace('[', '.').replace(']', '.')}[;:] {remedy}"):
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library="tensorrt", engine_cache=cache))
    assert list(cache.glob("[0-9a-f]*/model.plan"))


@pytest.mark.parametrize(
    ("graph", "changes", "message"),
    [
        ("cam.onnx", {}, "got an engine of .*cam"),
        ("segmenter.onnx", {"on_host": "probabilities"}, "probabilities.*on the host"),
        ("segmenter.onnx", {"profiles": [((1, 64, 64), (1, 32, 32), (2, 96, 96))]}, "profile 0: got"),
    ],
    ids=["another graph", "on the host", "profile out of order"],
)
def test_an_engine_that_breaks_the_contract(
    bundle: Bundle, store: Store, graph: str, changes: dict[str, Any], message: str
) -> None:
    data = make_engine(bundle.read_file(graph), **{"profiles": PROFILES, **changes})
    with pytest.raises(BackendError, match=message):
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER, data=data)))


def test_usage(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="library: got 'openvino', expected tensorrt or tensorrt-rtx"):
        open_tensorrt(bundle, CAM, TensorRTOptions(library="openvino"))
    with pytest.raises(UsageError, match="precision: got 'fp8', expected one of fp32, fp16, int8"):
        open_tensorrt(bundle, CAM, TensorRTOptions(precision="fp8"))
    files = {"cam.onnx": bundle.manifest.files["cam.onnx"]}
    plain = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))
    with pytest.raises(UsageError, match=r"precision fp16 for cam, expected fp32; make it: multisa convert"):
        open_tensorrt(plain, CAM, TensorRTOptions(precision="fp16"))


def test_the_bundles_own_engines(bundle: Bundle, store: Store, tmp_path: Path) -> None:
    store(SEGMENTER).rename(tmp_path / "engines")
    moved = dataclasses.replace(bundle, path=tmp_path)
    with open_tensorrt(moved, SEGMENTER) as backend:
        backend.run(crop(64, 64))


def test_engines_are_looked_for_in_both_folders(bundle: Bundle, store: Store, tmp_path: Path) -> None:
    """The user's cache, and the bundle's own."""
    store(SEGMENTER).rename(tmp_path / "engines")
    moved = dataclasses.replace(bundle, path=tmp_path)
    cache = store(SEGMENTER, gpu="")
    with open_tensorrt(moved, SEGMENTER, TensorRTOptions(engine_cache=cache)) as backend:
        own = backend.detail["plan_sha256"]
    (tmp_path / "engines").rename(tmp_path / "elsewhere")
    with open_tensorrt(moved, SEGMENTER, TensorRTOptions(engine_cache=cache)) as backend:
        assert backend.detail["plan_sha256"] == own
        assert backend.detail == {
            "gpu": "CPU",
            "library": "tensorrt 11.4.0.106",
            "plan_sha256": own,
            "profiles": ["1x32x32:1x64x64:2x96x96", "1x32x32:1x96x128:4x160x160"],
        }
    (tmp_path / "elsewhere").rename(tmp_path / "engines")
    with open_tensorrt(moved, SEGMENTER, TensorRTOptions(engine_cache=tmp_path / "none")):
        pass


@pytest.mark.parametrize("other", [{"platform": "windows-amd64"}, {"flags": ("TF32=1",)}], ids=str)
def test_an_engine_for_another_machine_is_left_alone(bundle: Bundle, store: Store, other: dict[str, Any]) -> None:
    cache = store(SEGMENTER, data=b"not an engine\n", **other)
    with pytest.raises(BackendUnavailable, match="no engine for sm89"):
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library="tensorrt", engine_cache=cache))
    assert list(cache.glob("[0-9a-f]*/model.plan")) and not (cache / "quarantine").exists()


@pytest.mark.parametrize(
    ("refusal", "is_moved"),
    [
        ("Error Code 1: Serialization (stdVersionRead == kSERIALIZATION_VERSION failed)", True),
        ("The engine plan file is not compatible with this version of TensorRT, got 10", True),
        ("The engine plan file is generated on an incompatible device, expecting compute 8.9", False),
        ("libnvinfer_builder_resource.so.11: cannot open shared object file", False),
        ("IRuntime::deserializeCudaEngine: CUDA initialization failure with error: 46", False),
    ],
)
def test_only_an_engine_that_is_at_fault_is_quarantined(
    bundle: Bundle, store: Store, refusal: str, is_moved: bool
) -> None:
    cache = store(SEGMENTER, data=make_engine(b"", PROFILES, refused=refusal))
    with pytest.raises(BackendUnavailable) as caught:
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library="tensorrt", engine_cache=cache, may_repair=False))
    assert refusal in str(caught.value)
    assert list(cache.glob("[0-9a-f]*/model.plan")) and not (cache / "quarantine").exists()
    with pytest.raises(BackendUnavailable):
        open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library="tensorrt", engine_cache=cache))
    assert bool(list(cache.glob("[0-9a-f]*/model.plan"))) is not is_moved


def test_an_engine_that_cannot_be_read_stays(bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = store(SEGMENTER)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "model.plan":
            raise OSError(24, "Too many open files", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(BackendUnavailable, match=r"model\.plan: cannot be read: Too many open files"):
            open_tensorrt(bundle, SEGMENTER, TensorRTOptions(library="tensorrt", engine_cache=cache))
    with open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=cache)):
        assert not (cache / "quarantine").exists()


def test_auto_takes_an_engine_for_every_image(bundle: Bundle, store: Store) -> None:
    """An engine of few sizes runs what it can if requested; "auto" skips it, for a run would fail midway."""
    side = bundle.manifest.parameters.long_side
    cache = store(SEGMENTER)
    for name in ("auto", "tensorrt"):
        choice = select_backend(bundle, SEGMENTER, BackendRequest(name, engine_cache=cache))
        choice.backend.close()
        assert choice.backend.name == ("onnxruntime-cpu" if name == "auto" else "tensorrt")
        assert name != "auto" or "no profile for 1x64x161 (batch x height x width)" in choice.reason
    wide = [((1, 64, 64), (1, 64, side), (1, side - 1, side)), ((1, 64, 64), (1, side, 64), (1, side, side))]
    store(SEGMENTER, data=make_engine(bundle.read_file("segmenter.onnx"), wide), profiles=profiles_of(wide))
    choice = select_backend(bundle, SEGMENTER, BackendRequest(engine_cache=cache))
    choice.backend.close()
    assert (choice.backend.name, choice.reason) == ("tensorrt", "auto")
    assert choice.to_json()["detail"]["profiles"] == [str(profile) for profile in profiles_of(wide)]


def profiles_of(shapes: list[Any]) -> tuple[Profile, ...]:
    return tuple(Profile(*shape) for shape in shapes)


def test_auto_skips_an_engine_that_breaks_its_contract(bundle: Bundle, store: Store) -> None:
    side = bundle.manifest.parameters.long_side
    every = [((1, 64, 64), (1, side, side), (1, side, side))]
    data = make_engine(bundle.read_file("cam.onnx"), every)
    cache = store(SEGMENTER, data=data, profiles=profiles_of(every))
    choice = select_backend(bundle, SEGMENTER, BackendRequest(engine_cache=cache))
    choice.backend.close()
    assert choice.backend.name == "onnxruntime-cpu" and "segmenter: got an engine of" in choice.reason
    with pytest.raises(BackendError, match="segmenter: got an engine of"):
        select_backend(bundle, SEGMENTER, BackendRequest("tensorrt", engine_cache=cache))


def test_closing_while_a_profile_is_opened(bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context that another thread is creating is closed, too."""
    opening, go_on = threading.Event(), threading.Event()
    made: list[tensorrt_context.ExecutionContext] = []

    class SlowContext(tensorrt_context.ExecutionContext):
        def __init__(self, *arguments: Any) -> None:
            opening.set()
            assert go_on.wait(30)
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(tensorrt_backend, "ExecutionContext", SlowContext)
    backend = open_tensorrt(bundle, SEGMENTER, TensorRTOptions(engine_cache=store(SEGMENTER)))
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(backend.run, crop(64, 64))
        assert opening.wait(30)
        closing = pool.submit(backend.close)
        with pytest.raises(TimeoutError):
            closing.result(timeout=0.2)  # it waits for the context
        go_on.set()
        closing.result(timeout=30)
        assert running.exception(timeout=30) is None or "closed" in str(running.exception())
    assert [context._context for context in made] == [None]


def test_pseudo_masks_that_are_made_on_the_device(
    bundle: Bundle, store: Store, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run labels whole images on the GPU, and the masks are those of ONNX Runtime's path."""
    use_kernels_in(tmp_path, monkeypatch)
    batches: list[tuple[int, ...]] = []
    label = GpuPipeline.label

    def noted(pipeline: GpuPipeline, images: np.ndarray, *rest: object) -> object:
        batches.append(images.shape)
        return label(pipeline, images, *rest)

    monkeypatch.setattr(GpuPipeline, "label", noted)
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(crop(96, 128)[0]).resize((64, 48)).save(images / "cat.png")  # enlarged to 128 x 96
    (tmp_path / "labels.csv").write_text("image,labels\ncat.png,cat\n")
    store(CAM, library)
    cache = store(AFFINITY, library)
    masks = []
    for name in ("onnxruntime-cpu", library):
        request, out = BackendRequest(name, "fp32", cache), tmp_path / name
        options = RunOptions()
        job = make_job("label", str(images), out, bundle.path, request, options, method="walk")
        run_job(job, options, LocalExecutor, labels=tmp_path / "labels.csv")
        with Image.open(out / "masks" / "cat.png") as mask:
            masks.append(np.asarray(mask))
    assert batches == [(1, 96, 128, 3)]
    assert masks[0].any()
    assert (masks[1] == masks[0]).mean() >= 0.999  # all but ties: the GPU walks in half precision
    settings = json.loads((tmp_path / library / ".multisa" / "config.json").read_text())
    assert settings["masks are made on"] == "gpu"
    record = json.loads((tmp_path / library / ".multisa" / "run.json").read_text())
    assert record["backends"]["affinity"]["detail"]["gpu"] == "CPU"
    assert "pycuda" in record["versions"]


def test_without_kernels_the_walk_is_on_the_cpu(
    bundle: Bundle, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise DeviceUnavailableError("kernels.fatbin: not found")

    monkeypatch.setattr(calls, "default_device", refuse)
    with open_tensorrt(bundle, AFFINITY, TensorRTOptions(engine_cache=store(AFFINITY))) as backend:
        run_affinity, device_errors = walk._affinity_for_the_walk(backend, radius=5)
        assert isinstance(run_affinity(crop(64, 64))["affinity"], np.ndarray) and device_errors == ()
    assert "the random walk runs on the CPU: kernels.fatbin: not found" in capsys.readouterr().err
