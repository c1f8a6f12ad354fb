"""What nvcc makes of the CUDA kernels: code for every architecture, no spills, few registers; none is run."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_code import compiled, kernel_names

from multisa.kernels.cuda import build
from multisa.kernels.cuda.build import ARCHITECTURES, BuildError, build_fatbin, find_nvcc

pytestmark = pytest.mark.slow

# Registers a thread, over all architectures. 65,536 of them serve a multiprocessor: 128 registers leave
# 512 threads at work, 64 leave 1,024, 40 all 1,536.
BUDGET = {
    "walk_step_1": 72,
    "walk_step_2": 80,
    "walk_step_3": 104,
    "walk_step_4": 128,
    "affinity_features": 72,
    "affinity_features_any": 64,
    "affinity_boundary": 64,
    "crf_update_16": 72,
    "crf_update_24": 72,
    "crf_update_32": 72,
}
SMALL = 64  # every other kernel
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def test_no_spills_and_few_registers(nvcc: Path) -> None:
    kernels = kernel_names()
    assert set(BUDGET) <= kernels
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = list(pool.map(lambda architecture: compiled(nvcc, architecture).log, ARCHITECTURES))
    problems, seen = [], set()
    for name, architecture, stack, stores, loads, registers in ENTRY.findall("".join(logs)):
        seen.add((name, int(architecture)))
        if (stack, stores, loads) != ("0", "0", "0"):
            problems.append(f"{name} sm_{architecture}: {stack} bytes of stack, {stores} + {loads} bytes spilled")
        if int(registers) > BUDGET.get(name, SMALL):
            problems.append(f"{name} sm_{architecture}: {registers} registers")
    assert seen == {(name, architecture) for name in kernels for architecture in ARCHITECTURES}
    assert not problems, "\n".join(problems)


def test_the_fat_binary_and_its_record(nvcc: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "kernels.cu").write_text('extern "C" __global__ void nothing() {}\n')
    target = tmp_path / "new" / "kernels.fatbin"
    record = build_fatbin(nvcc, target, sources=folder)
    code = target.read_bytes()
    assert code.startswith(0xBA55ED50.to_bytes(4, "little"))
    assert json.loads(target.with_suffix(".json").read_text()) == {
        "nvcc": record.nvcc,
        "sources": build.source_digest(folder),
        "architectures": list(ARCHITECTURES),
        "ptx": [75, 120],
    }
    assert {path.name for path in target.parent.iterdir()} == {"kernels.fatbin", "kernels.json"}


def test_a_failed_build_leaves_the_old_one(nvcc: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels.cu").write_text("this is not CUDA\n")
    target = tmp_path / "kernels.fatbin"
    target.write_bytes(b"old")
    with pytest.raises(BuildError, match=r"failed:\n.*error"):
        build_fatbin(nvcc, target, sources=tmp_path, architectures=(90,), ptx=())
    assert target.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.cu", "kernels.fatbin"}


def test_without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(build, "TOOLKIT", tmp_path / "toolkit")
    with pytest.raises(BuildError, match=r"install CUDA 12\.8"):
        find_nvcc()
    assert build.main([]) == 1
    assert "set CUDA_HOME" in capsys.readouterr().err
    assert build.main(["--nvcc", str(tmp_path / "nvcc"), "--output", str(tmp_path / "out")]) == 1
    assert "cannot be run" in capsys.readouterr().err
    packaged = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    packaged.parent.mkdir(parents=True)
    packaged.touch()
    assert find_nvcc() == packaged
    installed = tmp_path / "toolkit" / "bin" / "nvcc"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert find_nvcc() == installed


def test_without_sources(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="compile the kernels in a checkout"):
        build_fatbin(tmp_path / "nvcc", tmp_path / "kernels.fatbin", sources=tmp_path)


def test_the_digest_changes_with_the_sources(tmp_path: Path) -> None:
    (tmp_path / "kernels.cu").write_text("one")
    first = build.source_digest(tmp_path)
    (tmp_path / "more.cuh").write_text("two")
    assert build.source_digest(tmp_path) != first
