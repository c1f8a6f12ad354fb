#!/usr/bin/env bash
# Installs pycuda, which has no wheel, from a CUDA toolkit and without a driver: it links against a libcuda
# that answers "no device" to everything.
#     tests/cuda_on_cpu/install_pycuda.sh .venv/bin/python
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")"
# Through a link or a wrapper, nvcc itself knows where its toolkit is.
toolkit=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" fake_driver.py "$toolkit/include" "$work/driver"
cat > "$work/.aksetup-defaults.py" <<DEFAULTS
CUDA_ROOT = '$toolkit'
CUDA_ENABLE_CURAND = False
CUDADRV_LIB_DIR = ['$work/driver']
DEFAULTS
HOME=$work "$python" -m pip install --quiet --no-cache-dir "pycuda>=2025.1"
