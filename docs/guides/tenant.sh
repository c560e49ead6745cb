#!/bin/sh
# A tenant's life: made, used, limited, cut off, deleted. The guide on tenants explains each step.
#
#   ATOLL_SERVICE     where the service is: atoll://HOST:PORT
#   ADMIN_TOKEN_FILE  the administrator's token, from `atoll serve --init`
#   BUCKET            s3://bucket/prefix?endpoint=…, for its bytes; the keys of the bucket in the environment
#   WORK              a directory for tokens, the cache and a mount point
set -eu
umask 077
cd "$WORK"
export ATOLL_TOKEN_FILE="$ADMIN_TOKEN_FILE"
team=$ATOLL_SERVICE/team
data=$team/data

# The administrator of the service makes the tenant, and a token for who administers it.
atoll tenant create "$team" --capacity 64MiB
atoll token create "$team" --label "administrator of the team" > team.token

# From here on the tenant does everything itself: a volume, with its bucket, and a directory for a project.
export ATOLL_TOKEN_FILE="$WORK/team.token"
atoll format "$data" --bucket "$BUCKET" --create-bucket --trash-days 0
mkdir mnt
atoll mount "$data" mnt --cache-dir cache
mkdir mnt/project
echo "only for the team" > mnt/plans
atoll umount mnt

# A user gets a token for the project's directory, for thirty days, and mounts it. Nothing else of the volume is there.
atoll token create "$data:/project" --expires 30d --label "training jobs" --json > user.json
python3 -c 'import json; print(json.load(open("user.json"))["token"])' > user.token
user=$(python3 -c 'import json; print(json.load(open("user.json"))["id"])')
atoll mount "$data" mnt --cache-dir cache --token-file user.token
echo hello > mnt/hello
cat mnt/hello
ls -A mnt mnt/..  | grep -q plans && exit 1

# The quota of the tenant holds: the write is refused.
if head -c 100M /dev/urandom > mnt/big; then
    echo "more was written than the tenant may have" >&2
    exit 1
fi
rm mnt/big
atoll token list "$team"

# The token is revoked: whoever uses it is cut off.
atoll token revoke "$team" "$user"
sleep 1
if cat mnt/hello 2> /dev/null; then
    echo "who has no right any more reads on" >&2
    exit 1
fi
atoll umount --force mnt

# The end: the volume with its bytes, then the tenant with its tokens.
atoll delete "$data" --yes
ATOLL_TOKEN_FILE=$ADMIN_TOKEN_FILE atoll tenant delete "$team"
