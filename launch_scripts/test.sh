#!/usr/bin/env bash
# Lint, format and tests, in an environment of its own. PYTHON=python3.12 chooses the newer stack.
# Arguments go to pytest: `bash launch_scripts/test.sh tests/growth`; `--long` adds layouts that differ by little.
# Two tests at a time (or $WORKERS): what one waits for, the other uses.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
ruff check .
ruff format --check .
python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
