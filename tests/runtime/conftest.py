"""A tiny real bundle: three ONNX graphs built by hand, so that the true runtime runs without a trained one.

Class 1 is "red thing", class 2 "green". cam.onnx gives the red and green channels, segmenter.onnx thresholds
the brightest brightness of each 4x4 block (< 85 background, < 170 class 1, else class 2).
"""

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from multisa.kernels import CrfParameters
from multisa.runtime.backends import registry
from multisa.runtime.backends.gpus import Gpu, GpuProbe
from multisa.runtime.bundle import (
    Bundle,
    BundleParameters,
    LabelParameters,
    Manifest,
    SegmenterLabelParameters,
    write_bundle,
)
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.predict.prediction import ClassProbabilities
from multisa.runtime.writers.base import LabelledImage, WriterContext
from multisa.runtime.writers.registry import open_writers

TESTS = Path(__file__).resolve().parents[1]
# For tests on a GPU that is simulated on the CPU; for runs on several processes; for job_runs.py.
sys.path[:0] = [str(TESTS / "cuda_on_cpu"), str(TESTS / "executors"), str(TESTS / "runtime")]

from executor_runs import results, segment, write_corpus  # noqa: E402
from job_runs import write_noise  # noqa: E402

CLASSES = ("background", "red thing", "green")
OFFSETS = 34
STEEPNESS = np.float32(0.02)  # of the segmenter's probabilities, per grey level


@pytest.fixture(scope="session")
def graphs() -> dict[str, bytes]:
    return {"cam.onnx": _cam_graph(), "affinity.onnx": _affinity_graph(), "segmenter.onnx": _segmenter_graph()}


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    label = LabelParameters(walk_steps=16, crf=CrfParameters(iterations=2))
    return Manifest(
        schema_version=2,
        name="tiny",
        classes=CLASSES,
        palette=((0, 0, 0), (200, 40, 40), (40, 200, 40)),
        ignore_index=255,
        parameters=BundleParameters(
            long_side=80,
            cam_scales=(1.0,),
            walk_stride=4,
            label_method="walk",
            label=label,
            segmenter_label=SegmenterLabelParameters(crf=CrfParameters(iterations=2)),
            min_area=0.0,
            score_thresholds={"red thing": 0.3, "green": 0.3},
        ),
        preprocessing=("scale to 0..1",),
        metrics={"miou": 0.5},
        provenance={"made by": "the tests"},
        files={},
    )


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]) -> Bundle:
    return write_bundle(tmp_path / "tiny-bundle", manifest, graphs)


@pytest.fixture
def bundle_of_precisions(tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]) -> Bundle:
    """The tiny bundle with cam in fp16, too, and a segmenter in int8 that calls nothing background."""
    more = {"cam.fp16.onnx": graphs["cam.onnx"], "segmenter.int8.onnx": _segmenter_graph(low=-1)}
    return write_bundle(tmp_path / "precise-bundle", manifest, graphs | more)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lists one GPU, as far as selecting a backend asks."""
    probe = GpuProbe("13.2", (Gpu("NVIDIA Test", "sm89"),))
    monkeypatch.setattr(registry, "probe_gpus", lambda: probe)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an NVIDIA driver."""
    probe = GpuProbe(problem="no NVIDIA driver here", is_absent=True)
    monkeypatch.setattr(registry, "probe_gpus", lambda: probe)


@pytest.fixture
def cuda_on_cpu(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime whose CUDA provider is its CPU provider under another name."""
    real = onnxruntime.InferenceSession

    class Session(real):  # type: ignore[misc, valid-type]
        def __init__(
            self, data: bytes, options: object, *, providers: list[tuple[str, dict]], enable_fallback: int
        ) -> None:
            assert not enable_fallback
            self.asked = [name for name, _ in providers]
            super().__init__(data, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [*self.asked, "CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five good images in two folders, one of them turned by EXIF, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.jpg", "b.png", "deep/c.jpg", "deep/d.png")):
        Image.fromarray(scene(40 + 8 * i, 90 - 6 * i)).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scene(48, 72)).save(folder / "turned.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"this is no image")
    return folder


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Thirty images of noise in three sizes, three of them broken."""
    return write_noise(tmp_path / "many", 30)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that runs on several processes or machines are compared on."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "photos")


@pytest.fixture
def alone(corpus: Path, bundle: Bundle, tmp_path: Path) -> dict[str, bytes]:
    """What one process writes."""
    segment(corpus, tmp_path / "alone", bundle, LocalExecutor)
    return results(tmp_path / "alone")


def scene(height: int, width: int) -> np.ndarray:
    """A red square and a green one on dark noise, uint8 [height, width, 3]."""
    rgb = np.random.default_rng(height * width).integers(0, 40, (height, width, 3), dtype=np.uint8)
    rgb[4 : height // 2, 4 : width // 3] = (255, 60, 30)
    rgb[height // 3 :, width // 2 :] = (170, 250, 160)
    return rgb


def _model(nodes: list[onnx.NodeProto], outputs: list[tuple[str, int, list[str]]], constants: dict) -> bytes:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _pooled() -> list[onnx.NodeProto]:
    """Channels first, 0..1, the maximum of each 4x4 block: ceil(H / 4) x ceil(W / 4)."""
    return [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["chw", "white"], ["unit"]),
        helper.make_node("MaxPool", ["unit"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4], ceil_mode=1),
    ]


def _cam_graph() -> bytes:
    nodes = [
        *_pooled(),
        helper.make_node("Slice", ["pooled", "zero", "two", "one"], ["maps"]),
        helper.make_node("ReduceMax", ["maps", "space"], ["peak"], keepdims=1),
        helper.make_node("Div", ["maps", "peak"], ["cam"]),
        helper.make_node("ReduceMean", ["maps", "space"], ["scores"], keepdims=0),
    ]
    constants = {
        "white": np.float32(255),
        "zero": np.array([0]),
        "two": np.array([2]),
        "one": np.array([1]),
        "space": np.array([2, 3]),
    }
    outputs = [("cam", TensorProto.FLOAT, ["N", 2, "h", "w"]), ("scores", TensorProto.FLOAT, ["N", 2])]
    return _model(nodes, outputs, constants)


def _affinity_graph(offsets: int = OFFSETS) -> bytes:
    nodes = [*_pooled(), helper.make_node("Conv", ["pooled", "weight", "bias"], ["affinity"])]
    constants = {
        "white": np.float32(255),
        "weight": np.zeros((offsets, 3, 1, 1), np.float32),
        "bias": np.full(offsets, 0.4, np.float32),
    }
    return _model(nodes, [("affinity", TensorProto.FLOAT, ["N", offsets, "h", "w"])], constants)


def _segmenter_graph(low: float = 85) -> bytes:
    """Logits 0, x - low, 2 x - low - high for the brightness x, all times STEEPNESS."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("ReduceMean", ["chw", "channels"], ["brightness"], keepdims=1),
        helper.make_node("MaxPool", ["brightness"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4], ceil_mode=1),
        helper.make_node("Conv", ["pooled", "weight", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    weight = np.array([0, 1, 2], np.float32).reshape(3, 1, 1, 1)
    constants = {
        "channels": np.array([1]),
        "weight": STEEPNESS * weight,
        "bias": STEEPNESS * np.array([0, -low, -low - 170], np.float32),
    }
    return _model(nodes, [("probabilities", TensorProto.FLOAT, ["N", 3, "h", "w"])], constants)


@dataclass
class WriterFolder:
    """A run's folder as writers see it: files below OUT, parts in memory. `shard` is being written."""

    out: Path
    kept: dict[str, dict[int, bytes]] = field(default_factory=dict)
    shard: int = 0

    def write(self, relative: str, data: bytes | Iterable[bytes]) -> None:
        path = self.out / relative
        assert not path.exists() or not isinstance(data, bytes), f"{relative}: written twice"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else b"".join(data))

    def write_part(self, writer: str, data: bytes) -> None:
        self.kept.setdefault(writer, {})[self.shard] = data

    def parts(self, writer: str) -> Iterator[bytes]:
        return iter([data for _, data in sorted(self.kept[writer].items())])


@pytest.fixture
def writer_context(tmp_path: Path, manifest: Manifest) -> WriterContext:
    return WriterContext(tmp_path / "out", "label", manifest, "ab" * 32)


@pytest.fixture
def labelled(manifest: Manifest) -> Callable[..., LabelledImage]:
    """Makes one finished image from its name and its mask."""

    def make(
        name: str, mask: np.ndarray, index: int = 0, probabilities: ClassProbabilities | None = None
    ) -> LabelledImage:
        classes, counts = manifest.classes, np.bincount(mask.ravel(), minlength=256)
        if probabilities is None:
            probabilities = ClassProbabilities((0,), np.ones((1, *mask.shape), np.float32))
        shares = {classes[i]: round(int(counts[i]) / mask.size, 4) for i in range(3) if counts[i]}
        record = {
            "image": f"{name}.jpg",
            "mask": f"masks/{name}.png",
            "index": index,
            "orientation": 1,
            "width": mask.shape[1],
            "height": mask.shape[0],
            "confidence": 0.75,
            "pixel_shares": shares,
            "classes": [classes[i] for i in (1, 2) if counts[i]],
            "scores": {"green": 0.5},
        }
        confidence = np.full(mask.shape, 191, np.uint8)
        picture = Image.fromarray(np.ascontiguousarray(mask))
        picture.putpalette(manifest.mask_palette().tobytes())
        png = io.BytesIO()
        picture.save(png, "PNG")
        return LabelledImage(index, f"{name}.jpg", name, mask, png.getvalue(), confidence, record, probabilities)

    return make


@pytest.fixture
def write_all(writer_context: WriterContext) -> Callable[..., Path]:
    """Runs writers over shards of two images; returns OUT."""

    def write(names: Sequence[str], images: Sequence[LabelledImage], out: Path | None = None) -> Path:
        out = out or writer_context.out
        for writer in open_writers(names, replace(writer_context, out=out)):
            folder = WriterFolder(out)
            payloads = [writer.encode(image) for image in images]
            shards = [payloads[start : start + 2] for start in range(0, len(payloads), 2)]
            for folder.shard, shard in enumerate(shards):
                writer.write_shard(folder, folder.shard, shard)
            writer.finalize(folder, len(shards))
        return out

    return write


@pytest.fixture
def blocks() -> Callable[..., np.ndarray]:
    """Makes a mask of 5 x 5 blocks of the given ids, uint8 [height, width], each id at least once."""

    def make(height: int, width: int, ids: Sequence[int] = (0, 1, 2), seed: int = 0) -> np.ndarray:
        small = np.random.default_rng(seed).choice(ids, (height // 5 + 1, width // 5 + 1))
        small.flat[: len(ids)] = ids
        return np.kron(small, np.ones((5, 5), np.int64))[:height, :width].astype(np.uint8)

    return make
