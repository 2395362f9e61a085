#!/usr/bin/env bash
# Restores what scripts/backup.sh has saved into new, empty volumes. Nothing else may run meanwhile.
# With --check it only says whether the backup is whole: ask that before the old volumes are removed.
set -euo pipefail
only_check=
[[ ${1-} != --check ]] || { only_check=yes && shift; }
from=$(cd "${1:?usage: scripts/restore.sh [--check] DIRECTORY}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "restore: $from/$1. Nothing was changed" >&2
    exit 1
}
for file in redis.rdb archiver.dump prefect.dump; do
    [[ -s $from/$file ]] || fail "$file is not there, or empty"
done
[[ $(head -c 5 "$from/redis.rdb") == REDIS ]] || fail "redis.rdb is not of Redis"
# Before the sum of eight bytes at its end is the mark of the end.
[[ $(tail -c 9 "$from/redis.rdb" | od -An -tx1 -N1) == " ff" ]] || fail "redis.rdb has no end"
for database in archiver prefect; do
    # The list of what is in it is at its beginning, so all of it is read. That needs no server.
    docker compose run --rm -T --no-deps postgres pg_restore --file=/dev/null <"$from/$database.dump" ||
        fail "$database.dump can't be read to its end"
done
echo "The backup in $from is whole."
[[ -z $only_check ]] || exit 0


docker compose up -d --wait postgres
for database in archiver prefect; do
    docker compose exec -T postgres pg_restore --username=archiver --exit-on-error --single-transaction \
        --dbname="$database" <"$from/$database.dump"
done
# Redis reads its append-only file at its start, and nothing else: a server of a moment makes one of the backup.
# shellcheck disable=SC2016 # expanded in the container
docker compose run --rm -T --no-deps redis sh -euc '
    ls /data/appendonly* >/dev/null 2>&1 && { echo "there is a Redis already: remove its volume first" >&2; exit 1; }
    cat >/data/dump.rdb
    redis-server --dir /data --save "" --appendonly no --port 0 --unixsocket /tmp/restore.sock --daemonize yes >/dev/null
    ask() { redis-cli -s /tmp/restore.sock "$@" 2>&1; }
    for second in $(seq 600); do [ "$(ask ping)" = PONG ] && break; sleep 1; done
    [ "$(ask config set appendonly yes)" = OK ]
    for second in $(seq 600); do
        ask info persistence | grep -Eq "^aof_rewrite_(in_progress|scheduled):1" || break
        sleep 1
    done
    ask info persistence | grep -q "^aof_last_bgrewrite_status:ok"
    ask shutdown nosave
    rm /data/dump.rdb' <"$from/redis.rdb"
echo "Restored. Next: docker compose up -d"
