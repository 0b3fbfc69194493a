#!/usr/bin/env bash
# Find the layers of each teacher that carry its capability. Takes the options of `nexus profile`, spelt with _ or with -:
#
#   jobs/run_profiling.sh --batch_size 8 --max_samples 128 --config run.yaml --cluster auto
#
# PYTHON names the interpreter; otherwise it is the one of .venv, or the first python3 on the PATH.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    python="$root/.venv/bin/python"
    [[ -x "$python" ]] || python=python3
fi

options=()
for argument in "$@"; do
    if [[ "$argument" == --*_* ]]; then
        # The name alone: a value behind = keeps its letters.
        name="${argument%%=*}"
        argument="${name//_/-}${argument#"$name"}"
    fi
    options+=("$argument")
done
exec "$python" "$root/jobs/profile_towers.py" ${options[@]+"${options[@]}"}
