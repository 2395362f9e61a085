#!/usr/bin/env bash
# Sets everything up and shows timesteps travelling from a mock microscope to object storage.
# Arguments go to `archiver demo`, e.g. --timesteps 4 --images 150 --image-bytes 4000000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
exec .venv/bin/archiver demo "$@"
