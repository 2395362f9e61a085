#!/usr/bin/env bash
# Backs the state up while everything runs, into a directory: Redis, and the databases of the archiver and of Prefect.
# The objects are in object storage, and the images on the microscopes' shares until they are safe.
set -euo pipefail
into=${1:?usage: scripts/backup.sh DIRECTORY}
here=$(dirname "${BASH_SOURCE[0]}")
umask 077
mkdir -p "$into"
into=$(cd "$into" && pwd)
cd "$here/.."

save() {
    docker compose exec -T "${@:2}" >"$into/$1.new"
    mv "$into/$1.new" "$into/$1"
}
# Redis first: what is in the databases and not in the stream yet is harmless, what is in the stream and not in the
# databases would be taken for recorded.
# shellcheck disable=SC2016 # expanded in the container
save redis.rdb redis sh -c 'REDISCLI_AUTH="$(sed -n "s/^requirepass //p" /run/secrets/redis_conf)" redis-cli --rdb -'
save archiver.dump postgres pg_dump --username=archiver --format=custom --dbname=archiver
save prefect.dump postgres pg_dump --username=archiver --format=custom --dbname=prefect
ls -l "$into"
