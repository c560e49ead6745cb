#!/usr/bin/env bash
# Install what the given stages need: Debian packages, .venv, pinned Python packages.
#
#   scripts/setup.sh STAGE...        stages: runtime test bench
#
# May be run at any time and by several processes at once. When nothing is to do it reads a few files and ends.
# A stage counts as installed when the stamp in .venv names the digest of everything that it was installed from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One setup at a time; the lock ends with this process.
exec 9<.
flock 9

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

missing_packages() { # STAGE...
    local stages=" $* " stage package rest
    while read -r stage package rest; do
        [[ -n "$stage" && "$stage" != '#'* && "$stages" == *" $stage "* ]] || continue
        dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || printf '%s\n' "$package"
    done <scripts/debian-packages.txt
}

install_packages() { # STAGE...
    local missing sudo=()
    if ! command -v dpkg-query >/dev/null; then
        [[ -e .venv ]] || say "no Debian here: install what scripts/debian-packages.txt names by other means"
        return
    fi
    mapfile -t missing < <(missing_packages "$@")
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ $EUID -ne 0 ]]; then
        command -v sudo >/dev/null || die "needs root or sudo to install: ${missing[*]}"
        sudo=(sudo)
    fi
    say "apt-get install ${missing[*]}"
    local apt=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get --quiet=2 --option Dpkg::Use-Pty=0) output
    # Hundreds of lines that say something only where the command fails.
    output=$("${apt[@]}" update 2>&1 </dev/null) || say "going on with old package lists, for apt-get update failed: $output"
    output=$("${apt[@]}" install --yes --no-install-recommends "${missing[@]}" 2>&1 </dev/null) || die "$output"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11, 2))' 2>/dev/null; }

make_venv() {
    local python
    if [[ -x .venv/bin/python ]] && new_enough .venv/bin/python; then
        return
    fi
    for python in /usr/bin/python3 "$(command -v python3 || true)" ""; do
        [[ -n "$python" ]] || die "no Python 3.11.2 or newer here: put one on the PATH as python3"
        if new_enough "$python"; then break; fi
    done
    say "$("$python" --version) from $python makes .venv"
    rm -rf .venv
    "$python" -m venv .venv
}

# A moved checkout needs its scripts and its editable install made again: the path is part of the digest.
digest() { { pwd; cat pyproject.toml constraints.txt scripts/setup.sh; } | sha256sum | cut -d ' ' -f 1; }

install_python() { # STAGE...
    local stage extras='' stale=() wanted
    wanted=$(digest)
    for stage in "$@"; do
        [[ "$(cat ".venv/.stamp-$stage" 2>/dev/null)" == "$wanted" ]] || stale+=("$stage")
    done
    [[ ${#stale[@]} -gt 0 ]] || return 0
    make_venv
    for stage in "${stale[@]}"; do
        case $stage in
            runtime) ;;
            test) extras+=dev, ;;
            bench) extras+=bench, ;;
            *) die "no such stage: $stage" ;;
        esac
    done
    say "pip install --editable .${extras:+[${extras%,}]} into .venv"
    # The environment variable, unlike the option, also pins what wheels are built with.
    PIP_CONSTRAINT="$PWD/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1 \
        .venv/bin/python -m pip install -qq --no-input --editable ".${extras:+[${extras%,}]}" </dev/null
    for stage in "${stale[@]}"; do
        printf '%s\n' "$wanted" >".venv/.stamp-$stage"
    done
}

[[ $# -gt 0 ]] || die "which stages? runtime test bench"
install_packages "$@"
install_python "$@"
