#!/usr/bin/env bash
# Everything that only a GPU can tell, on any Linux machine that has one, in one command:
#     bash benchmarks/gpu.sh [--data VOC_LAYOUT] [--bundle BUNDLE] [--output DIR] [--quick] [--skip-tests]
# --plan prints the steps, --help the other options. Needs Python 3.11 or newer with venv, and g++; PYTHON says
# which Python. Everything is installed into .venv-gpu. The same command goes on where it stopped.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ -n "${PYTHON:-}" ]; then
    pythons=("$PYTHON") # no other than the one that is asked for
else
    pythons=(python3 python3.14 python3.13 python3.12 python3.11)
fi
for python in "${pythons[@]}"; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        # -P: the folder of the script is not a place to import from.
        exec "$python" -P "$root/benchmarks/gpu/start.py" main "$@"
    fi
done
echo "error: got no Python 3.11 or newer, looked for ${pythons[*]}: install one, or name it: PYTHON=/its/path" >&2
exit 1
