#!/usr/bin/env bash
# Show on a real mount what AtollFS does: an embedded volume at ./vol, mounted at ./mnt, which it stays.
# May be run again at any time: the volume and the mount are kept, only the folder of the demonstration is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

[[ -e /dev/fuse ]] || { echo "no /dev/fuse here: load the module fuse, or give the container that device" >&2; exit 1; }

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[[ -t 1 ]] || heading() { printf '\n== %s\n' "$*"; }

shown() { # COMMAND...: show it, then run it
    printf '$ %s\n' "$*"
    "$@"
}

is_mounted() { grep -qF " $(printf '%s' "$PWD/mnt" | sed 's/ /\\040/g') fuse.atoll " /proc/self/mounts; }

heading 'A volume: names in vol/meta.db, bytes in vol/objects'
if [[ -e vol/meta.db ]]; then echo 'vol is there already'; else shown atoll format ./vol; fi
# A daemon that was killed leaves a mount that answers nothing.
if is_mounted && ! stat mnt >/dev/null 2>&1; then shown umount --lazy mnt; fi
mkdir -p mnt
if is_mounted; then echo 'mnt is mounted already'; else shown atoll mount ./vol ./mnt; fi

heading 'Files are written, read and listed with the programs that you have'
rm -rf mnt/demo
mkdir mnt/demo
echo 'a ring of reef around a calm lagoon' >mnt/demo/small
head -c 16M /dev/urandom >mnt/demo/big
shown ls -l mnt/demo
shown cat mnt/demo/small
(cd mnt/demo && sha256sum big >big.sha256 && shown sha256sum --check big.sha256)

heading 'close() has returned: how durable is the file now?'
echo '$ getfattr --name user.atoll.durability mnt/demo/big'
python -c 'import os; print(os.getxattr("mnt/demo/big", "user.atoll.durability").decode())'

heading 'A clone shares the stored bytes, whatever its size'
shown atoll clone mnt/demo mnt/demo-clone.$$
cmp mnt/demo/big "mnt/demo-clone.$$/big" && echo 'equal, byte by byte'
rm -r "mnt/demo-clone.$$"

heading 'What the volume holds, and what one file is made of'
shown atoll status ./vol
shown atoll info mnt/demo/big

heading 'What the kernel asked the daemon for, so far'
echo "$ atoll stats ./vol | grep '^atoll_fuse_requests_total'        (those above 0)"
atoll stats ./vol | grep '^atoll_fuse_requests_total' | grep -v ' 0$'

printf '\nMounted at %s: try it. "make stop" unmounts, "make run" mounts it again with all that is in it.\n' "$PWD/mnt"
