# Makes a virtual environment in .venv (or $WAN_JAX_VENV), installs wan_jax with the extras given as $1 ("" or "[test]"),
# and puts its programs first on PATH. Sourced by ./demo, ./test and .ci/run. Works beside externally managed system
# Pythons, because nothing is installed outside the folder.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
venv=${WAN_JAX_VENV:-.venv}
python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "wan_jax needs Python 3.11 or newer; install it, or name it: PYTHON=/path/to/python3 $0" >&2
    exit 1
fi
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv" >/dev/null 2>&1; then
    rm -rf "$venv" # Debian and Ubuntu keep the venv module's pip in a package of its own; virtualenv carries its own
    if ! { "$python" -m pip --version >/dev/null 2>&1 &&
        "$python" -m pip install --quiet --target "$venv.bootstrap" virtualenv &&
        PYTHONPATH="$venv.bootstrap" "$python" -m virtualenv --quiet "$venv"; }; then
        rm -rf "$venv" "$venv.bootstrap"
        echo "$python can make no virtual environment; install it (Debian, Ubuntu: apt install python3-venv)" >&2
        exit 1
    fi
    rm -rf "$venv.bootstrap"
fi
# A stamp of what was asked for makes the second run start at once.
# Python compiles what it imports anyway; pip would compile all there is first.
stamp="$venv/.installed"
wanted="$1 $(cksum <pyproject.toml)"
if ! grep -qxF -- "$wanted" "$stamp" 2>/dev/null; then
    echo "installing wan_jax$1 into $venv ..." >&2
    "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --editable ".$1" || exit 1
    echo "$wanted" >>"$stamp"
fi
PATH="$(cd "$venv/bin" && pwd):$PATH"
export PATH
