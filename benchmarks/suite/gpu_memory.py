"""The GPU's memory that a process holds, asked of the driver's own tool."""

import os
import shutil
import subprocess

_SECONDS = 10


def gpu_mib_of_this_process() -> float | None:
    """MiB on all GPUs; None where nvidia-smi is not there, or does not know the process (in a container)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(",") for line in answer.splitlines() if line.count(",") == 1]
    used = [float(memory) for pid, memory in rows if pid.strip() == str(os.getpid()) and _is_number(memory)]
    return sum(used) if used else None


def _is_number(text: str) -> bool:
    return text.strip().isdigit()
