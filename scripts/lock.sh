#!/usr/bin/env bash
# Resolves pyproject.toml for every supported Python at once and rewrites constraints.txt. Versions already in the file are
# kept while they still fit; delete a line to renew it, or the whole list to renew everything.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || {
    echo "lock: expected the program uv on the PATH, found none. Install it: python3 -m pip install uv" >&2
    exit 2
}

# pip and setuptools come with the interpreter; torch pins its CUDA packages and Triton exactly.
left_out=(pip setuptools triton cuda-bindings cuda-pathfinder cuda-toolkit)
for name in cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 \
    nccl-cu13 nvjitlink nvshmem-cu13 nvtx; do
    left_out+=("nvidia-$name")
done

header=$(grep '^#' constraints.txt)
resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
cp constraints.txt "$resolved"
uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-annotate --no-header \
    "${left_out[@]/#/--no-emit-package=}" --output-file "$resolved" pyproject.toml >/dev/null
{
    echo "$header"
    cat "$resolved"
} >constraints.txt
for python in 3.10 3.11 3.12 3.13; do
    uv pip compile --quiet --python-version "$python" --extra dev --only-binary :all: -c constraints.txt pyproject.toml >/dev/null
    echo "lock: resolves with wheels alone on Python $python"
done
