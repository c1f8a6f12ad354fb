"""GpuPipeline without a GPU: on a driver whose device is the CPU, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_tensorrt
from cpu_device import build
from fake_driver import cuda_headers, make_fake_driver

ON_CPU = Path(fake_tensorrt.__file__).parent


def test_on_the_cpu(tmp_path: Path) -> None:
    """Runs gpu_pipeline_on_cpu.py, every test of it."""
    driver = make_fake_driver(cuda_headers(), tmp_path, device=True)
    tests = Path(__file__).with_name("gpu_pipeline_on_cpu.py")
    path = os.pathsep.join([str(ON_CPU), os.environ.get("PYTHONPATH", "")])
    variables = {"LD_LIBRARY_PATH": str(driver.parent), "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | variables | {"CUDA_ON_CPU_KERNELS": str(build())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"^\d+ passed in ", result.stdout, re.MULTILINE), result.stdout[-2000:]
    assert result.stderr == ""  # pycuda reports there what could not be released
