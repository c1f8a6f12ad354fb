"""GpuPipeline on the CPU: test_runtime_gpu_pipeline.py runs these tests with the CPU's libcuda.

The networks are engines of fake_tensorrt.py; work that is queued on a stream is done when somebody waits for
it.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import make_engine
from PIL import Image
from tensorrt_on_cpu import PROFILES, VERSIONS, libraries, use_kernels_in

from multisa.kernels import CrfParameters, DenseCRF
from multisa.kernels.cuda import calls
from multisa.kernels.cuda.driver import Driver, DriverError
from multisa.kernels.cuda.pycuda_context import DeviceUnavailableError, PrimaryContext
from multisa.runtime.backends.base import AFFINITY, CAM, graph_file
from multisa.runtime.backends.engine_cache import FLAGS, EngineCache, EngineKey, Profile, this_platform
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.backends.tensorrt import TensorRTOptions, open_tensorrt
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import BackendError, ImageError
from multisa.runtime.gpu import pipeline as gpu_pipeline
from multisa.runtime.gpu.pipeline import GpuPipeline, open_gpu_pipeline
from multisa.runtime.gpu.stages import GpuLabels
from multisa.runtime.predict.postprocess import background_and_foreground, pseudo_mask, resize_maps, walk_scores

assert libraries  # the fixture that installs both libraries, used by every test here
IMAGES = default_bundle_path().parents[1] / "demo_images"
CRF = CrfParameters(iterations=2)
STATUS = 8  # bytes of error words that come back with a mask


def image(name: str, height: int, width: int) -> np.ndarray:
    with Image.open(IMAGES / f"{name}.jpg") as image:
        return np.asarray(image.convert("RGB").resize((width, height)))


def tinted(name: str, height: int, width: int) -> np.ndarray:
    """An image whose left is red, its right green and its middle dark, as the tiny bundle likes it."""
    rgb = image(name, height, width).copy()
    side = 2 * width // 5
    rgb[:, :side, 1:] //= 5
    rgb[:, side:-side] //= 9
    rgb[:, -side:, ::2] //= 5
    return rgb


def engine_cache(bundle: Bundle, folder: Path, library: str) -> Path:
    """Engines of cam and affinity, stored as the builder does."""
    for contract in (CAM, AFFINITY):
        name = graph_file(contract)
        key = EngineKey(
            graph=contract.name,
            precision="fp32",
            onnx_sha256=bundle.manifest.files[name].sha256,
            library=library,
            library_version=VERSIONS[library],
            target="sm89",
            gpu="CPU",
            profiles=tuple(Profile(*profile) for profile in PROFILES),
            flags=FLAGS,
            platform=this_platform(),
        )
        EngineCache(folder).get_or_build(key, lambda: make_engine(bundle.read_file(name), PROFILES))  # noqa: B023
    return folder


@contextlib.contextmanager
def pipeline_of(
    bundle: Bundle, folder: Path, library: str = "tensorrt", manifest: Manifest | None = None
) -> Iterator[GpuPipeline]:
    """A pipeline on the tests' driver; `folder` is for engines and kernels."""
    cache = engine_cache(bundle, folder / "cache", library)
    with pytest.MonkeyPatch.context() as patch:
        device = use_kernels_in(folder, patch)
        with (
            open_tensorrt(bundle, CAM, TensorRTOptions(library=library, engine_cache=cache)) as cam,
            open_tensorrt(bundle, AFFINITY, TensorRTOptions(library=library, engine_cache=cache)) as affinity,
            GpuPipeline(cam, affinity, manifest or bundle.manifest, device) as pipeline,
        ):
            yield pipeline


class OnTheCpu:
    """The reference: ONNX Runtime, then the functions of postprocess.py."""

    def __init__(self, bundle: Bundle, manifest: Manifest | None = None) -> None:
        self._manifest = manifest or bundle.manifest
        self._cam, self._affinity = (
            OnnxRuntimeBackend(bundle.read_file(graph_file(contract)), contract=contract)
            for contract in (CAM, AFFINITY)
        )

    def walked(self, rgb: np.ndarray, ids: tuple[int, ...]) -> np.ndarray:
        maps = self._cam.run(rgb[None])["cam"][0][[i - 1 for i in ids]]
        edges = self._affinity.run(rgb[None])["affinity"]
        return walk_scores(maps, edges, self._manifest.parameters.label)

    def expect(self, got: Any, rgb: np.ndarray) -> None:
        """Equal masks except for ties, confidences within two levels: the GPU walks with fp16 weights."""
        assert isinstance(got, GpuLabels), got
        ids = tuple(self._manifest.classes.index(name) for name in got.classes)
        parameters = self._manifest.parameters.label
        expected = pseudo_mask(rgb, self.walked(rgb, ids), ids, parameters)
        assert got.mask.dtype == got.confidence.dtype == np.uint8
        assert got.mask.shape == got.confidence.shape == rgb.shape[:2]
        assert (got.mask == expected.mask).mean() >= 0.999
        differences = np.abs(got.confidence - 255 * expected.probabilities.max(axis=0))
        assert np.quantile(differences, 0.999) <= 2, differences.max()


def test_masks_of_images(tmp_path: Path) -> None:
    """The packaged bundle; classes given and from scores."""
    bundle = load_bundle(default_bundle_path())
    parameters = bundle.manifest.parameters
    short = dataclasses.replace(parameters.label, walk_steps=32, crf=CRF, background=0.7)
    manifest = dataclasses.replace(bundle.manifest, parameters=dataclasses.replace(parameters, label=short))
    cpu = OnTheCpu(bundle, manifest)
    given = {"astronaut": ("person",), "chelsea": None, "coffee": ("cat", "person", "sheep")}
    seen = set()
    with pipeline_of(bundle, tmp_path, manifest=manifest) as pipeline:
        for name, labels in given.items():
            rgb = image(name, 60, 76)
            (labelled,) = pipeline.label(rgb[None], [labels])
            cpu.expect(labelled, rgb)
            assert isinstance(labelled, GpuLabels) and (labels is None or labelled.classes == labels)
            assert list(labelled.scores) == list(bundle.manifest.foreground)
            seen |= {labelled.classes, *np.unique(labelled.mask).tolist()}

    assert ("cat",) in seen and {0, 1, 5} <= seen  # scores chose classes, and masks have several


@pytest.mark.parametrize("library", VERSIONS)
def test_batches(bundle: Bundle, tmp_path: Path, library: str) -> None:
    """Each image of a batch gets the result it would get alone, with its own classes."""
    cpu = OnTheCpu(bundle)
    names = ("astronaut", "chelsea", "coffee", "chelsea")
    batch = np.stack([tinted(name, 33, 47) for name in names])
    given = [("green",), None, (), ("red thing", "green")]
    with pipeline_of(bundle, tmp_path, library) as pipeline:
        together = pipeline.label(batch[:, ::-1, ::-1], given)  # not contiguous
        for rgb, labels, got in zip(batch[:, ::-1, ::-1], given, together, strict=True):
            (alone,) = pipeline.label(rgb[None], [labels])
            assert isinstance(got, GpuLabels) and isinstance(alone, GpuLabels)
            assert got.classes == alone.classes and got.scores == alone.scores
            np.testing.assert_array_equal(got.mask, alone.mask)
            np.testing.assert_array_equal(got.confidence, alone.confidence)
            if got.classes:
                cpu.expect(got, rgb)
                assert len(np.unique(got.mask)) == 1 + len(got.classes)
            else:
                assert not got.mask.any() and (got.confidence == 255).all()
        assert [len(got.classes) for got in together] == [1, 1, 0, 2]  # type: ignore[union-attr]


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every call of the driver that takes a stream: its name, the stream, and the bytes of a copy."""
    seen: list[tuple[str, int, int]] = []

    def watch(name: str, stream: int, size: int | None = None) -> None:
        true = getattr(Driver, name)

        def call(self: Driver, *arguments: Any) -> Any:
            seen.append((name, arguments[stream], arguments[size] if size is not None else 0))
            return true(self, *arguments)

        monkeypatch.setattr(Driver, name, call)

    for name in ("upload", "download"):
        watch(name, 3, 2)
    for name, stream in (("fill", 3), ("launch", 5), ("launch_graph", 1), ("synchronise", 0)):
        watch(name, stream)
    watch("record_event", 1)
    for name in ("download", "upload"):  # those that wait

        def refuse(*_: Any, name: str = name) -> None:
            seen.append((f"waiting {name}", 0, 0))

        monkeypatch.setattr(PrimaryContext, name, _and(getattr(PrimaryContext, name), refuse))
    return seen


def _and(true: Any, also: Any) -> Any:
    def both(*arguments: Any) -> Any:
        also()
        return true(*arguments)

    return both


def test_only_results_come_back(bundle: Bundle, tmp_path: Path, queued: list[tuple[str, int, int]]) -> None:
    """One upload for both networks; no default stream; no waiting but for the batch's own event."""
    rgb, size = tinted("chelsea", 33, 47)[None], 33 * 47
    with pipeline_of(bundle, tmp_path) as pipeline:
        pipeline.label(rgb, [("green",)])
        queued.clear()
        pipeline.label(rgb, [("green",)])
        names = [name for name, _, _ in queued]
        assert 0 not in {stream for _, stream, _ in queued}
        assert "synchronise" not in names and not [name for name in names if name.startswith("waiting")]
        scores = 4 * len(bundle.manifest.foreground)
        copies = [(stream, size) for name, stream, size in queued if name == "download"]
        results = [(pipeline._download, STATUS + 2 * size), (pipeline._download, 2 * 2 * size)]
        assert copies == [(pipeline._compute, scores), *results]
        lists = 4 * (1 + 3 * len(bundle.manifest.foreground))
        copies = [(stream, size) for name, stream, size in queued if name == "upload"]
        assert copies == [(pipeline._upload, 3 * size), (pipeline._compute, lists)]
        work = {stream for name, stream, _ in queued if name in ("launch", "launch_graph", "fill")}
        assert work == {pipeline._compute}


def test_threads_share_the_staging_buffers(bundle: Bundle, tmp_path: Path) -> None:
    """More threads than staging buffers, changing sizes: every mask is that of its own image."""
    sizes = [(32, 44), (33, 37), (40, 32)]
    images = [tinted("chelsea", *size) for size in sizes]
    images += [np.ascontiguousarray(rgb[:, ::-1]) for rgb in images]
    with pipeline_of(bundle, tmp_path) as pipeline, ThreadPoolExecutor(4) as pool:
        alone = [pipeline.label(rgb[None], [None])[0] for rgb in images]
        together = pool.map(lambda rgb: pipeline.label(rgb[None], [None])[0], images * 2)
        for got, expected in zip(together, alone * 2, strict=True):
            assert isinstance(got, GpuLabels) and isinstance(expected, GpuLabels)
            np.testing.assert_array_equal(got.mask, expected.mask)
            np.testing.assert_array_equal(got.confidence, expected.confidence)
    assert len({got.mask.tobytes() for got in alone}) == len(alone)  # type: ignore[union-attr]


def test_two_batches_are_in_flight(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is queued while the first is waited for, and does not change its result."""
    first, second = (tinted(name, 33, 47)[None] for name in ("chelsea", "coffee"))
    with pipeline_of(bundle, tmp_path) as pipeline, ThreadPoolExecutor(1) as pool:
        expected = pipeline.label(first, [("green",)])[0]
        waiting, go_on = threading.Event(), threading.Event()
        wait = Driver.synchronise_event

        def slowly(self: Driver, event: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                waiting.set()
                assert go_on.wait(30)
            wait(self, event)

        monkeypatch.setattr(Driver, "synchronise_event", slowly)
        running = pool.submit(pipeline.label, first, [("green",)])
        assert waiting.wait(30)
        other = pipeline.label(second, [("green",)])[0]
        go_on.set()
        got = running.result(30)[0]
    for labelled in (got, expected, other):
        assert isinstance(labelled, GpuLabels)
    np.testing.assert_array_equal(got.confidence, expected.confidence)
    np.testing.assert_array_equal(got.mask, expected.mask)
    assert not np.array_equal(other.confidence, got.confidence)


def test_sizes_that_come_and_go(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pipeline, "MAX_SIZES", 1)
    with pipeline_of(bundle, tmp_path) as pipeline:
        results = []
        for size in ((32, 44), (33, 37), (32, 44)):
            results.append(pipeline.label(tinted("chelsea", *size)[None], [None])[0])
            assert len(pipeline._postprocessors) == len(pipeline._outputs) == 1
    np.testing.assert_array_equal(results[0].mask, results[2].mask)  # type: ignore[union-attr]


def test_soft_maps(bundle: Bundle, tmp_path: Path) -> None:
    """The probabilities that the mask is the argmax of, background first."""
    rgb = tinted("coffee", 33, 47)
    parameters = bundle.manifest.parameters.label
    with pipeline_of(bundle, tmp_path) as pipeline:
        both, none = (pipeline.label(rgb[None], [labels])[0] for labels in (("red thing", "green"), ()))
    assert isinstance(both, GpuLabels) and isinstance(none, GpuLabels)
    walked = resize_maps(OnTheCpu(bundle).walked(rgb, (1, 2)), (33, 47))
    expected = DenseCRF(rgb, parameters.crf).infer(background_and_foreground(walked, parameters.background))
    assert both.probabilities.dtype == np.float16
    np.testing.assert_allclose(both.probabilities.astype(np.float32), expected, atol=4e-3)
    best = np.sort(both.probabilities, axis=0)
    clear = best[-1] > best[-2]
    np.testing.assert_array_equal(both.probabilities.argmax(axis=0)[clear], both.mask[clear])
    assert none.probabilities.shape == (1, 33, 47) and (none.probabilities == 1).all()


@pytest.fixture
def coarse(tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]) -> Bundle:
    """The tiny bundle with class maps of half the affinities' size."""
    model = onnx.load_from_string(graphs["cam.onnx"])
    (pool,) = (node for node in model.graph.node if node.op_type == "MaxPool")
    for attribute in pool.attribute:
        if attribute.name in ("kernel_shape", "strides"):
            attribute.ints[:] = [8, 8]
    return write_bundle(tmp_path / "coarse", manifest, graphs | {"cam.onnx": model.SerializeToString()})


def test_coarse_maps(coarse: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    """Maps that are enlarged before the walk."""
    rgb = tinted("chelsea", 33, 47)
    with pipeline_of(coarse, tmp_path) as pipeline:
        (got,) = pipeline.label(rgb[None], [("red thing", "green")])
        (shape,) = pipeline._postprocessors
        assert (shape.cam, shape.grid) == ((5, 6), (9, 12))
    OnTheCpu(coarse).expect(got, rgb)
    with pipeline_of(bundle, tmp_path) as pipeline:
        (fine,) = pipeline.label(rgb[None], [("red thing", "green")])
    assert not np.array_equal(got.confidence, fine.confidence)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [{"use_crf": False}, {"walk_to_peak": False}, {"class_gain": (3.0, 0.5)}])
def test_parameters(bundle: Bundle, tmp_path: Path, change: dict[str, Any]) -> None:
    """Each makes a difference, the same as on the CPU."""
    parameters = bundle.manifest.parameters
    changed = dataclasses.replace(parameters, label=dataclasses.replace(parameters.label, **change))
    manifest = dataclasses.replace(bundle.manifest, parameters=changed)
    rgb, given = tinted("chelsea", 33, 47), [("red thing", "green")]
    with pipeline_of(bundle, tmp_path) as pipeline:
        (usual,) = pipeline.label(rgb[None], given)
    with pipeline_of(bundle, tmp_path, manifest=manifest) as pipeline:
        (got,) = pipeline.label(rgb[None], given)
    OnTheCpu(bundle, manifest).expect(got, rgb)
    assert not np.array_equal(got.confidence, usual.confidence)  # type: ignore[union-attr]


def test_one_image_that_cannot_be_done(bundle: Bundle, tmp_path: Path) -> None:
    """The tiny network returns NaN for a black image; its neighbours and successors succeed."""
    good = tinted("chelsea", 32, 48)
    batch = np.stack([good, np.zeros_like(good), good[::-1]])
    with pipeline_of(bundle, tmp_path) as pipeline:
        first, black, last = pipeline.label(batch, [("green",)] * 3)
        (after,) = pipeline.label(good[None], [("green",)])
    assert isinstance(black, ImageError)
    assert str(black).startswith("post-processing: scores: got NaN or infinity")
    cpu = OnTheCpu(bundle)
    for got, rgb in ((first, good), (last, good[::-1]), (after, good)):
        cpu.expect(got, rgb)


def test_a_size_that_kernels_do_not_take(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("features: got values up to 1e9 standard deviations, expected below 65536")

    rgb = tinted("chelsea", 32, 48)[None]
    with pipeline_of(bundle, tmp_path) as pipeline:
        with monkeypatch.context() as patch:
            patch.setattr(gpu_pipeline, "GpuPostprocessor", refuse)
            (error,) = pipeline.label(rgb, [("green",)])
        assert isinstance(error, ImageError) and "standard deviations" in str(error)
        assert isinstance(pipeline.label(rgb, [("green",)])[0], GpuLabels)


@pytest.mark.parametrize("call", ["upload", "launch", "launch_graph", "download"])
def test_a_driver_that_refuses(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whichever call fails, it is a BackendError and the next call is right."""
    rgb = tinted("chelsea", 32, 48)
    with pipeline_of(bundle, tmp_path) as pipeline:
        (expected,) = pipeline.label(rgb[None], [None])
        with monkeypatch.context() as patch:

            def refuse(*_: Any) -> None:
                raise DriverError("an illegal address (CUDA error 700)")

            patch.setattr(Driver, call, refuse)
            with pytest.raises(BackendError, match=r"labelling cannot be run on CPU: an illegal address"):
                pipeline.label(rgb[None], [None])
        for _ in range(3):
            (got,) = pipeline.label(rgb[None], [None])
            np.testing.assert_array_equal(got.confidence, expected.confidence)  # type: ignore[union-attr]


def test_what_does_not_fit(bundle: Bundle, tmp_path: Path) -> None:
    parameters = bundle.manifest.parameters
    narrow = dataclasses.replace(parameters, label=dataclasses.replace(parameters.label, walk_radius=3))
    manifest = dataclasses.replace(bundle.manifest, parameters=narrow)
    rgb = tinted("chelsea", 32, 48)[None]
    with pipeline_of(bundle, tmp_path, manifest=manifest) as pipeline:
        with pytest.raises(BackendError, match=r"affinity: got \[1, 34, 8, 12\], expected \[1, 12, 8, 12\]"):
            pipeline.label(rgb, [("green",)])
        with pytest.raises(BackendError, match="got labels for 2 images, expected 1"):
            pipeline.label(rgb, [None, None])
        with pytest.raises(BackendError, match="expected uint8"):
            pipeline.label(rgb[0], [None, None])
        with pytest.raises(BackendError, match="expected one of the engine's profiles"):
            pipeline.label(np.zeros((1, 200, 200, 3), np.uint8), [None])
    with pytest.raises(BackendError, match="pipeline is closed"):
        pipeline.label(rgb, [("green",)])
    pipeline.close()


@pytest.mark.parametrize("library", VERSIONS)
def test_a_network_on_the_callers_stream(bundle: Bundle, tmp_path: Path, library: str) -> None:
    """Outputs go to given arrays of the right shape only; closing waits for the caller's stream, too."""
    image, expected = tinted("chelsea", 33, 47)[None], {}
    with OnnxRuntimeBackend(bundle.read_file("cam.onnx"), contract=CAM) as host:
        expected = host.run(image)
    gpu = PrimaryContext()
    there = calls.DeviceArray(gpu, image.shape, np.uint8)
    gpu.upload(there.pointer, image)
    cache = engine_cache(bundle, tmp_path / "cache", library)
    backend = open_tensorrt(bundle, CAM, TensorRTOptions(library=library, engine_cache=cache))
    with gpu.active():
        stream = gpu.driver.create_stream()
    first = backend.queue(there.pointer, image.shape, stream, {})
    wrong = calls.DeviceArray(gpu, (1, 3))
    given = {"cam": first["cam"], "scores": wrong}
    second = backend.queue(there.pointer, image.shape, stream, given)
    assert second["cam"] is first["cam"] and second["scores"] is not wrong
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.queue(there.pointer, image.shape, stream, {})
    for name, array in expected.items():
        np.testing.assert_array_equal(second[name].numpy(), array)  # waits for the default stream alone
    with gpu.active():
        gpu.driver.destroy_stream(stream)


def test_streams_and_events_are_given_back(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    for what in ("stream", "event"):
        create, destroy = getattr(Driver, f"create_{what}"), getattr(Driver, f"destroy_{what}")
        monkeypatch.setattr(
            Driver, f"create_{what}", lambda self, create=create: (made := create(self), alive.append(made))[0]
        )
        monkeypatch.setattr(
            Driver,
            f"destroy_{what}",
            lambda self, handle, destroy=destroy: (alive.remove(handle), destroy(self, handle))[1],
        )
    with pipeline_of(bundle, tmp_path) as pipeline:
        pipeline.label(tinted("chelsea", 32, 48)[None], [None])
        assert len(alive) >= 3 + 2 * 2
    assert len(alive) <= 1  # the stream of recordings belongs to the device, which may live on


def test_where_there_is_no_pipeline(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = engine_cache(bundle, tmp_path / "cache", "tensorrt")
    with (
        OnnxRuntimeBackend(bundle.read_file("cam.onnx"), contract=CAM) as host,
        open_tensorrt(bundle, CAM, TensorRTOptions(engine_cache=cache)) as cam,
        open_tensorrt(bundle, AFFINITY, TensorRTOptions(engine_cache=cache)) as affinity,
    ):
        assert open_gpu_pipeline(host, affinity, bundle.manifest) is None
        assert capsys.readouterr().err == ""

        def refuse() -> None:
            raise DeviceUnavailableError("kernels.fatbin: not found")

        with monkeypatch.context() as patch:
            patch.setattr(gpu_pipeline.calls, "default_device", refuse)
            assert open_gpu_pipeline(cam, affinity, bundle.manifest) is None
        assert "are made on the CPU: kernels.fatbin: not found" in capsys.readouterr().err
        device = use_kernels_in(tmp_path, monkeypatch)
        pipeline = open_gpu_pipeline(cam, affinity, bundle.manifest)
        assert pipeline is not None and pipeline._device is device
        pipeline.close()
