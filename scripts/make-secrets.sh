#!/usr/bin/env bash
# Makes ./secrets: a random value for everything the services of compose.yml share, where it is missing. The keys of the
# object storage are yours to put there, as aws_access_key_id and aws_secret_access_key.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Nobody else gets into the directory. The files themselves are mounted one by one, and the containers' users, who
# are not us, have to read them.
mkdir -p secrets
chmod 700 secrets
umask 0333

random() { python3 -c 'import secrets; print(secrets.token_urlsafe(32))'; }
# Writes what a command prints to a secret, wholly or not at all, unless there is one.
keep() {
    local secret=secrets/$1 draft=secrets/.$1.new
    shift
    [[ -e $secret ]] && return
    rm -f "$draft"
    "$@" >"$draft"
    mv "$draft" "$secret"
}

for name in archiver_api_token archiver_webhook_token pgpassword; do
    keep "$name" random
done
keep prefect_auth printf 'archiver:%s\n' "$(random)"

keep redis_conf printf 'requirepass %s\n' "$(random)"
keep archiver_redis_url printf 'redis://:%s@redis:6379/0\n' "$(cut -d' ' -f2 secrets/redis_conf)"
# Only for several Prefect servers, in a database of its own.
keep prefect_redis_url printf 'redis://:%s@redis:6379/1\n' "$(cut -d' ' -f2 secrets/redis_conf)"

keep rabbitmq_conf printf 'default_user = archiver\ndefault_pass = %s\n' "$(random)"
# Empty: nothing is read from RabbitMQ. docs/production.md says what to write here.
keep archiver_rabbitmq_url true
