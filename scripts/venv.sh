# shellcheck shell=bash
# Sourced by the other scripts: finds or makes the virtual environment of this checkout and sets $venv.
#
#   prepare runtime     the project and what it needs to run
#   prepare dev         the same, and what the checks and tests need
#
# The environment is .venv in a checkout that is ours (the project is then installed in place), else a directory of our own
# outside it (with a copy of the project, since we may not be able to write beside its sources). CELLOS_VENV overrides the place,
# PYTHON the interpreter. Nothing is done when the locks, the sources and the interpreter are those of the last time.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
unset PYTHONPATH PYTHONHOME

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

ours() { [ -d "$1" ] && [ -O "$1" ] && [ -w "$1" ]; }

# Sets $venv and $in_place.
choose_venv() {
    in_place=no
    if ours "$root" && ours "$root/src"; then in_place=yes; fi
    if [ -n "${CELLOS_VENV:-}" ]; then
        venv=$CELLOS_VENV
        mkdir -p "$venv" || die "cannot make CELLOS_VENV=$venv"
    elif [ "$in_place" = yes ]; then
        venv=$root/.venv
    else
        local name base bases=()
        name=cellos-venv-$(printf '%s' "$root" | cksum | cut -d' ' -f1)
        venv=
        if [ -n "${XDG_CACHE_HOME:-}" ]; then bases+=("$XDG_CACHE_HOME"); fi
        if [ -n "${HOME:-}" ]; then bases+=("$HOME/.cache"); fi
        for base in "${bases[@]}"; do
            if mkdir -p -m 0700 "$base/$name" 2>/dev/null && ours "$base/$name"; then venv=$base/$name; break; fi
        done
        if [ -z "$venv" ]; then # a directory that all share: whoever came first with that name must have been us
            venv=${TMPDIR:-/tmp}/$name-$EUID
            mkdir -m 0700 "$venv" 2>/dev/null || true
            if [ -L "$venv" ] || ! ours "$venv" || [ "$(stat -c %a "$venv")" != 700 ]; then
                die "cannot make $venv, or it belongs to somebody else: set CELLOS_VENV to a directory of your own"
            fi
        fi
    fi
    case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
}

# Sets $python. The system's interpreter comes first: a cell sees /usr, and so the same interpreter.
choose_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        python=$(command -v "$candidate" 2>/dev/null) || continue
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        return
    done
    die "no Python 3.11 or later found (apt-get install python3 python3-venv, or set PYTHON)"
}

# One line that changes when what was installed is no longer what would be.
fingerprint() { # fingerprint runtime|dev
    local lock=$1
    {
        "$python" -c 'import sys; print(sys.version, sys.base_prefix)'
        printf '%s %s\n' "$root" "$in_place"
        cat "$root/pyproject.toml" "$root/requirements/build.txt" "$root/requirements/$lock.txt"
        if [ "$in_place" = no ]; then
            (cd "$root" && find src -name '*.egg-info' -prune -o -name __pycache__ -prune -o -type f -print | LC_ALL=C sort | xargs -d '\n' cksum)
        fi
    } | sha256sum | cut -d' ' -f1
}

install_packages() { # install_packages OPTION…: with uv where it is there, and pip where uv cannot
    if [ "$use_uv" = yes ]; then
        timeout 60 uv pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@" && return
        say "uv did not manage, trying pip"
        use_uv=no
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-warn-script-location "$@" \
        || die "the installation failed (see above); the package index must be reachable the first time"
}

make_venv() {
    say "making $venv with $python"
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv "$venv" >&2 && return
    elif [ "$use_uv" = yes ]; then
        timeout 60 uv venv --quiet --allow-existing --seed --python "$python" "$venv" && return
    fi
    die "cannot make a virtual environment with $python (Debian: apt-get install python3-venv)"
}

prepare() { # prepare runtime|dev
    local lock=$1 want use_uv=no source
    choose_venv
    choose_python
    want=$(fingerprint "$lock")
    if [ ! -w "${XDG_CACHE_HOME:-${HOME:-}}" ]; then export PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1; fi
    [ "$(cat "$venv/.installed-$lock" 2>/dev/null)" = "$want" ] && return
    mkdir -p "$venv"
    exec {turn}>"$venv/.lock" # two scripts at once: the second waits, and finds the work done
    flock "$turn"
    if [ "$(cat "$venv/.installed-$lock" 2>/dev/null)" != "$want" ]; then
        command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1 && use_uv=yes
        if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            if [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" | grep -vx .lock)" ]; then
                die "$venv holds other things than a virtual environment: set CELLOS_VENV to a new directory"
            fi
            make_venv
        fi
        rm -f "$venv"/.installed-*
        say "installing the locked dependencies ($lock)"
        install_packages --require-hashes -r "$root/requirements/build.txt"
        install_packages --require-hashes -r "$root/requirements/$lock.txt"
        say "installing cellos"
        if [ "$in_place" = yes ]; then
            install_packages --no-deps --no-build-isolation --editable "$root"
            # Sources that nobody compiled would be compiled at every start, where PYTHONDONTWRITEBYTECODE is set.
            "$venv/bin/python" -m compileall -q "$root/src"
        else # a build writes beside the sources, and those are not ours to write to
            source=$(mktemp -d "$venv/source.XXXXXX")
            cp -R "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$root/src" "$source"
            chmod -R u+w "$source"
            install_packages --no-deps --no-build-isolation --force-reinstall "$source"
            rm -rf "$source"
        fi
        # What builds is no part of what runs, and its start-up hook would be loaded by every command.
        if [ "$lock" = runtime ]; then "$venv/bin/python" -m pip uninstall --quiet --yes --disable-pip-version-check setuptools >&2 || true; fi
        printf '%s\n' "$want" >"$venv/.installed-$lock"
        # The development lock holds the run-time lock.
        if [ "$lock" = dev ]; then fingerprint runtime >"$venv/.installed-runtime"; fi
    fi
    exec {turn}>&-
}
