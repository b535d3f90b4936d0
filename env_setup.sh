#!/usr/bin/env bash
# Sets up an environment for FusionTree and, when sourced, activates it:
#
#   source env_setup.sh          Conda if there is one (environment.yml, env fusiontree-gpu), else a virtual environment
#   source env_setup.sh venv     a virtual environment in .venv in any case
#
# PYTHON chooses the interpreter of the virtual environment (default python3).

# What environment.yml holds; a machine without an NVIDIA GPU needs only the last.
_FT_EXTRAS="deepspeed,gpu,track,dev"
_FT_CONDA_ENV="fusiontree-gpu"

_ft_setup() {
    local root python extras
    root="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)" || return 1

    if [ "${1:-}" != "venv" ] && command -v conda >/dev/null 2>&1; then
        if conda env list | awk '{print $1}' | grep -qx "$_FT_CONDA_ENV"; then
            (cd "$root" && conda env update --name "$_FT_CONDA_ENV" --file environment.yml) || return 1
        else
            (cd "$root" && conda env create --file environment.yml) || return 1
        fi
        _FT_ACTIVATE="conda activate $_FT_CONDA_ENV"
        return 0
    fi

    python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "FusionTree needs Python 3.10 or newer: set PYTHON to one" >&2
        return 1
    }
    extras="dev"
    if command -v nvidia-smi >/dev/null 2>&1; then
        extras="$_FT_EXTRAS"
    fi
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || return 1
    (cd "$root" && .venv/bin/python -m pip install --no-compile --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$extras]") || return 1
    # What the Makefile waits for: it need not install again.
    touch "$root/.venv/.ready"
    _FT_ACTIVATE="source '$root/.venv/bin/activate'"
}

if _ft_setup "$@"; then
    if (return 0 2>/dev/null); then
        # conda's `activate` is a shell function, which a script only has after this hook.
        case "$_FT_ACTIVATE" in conda*) eval "$(conda shell.posix hook)" ;; esac
        eval "$_FT_ACTIVATE"
        echo "FusionTree is ready: fusiontree --help"
    else
        echo "FusionTree is ready: $_FT_ACTIVATE && fusiontree --help"
    fi
    unset _FT_EXTRAS _FT_CONDA_ENV _FT_ACTIVATE
else
    echo "FusionTree could not be set up: the message above says why" >&2
    unset _FT_EXTRAS _FT_CONDA_ENV _FT_ACTIVATE
    (return 0 2>/dev/null) && return 1
    exit 1
fi
