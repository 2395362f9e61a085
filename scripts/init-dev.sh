#!/usr/bin/env bash
# Prepares the stack of compose.yml and compose.dev.yml: secrets, data directories, the image, and what `archiver init`
# makes (migrations, consumer groups, bucket, work pools, deployments). Repeatable.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
value() { sed -n "s/^$1=//p" .env; }
# compose.dev.yml uses no other, so whoever names another means something else: its directories are not ours to give away.
objects=http://s3.localhost
if [[ -e .env && $(value AWS_ENDPOINT_URL) != "$objects" ]]; then
    echo "init-dev: .env is not one for development: its AWS_ENDPOINT_URL is not $objects. Nothing was changed" >&2
    exit 1
fi
./scripts/setup.sh
./scripts/make-secrets.sh
for name in aws_access_key_id aws_secret_access_key; do
    [[ -e secrets/$name ]] || (umask 0333 && echo development >"secrets/$name")
done

if [[ ! -e .env ]]; then
    # Who runs this owns the data directories; containers do not run as root, so root takes the image's user.
    user=$(id -u):$(id -g)
    [[ $user == 0:* ]] && user=10001:10001
    sed -e "s|^ARCHIVER_DATA_DIR=.*|ARCHIVER_DATA_DIR=./.archiver/compose/data|" \
        -e "s|^ARCHIVER_STAGING_DIR=.*|ARCHIVER_STAGING_DIR=./.archiver/compose/staging|" \
        -e "s|^ARCHIVER_USER=.*|ARCHIVER_USER=$user|" \
        -e "s|^ARCHIVER_CONSUMER=.*|ARCHIVER_CONSUMER=dev|" \
        -e "s|^AWS_ENDPOINT_URL=.*|AWS_ENDPOINT_URL=$objects|" .env.example >.env
fi
mkdir -p "$(value ARCHIVER_DATA_DIR)"/{prince,aretha}/events "$(value ARCHIVER_STAGING_DIR)"
if [[ $(id -u) == 0 ]]; then
    chown -R "$(value ARCHIVER_USER)" "$(value ARCHIVER_DATA_DIR)" "$(value ARCHIVER_STAGING_DIR)"
fi

docker compose -f compose.yml -f compose.dev.yml build
docker compose -f compose.yml -f compose.dev.yml run --rm init
cat <<'NEXT'
Ready. Next:
    docker compose -f compose.yml -f compose.dev.yml up -d
    docker compose -f compose.yml -f compose.dev.yml logs -f event-ingester state-manager upload-worker
    http://fastapi.localhost/docs and http://prefect.localhost (sign in with secrets/prefect_auth)
NEXT
