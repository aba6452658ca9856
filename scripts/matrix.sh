#!/usr/bin/env bash
# Installs lowbit for each Python in an environment of its own, and runs the CPU tests there.
#
#   scripts/matrix.sh [PYTHON ...]      python3.11 to python3.14 where none is named; missing ones are said and left out
#
# CONSTRAINTS names the pins (constraints.txt by default; empty for the newest of everything). TORCH is a requirement
# that wins over them: TORCH=torch==2.11.0 tries the lower bound. TESTS is what pytest is given.
set -euo pipefail
cd "$(dirname "$0")/.."
constraints=${CONSTRAINTS-constraints.txt}
[ $# -gt 0 ] || set -- python3.11 python3.12 python3.13 python3.14
export LOWBIT_CUDA="${LOWBIT_CUDA:-0}"
results=()
for python in "$@"; do
    if ! "$python" -c 'import sys' 2>/dev/null; then
        results+=("$python: not here")
        continue
    fi
    work=$(mktemp -d)
    "$python" -m venv "$work/env"
    pip=("$work/env/bin/pip" install -q --disable-pip-version-check)
    pins=()
    if [ -n "$constraints" ]; then
        cp "$constraints" "$work/pins.txt"
        [ -z "${TORCH:-}" ] || sed -i "s/^torch==.*/$TORCH/" "$work/pins.txt"
        pins=(-c "$work/pins.txt")
    fi
    # torch first and alone, since anything that asks for it more loosely takes a newer build
    "${pip[@]}" "${pins[@]}" "${TORCH:-torch}"
    if "${pip[@]}" "${pins[@]}" ".[all,test]" &&
        "$work/env/bin/python" -m pytest -q -m "not gpu and not slow" ${TESTS:-}; then
        results+=("$python: passed")
    else
        results+=("$python: FAILED")
    fi
    rm -rf "$work"
done
printf '%s\n' "${results[@]}"
[[ "${results[*]}" != *FAILED* ]]
