# Sourced by start_server.sh, stop_server.sh and .ci/run: finds or makes the Python environment and installs into it.
# Sets `python`. Expects `here`, the repository. Every failure is one line and a non-zero exit.

PYTRITON="nvidia-pytriton==0.7.0"
TRITON_LANG="triton==3.6.0" # the kernel language, as the recorded compile budgets have it

fail() {
    echo "octavo: error: $*" >&2
    exit 1
}

# 3.10 to 3.12: what Triton's Python backend of the wheel works with (it needs numpy below 2)
suits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# An environment that is there: the active one, else ./.venv, else none.
find_python() {
    export PYTHONPATH="$here/serving:$here/client${PYTHONPATH:+:$PYTHONPATH}"
    python=""
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        python="$VIRTUAL_ENV/bin/python"
    elif [ -x "$here/.venv/bin/python" ]; then
        python="$here/.venv/bin/python"
    else
        python=$(command -v python3) || fail "python3 is missing: apt-get install python3 python3-venv"
    fi
}

# The same, and ./.venv is made if there is none; an image whose own python3 has everything needs none.
choose_python() {
    find_python
    case "$python" in
        "${VIRTUAL_ENV:-/nowhere}"/* | "$here/.venv"/*) ;;
        *)
            has_packages || make_venv
            ;;
    esac
    suits "$python" || fail "$python is $("$python" -V 2>&1); the server needs Python 3.10, 3.11 or 3.12"
}

make_venv() {
    local candidate base=""
    for candidate in python3 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && suits "$candidate"; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] || fail "no Python 3.10, 3.11 or 3.12 found (python3 is $(python3 -V 2>&1)): apt-get install python3.11 python3.11-venv"
    [ -w "$here" ] || fail "$here cannot be written, so no .venv can be made in it; activate an environment of your own"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base has no venv module: apt-get install python$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    echo "octavo: making $here/.venv with $("$base" -V)"
    "$base" -m venv "$here/.venv" || fail "could not make $here/.venv"
    python="$here/.venv/bin/python"
}

# A hash of all that decides what is installed, the C++ sources included.
wanted_stamp() {
    (
        cd "$here"
        echo "$PYTRITON $TRITON_LANG $here $("$python" -V)"
        cat setup.py pyproject.toml requirements/constraints.txt
        find serving/octavo/kernels/cpu -name '*.cpp' -o -name '*.h' -o -name 'build.py' | LC_ALL=C sort | xargs cat
    ) | sha256sum | cut -c1-32
}

# install_packages EXTRA...: nothing to do if the stamps say so. A read-only environment is taken as it is.
install_packages() {
    local prefix wanted extra missing=""
    prefix=$("$python" -c 'import sys; print(sys.prefix)')
    wanted=$(wanted_stamp)
    for extra in "$@"; do
        [ "$(cat "$prefix/.octavo-$extra" 2>/dev/null)" = "$wanted" ] || missing="$missing,$extra"
    done
    [ -n "$missing" ] || return 0
    if [ ! -w "$prefix" ] || [ ! -w "$here" ]; then
        has_packages && return
        fail "packages are missing and $prefix or $here cannot be written: run bash start_server.sh --install where they can"
    fi
    "$python" -m pip --version >/dev/null 2>&1 || fail "pip is missing in $prefix: $python -m ensurepip"
    announce "$prefix"
    local quiet=-qq # errors only; on a terminal pip shows its progress
    [ -t 1 ] && quiet=""
    "$python" -m pip install $quiet -c "$here/requirements/constraints.txt" -e "$here[${missing#,}]" ||
        fail "pip could not install the packages (its reason is above)"
    has_triton || "$python" -m pip install $quiet --no-deps "$PYTRITON" ||
        fail "pip could not install $PYTRITON (its reason is above)"
    case "$missing," in *,test,*) install_kernel_language "$quiet" ;; esac
    for extra in "$@"; do
        echo "$wanted" >"$prefix/.octavo-$extra"
    done
}

# Tests compile and interpret the GPU kernels without a GPU. torch's CUDA build brings a kernel language of its own.
install_kernel_language() {
    "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || return 0
    "$python" -m pip install $1 --no-deps "$TRITON_LANG" || fail "pip could not install $TRITON_LANG (its reason is above)"
}

# An official Triton image brings its own.
has_triton() {
    [ -x "${TRITONSERVER_HOME:-/opt/tritonserver}/bin/tritonserver" ]
}

has_packages() {
    "$python" -c 'import grpc, msgspec, octavo.node, tokenizers, torch, zmq' 2>/dev/null
}

announce() {
    if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        echo "octavo: installing what is missing into $1 (at most about 150 MB)"
    else
        echo "octavo: first start: installing torch, Triton (55 MB) and about 50 small packages into $1, once. Downloads about"
        echo "octavo: 350 MB where pip finds a CPU build of torch, about 3 GB where it takes the CUDA build"
    fi
}
