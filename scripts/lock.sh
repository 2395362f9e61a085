#!/usr/bin/env bash
# Writes the locks anew after a change of pyproject.toml: one with everything, and one of it with what the container
# image runs. Arguments go to uv, e.g. --upgrade-package prefect
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock() { .venv/bin/uv pip compile --quiet --no-emit-index-url --no-header --generate-hashes --universal pyproject.toml "$@"; }
lock --all-extras -o requirements.lock "$@"
# No version but those that were tested.
rm -f requirements-image.lock
lock --extra replicas --extra amqp --no-annotate -c requirements.lock -o requirements-image.lock
