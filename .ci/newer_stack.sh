#!/usr/bin/env bash
# The tests that differ between the stacks, on Python 3.12 with Megatron-core 0.19.2, as it is installed on GPUs.
# Torch's only wheel for 3.12 is a CUDA build: with CUDA's runtime it runs without the 4 GB of other libraries, which no
# test calls (empty_libraries.py). The other packages are those of .venv, the environment of launch_scripts/test.sh.
# Measured on two cores beside twenty times their work, 2026-12-01: the environment 542 s (75 s of CPU), 26 tests 777 s.
# .ci/run does not call it yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/.venv312
if [ ! -e "$venv/.complete" ]; then
    # pyenv's command runs a version only if it is named.
    version=$(pyenv versions --bare 2>/dev/null | grep '^3\.12' | tail -1 || true)
    PYENV_VERSION=$version "${PYTHON312:-python3.12}" -m venv "$venv"
    list=$(mktemp)
    .venv/bin/python -m pip freeze --exclude-editable | grep -v -i -E '^(torch|megatron[-_]core)==' > "$list"
    grep -E '^torch==' requirements.txt >> "$list"
    sed -n 's/^\(megatron-core==[^ ]*\) *; *python_version >=.*/\1/p' requirements.txt >> "$list"
    install() { "$venv/bin/python" -m pip install --quiet --no-deps --no-compile "$@"; }
    install setuptools wheel
    install --no-build-isolation -r "$list"
    install 'nvidia-cuda-runtime~=13.0.0'
    # Megatron-core imports it where torch is a CUDA build.
    install "$("$venv/bin/python" -c 'from importlib.metadata import requires
print(next(line.split(";")[0] for line in requires("torch") if line.startswith("triton")))')"
    install --no-build-isolation -e .
    rm "$list"
    "$venv/bin/python" .ci/empty_libraries.py "$venv/lib/python3.12/site-packages/torch/lib"
    touch "$venv/.complete"
fi
echo "== environment of Python 3.12: $SECONDS s"
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu
# ZeRO 3 with recomputed layers at TP 2; a fit, a growth and a pretraining; the records of checkpoints.
python -m pytest -n "${WORKERS:-2}" --dist worksteal -k "recompute and zero and 3 or not pretrained" \
    tests/models/full/test_pretrained.py tests/training/test_journey.py tests/checkpoint/test_verify.py "$@"
echo "== Python 3.12 in all: $SECONDS s"
