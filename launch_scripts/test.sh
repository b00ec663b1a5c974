#!/usr/bin/env bash
# Runs lint, format check and tests in their own environment. PYTHON=python3.12 selects the newer stack;
# PYTHON=by-commit takes 3.11, or 3.12 where there is one, by the commit's hash: CI has time for one, and sees both.
# Arguments are passed to pytest: `bash launch_scripts/test.sh tests/growth`; `--long` adds similar layouts.
# Runs two tests at a time (or $WORKERS): one uses the cores while the other waits.
set -euo pipefail
if [ "${PYTHON:-}" = by-commit ]; then
    PYTHON=python3.11
    case $(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse HEAD) in
    *[02468ace]) { python3.12 -c '' || pyenv prefix 3.12; } >/dev/null 2>&1 && PYTHON=python3.12 ;;
    esac
    echo "== the tests of this commit run on $PYTHON"
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
ruff check .
ruff format --check .
python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
