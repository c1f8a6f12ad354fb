"""Memory of trainings on the CPU."""

import platform
import subprocess
import sys

import pytest

REPEATED_ALLOCATIONS = """
import resource, torch
from multisa.training.inference import keep_freed_memory
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(16, 1024, 1024)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()  # the first allocations
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns freed memory that eagerly")
def test_kept_memory_is_not_paged_in_again() -> None:
    def faults(call: str) -> int:
        code = REPEATED_ALLOCATIONS.format(call=call)
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    assert faults("keep_freed_memory()") < 0.1 * faults("")
