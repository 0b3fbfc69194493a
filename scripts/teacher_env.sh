#!/usr/bin/env bash
# Makes the environment of one vendor's package: scripts/teacher_env.sh NAME, with NAME a file of scripts/environments.
# It lies in .teacher-envs/NAME, or in NEXUS_TEACHER_ENVS/NAME, and holds the Python and Ray of .venv, so that an actor can run in it.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "teacher-env: $*" >&2
    exit 2
}

name=${1:-}
requirements=scripts/environments/$name.txt
vendor=scripts/environments/$name.no-deps.txt
known=$(cd scripts/environments && ls ./*.no-deps.txt | sed 's|^\./||; s|\.no-deps\.txt$||' | tr '\n' ' ')
[[ -n $name && -f $vendor ]] || fail "expected NAME to be one of: ${known}(found '${name}'). Type: make teacher-env NAME=${known%% *}"
folder=${NEXUS_TEACHER_ENVS:-.teacher-envs}/$name
python=${PYTHON:-.venv/bin/python}
"$python" -c '' 2>/dev/null || fail "expected Python as '$python', found no such program. Type: make setup"

if [[ ! -x $folder/bin/python ]]; then
    "$python" -m venv "$folder"
fi
install() {
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
echo "teacher-env: installing $name into $folder (about 2 GiB, minutes)"
torch_version=$(sed -n 's/^torch==//p' "$requirements")
if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    install "torch==$torch_version"
else
    install "torch==$torch_version+cpu" 2>/dev/null || install "torch==$torch_version"
fi
install setuptools wheel
install -r "$requirements"
# Their own pins exclude one another (protobuf) or name demos' packages that nothing here imports (gradio).
install --no-deps --no-build-isolation -r "$vendor"
# The compiled half of torchaudio fits one build of torch only; the packages use its Python half.
"$folder/bin/python" -c 'import torchaudio' 2>/dev/null ||
    find "$folder" -path '*/torchaudio/lib/*.so' -delete
"$folder/bin/python" -c "import ${name//-/_}" || fail "expected $name to be importable in $folder, found the error above."
echo "teacher-env: $folder is ready; type: nexus teachers check --tiny"
