#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
# Three processes, a file of tests at a time: much of the time is waiting for servers, and each process has its own.
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
