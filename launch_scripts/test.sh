#!/usr/bin/env bash
# Runs lint, format check and tests in their own environment. PYTHON=python3.12 selects the newer stack.
# Arguments are passed to pytest: `bash launch_scripts/test.sh tests/growth`; `--long` adds similar layouts.
# Runs two tests at a time (or $WORKERS): one uses the cores while the other waits.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
ruff check .
ruff format --check .
python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
