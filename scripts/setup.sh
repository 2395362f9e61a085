#!/usr/bin/env bash
# Makes .venv from requirements.lock. Quick when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What the environment was made from; when any of it changes, it is made again.
stamp=$(cat requirements.lock scripts/tools.lock pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
[[ -f .venv/.made-from && $(<.venv/.made-from) == "$stamp" ]] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
    echo "setup: $python is not Python 3.11, 3.12 or 3.13; name one with PYTHON=..." >&2
    exit 1
}
# Debian keeps the venv module's pip in a package of its own.
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "setup: installing python3-venv"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    else
        echo "setup: $python has no ensurepip; install it, e.g. with: sudo apt-get install python3-venv" >&2
        exit 1
    fi
fi

echo "setup: making .venv"
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r scripts/tools.lock
VIRTUAL_ENV="$PWD/.venv" .venv/bin/uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock scripts/tools.lock
VIRTUAL_ENV="$PWD/.venv" .venv/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
echo "$stamp" >.venv/.made-from
echo "setup: done"
