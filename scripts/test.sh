#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
# Much of the time is waiting for servers; each process starts its own, so it gets groups of files (tests/conftest.py).
exec .venv/bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@"
