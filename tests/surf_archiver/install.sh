#!/usr/bin/env bash
# Installs the real surf-archivers, each beside the .venv with what it was locked with. Quick when they are there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
for lock in tests/surf_archiver/*.lock; do
    version=$(basename "$lock" .lock)
    home=.surf-archiver/$version
    [[ -f $home/.made-from ]] && cmp -s "$home/.made-from" "$lock" && continue
    .venv/bin/uv venv --quiet --clear "$home"
    VIRTUAL_ENV="$PWD/$home" .venv/bin/uv pip sync --quiet --require-hashes "$lock"
    cp "$lock" "$home/.made-from"
done
