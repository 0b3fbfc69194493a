#!/usr/bin/env bash
# Makes .venv and installs nexus with the versions of constraints.txt. An existing .venv is kept and brought up to date;
# FRESH=1 rebuilds it. PYTHON names the interpreter of a new one.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "setup: $*" >&2
    exit 2
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

python=${PYTHON:-python3}
if [[ -n ${FRESH:-} ]]; then
    rm -rf .venv
fi
if [[ ! -x .venv/bin/python ]]; then
    supported "$python" || fail "expected Python 3.10 to 3.13 as '$python', found $("$python" --version 2>/dev/null || echo 'no such program')." \
        "Install one and type: make setup PYTHON=python3.12"
    "$python" -m venv .venv || fail "expected '$python -m venv' to work. On Debian or Ubuntu install python3-venv."
fi
supported .venv/bin/python || fail "expected Python 3.10 to 3.13 in .venv, found $(.venv/bin/python --version 2>&1 || true)." \
    "Rebuild it: make setup FRESH=1"

install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
}

# `==` alone accepts any build of that version; `+cpu` and `===` name one of them.
torch_version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
installed=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
if [[ $installed != "$torch_version" && $installed != "$torch_version+"* ]]; then
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo "setup: NVIDIA GPU found, installing torch $torch_version with CUDA"
        install "torch===$torch_version" 2>/dev/null || install "torch==$torch_version"
    else
        echo "setup: no NVIDIA GPU found, installing the CPU build of torch $torch_version"
        install "torch==$torch_version+cpu" 2>/dev/null || {
            echo "setup: the configured package indexes have no CPU build; the default one (larger) will do as well"
            install "torch==$torch_version"
        }
    fi
fi
echo "setup: installing what pyproject.toml asks for, in the versions of constraints.txt (minutes the first time)"
install --editable ".[dev]"
.venv/bin/python - <<'PYTHON'
import platform
from importlib.metadata import version

print(f"setup: .venv is ready: nexus {version('nexus-distill')}, Python {platform.python_version()}, torch {version('torch')}")
PYTHON
