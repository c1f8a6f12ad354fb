#!/usr/bin/env bash
# Tests and measures everything that needs an NVIDIA GPU, on any Linux machine that has one:
#     bash benchmarks/gpu.sh [--data VOC_LAYOUT] [--bundle BUNDLE] [--output DIR] [--quick]
# --data VOC_LAYOUT   data set for `multisa bench` and for parity; without it, bench is skipped
# --bundle BUNDLE     bundle to test; default: the packaged one
# --output DIR        results folder; default: gpu-results
# --environment DIR   use this virtual environment as it is; default: install into .venv-gpu
# --quick             fewer sizes, images and repeats
# --skip-tests        leave out tests/gpu
# --tensorrt          also test TensorRT itself (installs tensorrt-cu13)
# --fresh             forget the steps that earlier runs finished
# Each step has a log in DIR/logs; a failing step does not stop the others. DIR gets summary.md and results.json.
# A step that succeeded is not repeated by the same command.
# Exit codes: 0 ok, 3 a gate failed (tests, parity, kernels), 5 no usable GPU, 1 another step failed.
set -uo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
data='' bundle="$root/runtime/bundles/voc-animals" output=gpu-results environment='' tests=yes tensorrt=no fresh=no
quick=()

usage() { sed -n '2,/^set/s/^# //p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case $1 in
        --data | --bundle | --output | --environment)
            [ $# -ge 2 ] || { echo "error: $1: expected a value" >&2; exit 1; }
            printf -v "${1#--}" %s "$(realpath -m -- "$2")" && shift ;;
        --quick) quick=(--quick) ;;
        --skip-tests) tests=no ;;
        --tensorrt) tensorrt=yes ;;
        --fresh) fresh=yes ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: got the option $1" >&2; usage >&2; exit 1 ;;
    esac
    shift
done
[ -f "$bundle/bundle.json" ] || { echo "error: $bundle: got no bundle.json, expected a bundle" >&2; exit 1; }
[ -z "$data" ] || [ -d "$data/JPEGImages" ] || { echo "error: $data: got no JPEGImages, expected a VOC layout" >&2; exit 1; }
output=$(realpath -m -- "$output")
venv=${environment:-$root/.venv-gpu}
python=$venv/bin/python
made=$output/work/bundle
images=${data:-$root/runtime/demo_images}
count=$([ ${#quick[@]} -gt 0 ] && echo 16 || echo 128)
# Besides the environment's programs, nvcc: of the system, or of NVIDIA's wheels.
path_with_nvcc() {
    local wheel
    wheel=$(compgen -G "$venv/lib/python*/site-packages/nvidia/cu*/bin" | head -n 1)
    echo "$venv/bin:${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin${wheel:+:$wheel}"
}
mkdir -p "$output/logs" "$output/done" "$output/work" || exit 1
[ $fresh = no ] || rm -rf "${output:?}"/done/* "$output"/logs/* "$output"/work/* "$output"/*.json "$output/bench"
: > "$output/steps.tsv"
export PATH MULTISA_CUDA=0 # kernels are compiled in their own step
unset PYTHONPATH PYTHONHOME
cd "$root" || exit 1

note() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >> "$output/steps.tsv"; }

# step NAME COMMAND...: run it with a log, unless it succeeded before. Returns the command's exit code.
step() {
    local name=$1 code=0 start=$SECONDS log
    shift
    log=$output/logs/$name.log
    if [ -e "$output/done/$name" ]; then
        note "$name" 0 0 "done before" && echo "$name: done before"
        return
    fi
    PATH=$(path_with_nvcc) "$@" > "$log" 2>&1 || code=$?
    [ $code -ne 0 ] || touch "$output/done/$name"
    note "$name" $code $((SECONDS - start)) "$([ $code -eq 0 ] || grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c 1-300)"
    echo "$name: exit code $code ($((SECONDS - start)) s)"
    return $code
}

skip() { note "$1" skipped 0 "$2" && echo "$1: skipped: $2"; }

finish() {
    [ -x "$python" ] || exit "${1:-1}" # not even an environment
    PATH=$(path_with_nvcc) "$python" -P -m multisa.benchmarks.gpu_report summary "$output" --exit-code "${1:-}"
    exit
}

pip() { "$python" -m pip install --quiet "$@"; }

install_environment() (
    set -e
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && break
    done
    "$candidate" -m venv "$venv"
    pip --constraint constraints.txt torch
    command -v nvcc > /dev/null || pip nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-profiler-api
    PATH=$(path_with_nvcc) tests/cuda_on_cpu/install_pycuda.sh "$python" # no wheel; needs no driver to build
    pip --constraint constraints.txt --editable '.[bench,gpu]' pytest
    if [ "$(uname -m)" = x86_64 ]; then # for others there are no wheels
        pip --constraint constraints.txt --editable '.[rtx]'
        # onnxruntime and onnxruntime-gpu are one module: with both removed, what is installed is complete.
        "$python" -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
        pip 'onnxruntime-gpu[cuda,cudnn]'
    fi
    "$python" -m pip list
)

# A copy of the bundle with fp16 graphs; where they are refused (exit code 3), a copy without them.
make_bundle() {
    rm -rf "$made"
    if grep -q '"segmenter.fp16.onnx"' "$bundle/bundle.json"; then
        cp -r "$bundle" "$made"
        return
    fi
    multisa convert "$bundle" --precision fp16 --images "$images" --num-images "$count" \
        --report "$output/fp16.json" -o "$made" && return
    local code=$?
    rm -rf "$made"
    cp -r "$bundle" "$made"
    return $code
}

if [ -z "$environment" ]; then
    step install install_environment || finish 1
    [ $tensorrt = no ] || step install-tensorrt pip tensorrt-cu13
fi
step kernels "$python" -m multisa.kernels.cuda.build || finish 1
rm -f "$output/done/driver" # cheap, and the answer may change
step driver "$python" -m multisa.benchmarks.gpu_report driver --output "$output/driver.json" || finish $?
step doctor sh -c "multisa doctor --json > '$output/doctor.json'"
[ $tests = yes ] || skip tests --skip-tests
[ $tests = no ] || step tests "$python" -m multisa.benchmarks.gpu_report tests --output "$output/tests.json" -m gpu tests/gpu
step kernel-times "$python" -m multisa.benchmarks.gpu_kernels --output "$output/kernels.json" "${quick[@]}"
[ -e "$output/done/bundle" ] || rm -rf "$output"/done/{engines,parity,bench}*
step bundle make_bundle
target=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["target"])' "$output/driver.json")
for precision in fp32 fp16; do
    graph=segmenter$([ $precision = fp32 ] || echo .$precision).onnx
    for backend in onnxruntime-cuda tensorrt-rtx tensorrt; do
        why=$("$python" -m multisa.benchmarks.gpu_report why-not "$output/driver.json" $backend)
        [ -e "$made/$graph" ] || why="the bundle has no $precision graphs"
        [ $backend != tensorrt ] || [ $tensorrt = yes ] || why="not asked for (--tensorrt)"
        if [ -n "$why" ]; then skip "parity-$backend-$precision" "$why"; continue; fi
        if [ $backend != onnxruntime-cuda ]; then
            step "engines-$backend-$precision" multisa build "$made" --target "$target" --precision $precision \
                --library $backend --report "$output/engines-$backend-$precision.json"
        fi
        step "parity-$backend-$precision" multisa parity "$made" --backend $backend --precision $precision \
            --images "$images" --num-images "$count" --report "$output/parity-$backend-$precision.json"
    done
done
[ -n "$data" ] || skip bench "no --data"
[ -z "$data" ] || step bench multisa bench --bundle "$made" --data "$data" -o "$output/bench" "${quick[@]}"
finish
