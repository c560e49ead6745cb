#!/usr/bin/env bash
# Unmount ./mnt; returns when the daemon has uploaded what it had and ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if grep -qF " $(printf '%s' "$PWD/mnt" | sed 's/ /\\040/g') fuse.atoll " /proc/self/mounts; then
    .venv/bin/atoll umount ./mnt
    echo 'mnt is unmounted; the volume stays in vol'
else
    echo 'mnt is not mounted'
fi
