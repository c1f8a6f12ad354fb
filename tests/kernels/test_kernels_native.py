"""The compiled kernels on every instruction set, in threads, under sanitizers, and for another processor."""

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from crf_checks import scene as crf_scene

from multisa.kernels import (
    affinity_from_boundary,
    affinity_from_features,
    dense_crf,
    random_walk,
    random_walk_reference,
)
from multisa.kernels.cpu import native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "csrc" / "cpu"
SELF_CHECK = Path(__file__).with_name("native") / "self_check.cpp"

Float32 = npt.NDArray[np.float32]


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor in turn."""
    before = native.instruction_set()
    native.choose_instruction_set(request.param)
    yield request.param
    native.choose_instruction_set(before)


def scene(channels: int, height: int, width: int) -> tuple[Float32, Float32]:
    rng = np.random.default_rng(3)
    boundary = rng.random((height, width), dtype=np.float32) ** 4
    return rng.random((channels, height, width), dtype=np.float32), affinity_from_boundary(boundary)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (37, 29)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 9])
def test_walk_on_each_instruction_set(instruction_set: str, size: tuple[int, int], channels: int) -> None:
    scores, affinity = scene(channels, *size)
    reference = random_walk_reference(scores, affinity)
    for exact in (False, True):
        assert np.abs(random_walk(scores, affinity, exact=exact) - reference).max() < 5e-5


def test_crf_on_each_instruction_set(instruction_set: str) -> None:
    native_sets = native.instruction_sets()
    for labels in (1, 3, 6, 12, 20, 30, 40):
        image, probabilities = crf_scene(labels, 24, 31)
        refined = dense_crf(image, probabilities)
        native.choose_instruction_set(native_sets[-1])
        np.testing.assert_allclose(refined, dense_crf(image, probabilities), atol=1e-4)
        native.choose_instruction_set(instruction_set)


def test_features_on_each_instruction_set(instruction_set: str) -> None:
    features = np.random.default_rng(5).normal(size=(6, 21, 33)).astype(np.float32)
    affinity = affinity_from_features(features)
    expected = np.exp(-np.abs(features[:, :, :-3] - features[:, :, 3:]).mean(axis=0))
    np.testing.assert_allclose(affinity[2, :, :-3], expected, atol=1e-6)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="got 'mmx', expected one of this processor's"):
        native.choose_instruction_set("mmx")


def test_threads_side_by_side_answer_alike() -> None:
    inputs = [scene(3, 20 + i, 31) for i in range(8)]
    alone = [random_walk(*arguments) for arguments in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arguments: random_walk(*arguments), inputs * 3))
    for index, walked in enumerate(together):
        np.testing.assert_array_equal(walked, alone[index % len(alone)])


def compile_self_check(compiler: str, folder: Path, *flags: str) -> Path:
    """Compile the kernels and the program that checks them; returns the program."""
    sources = [path for path in sorted(SOURCES.glob("*.cpp")) if path.name != "module.cpp"]
    program = folder / "self_check"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread", *flags]
    subprocess.run(
        [*command, f"-I{SOURCES}", *map(str, [*sources, SELF_CHECK]), "-o", str(program)],
        check=True,
        capture_output=True,
    )
    return program


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    program = compile_self_check(compiler, tmp_path, "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "portable" in result.stdout


@pytest.mark.slow
def test_aarch64(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None:
        pytest.skip("no cross compiler (apt-get install g++-aarch64-linux-gnu)")
    program = compile_self_check(compiler, tmp_path, "-static")
    if emulator is None:
        pytest.skip("it compiles; no emulator to run it (apt-get install qemu-user)")
    result = subprocess.run([emulator, program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
