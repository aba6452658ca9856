"""Quality of each method, ours and other toolkits', with the same calibration ids and the same scored windows.

    python -m benchmarks.bench_quality demo --text FILE --calibrate text --run gptq best llm-compressor-gptq \\
        --python llm-compressor=/path/bin/python --python autoround=/path/bin/python [--device cuda] --work DIR

Calibration: 128 windows of 512 tokens of the first 60% of FILE, or of the builtin documentation. Scored: 16 windows of
1024 tokens of the rest of FILE, and of the builtin documentation's held-out part, or `--windows` of them after the
first `--skip`, and at most `--more` that come after these, in rows of their own; weights dequantized, inputs rounded
where the checkpoint says so, all else in float32. A row is the paired difference to the unquantized model, and the
divergence from it, with standard errors over windows; with `--against METHOD`, which WORK must hold already, also the
paired differences of both to that method. A checkpoint that WORK holds already is scored, not made again.
Rows go to benchmarks/results/quality.jsonl, or to `--results`, in place of older ones of the same run; each run that
goes on beside another one needs a file of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lowbit
from benchmarks.llamacpp import dense_gguf
from benchmarks.measure import write_rows
from lowbit.calibrate.data import builtin_text, calibration_tokens
from lowbit.evaluation.backend import BlocksBackend
from lowbit.evaluation.divergence import Divergence, divergence
from lowbit.evaluation.perplexity import difference
from lowbit.evaluation.text import Cut, Protocol, cut
from lowbit.models.source import Source, open_source

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.jsonl"
SHARE = 0.6  # of the text, to calibrate on
SAMPLES, LENGTH, SEED = 128, 512, 42
CONTEXT = 1024
W4 = {"bits": 4, "group_size": 64}
ASYMMETRIC, ROTATED = W4 | {"symmetric": False}, W4 | {"transforms": ["rotate"]}
MIXED = ("int3-g64", "uint3-g64", "int4-g128", "int4-g64", "uint4-g64", "uint4-g32", "int4-g32", "int5-g128")
MIXED += ("int5-g64", "int6-g64", "int8", "nvfp4-a16", "mxfp4-a16", "16bit")
# Arguments of lowbit.quantize.
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"} | W4,
    "rtn-asymmetric": {"method": "rtn"} | ASYMMETRIC,
    "awq": {"method": "awq"} | W4,
    "gptq": {"method": "gptq"} | W4,
    "gptq-rotated": {"method": "gptq"} | ROTATED,
    "gptq-asymmetric": {"method": "gptq"} | ASYMMETRIC,
    "signround": {"method": "signround", "iters": 20} | W4,
    "signround-200": {"method": "signround", "iters": 200} | W4,
    "best": {"method": "best"} | W4,
    "best-int4-g32": {"method": "best", "scheme": "int4-g32"},
    "best-codes": {"method": "best", "distill_codes": True} | W4,
    "best-from-gptq": {"method": "best", "first": "gptq"} | W4,
    "best-rotated": {"method": "best"} | ROTATED,
    "best-asymmetric": {"method": "best"} | ASYMMETRIC,
    "gptq-int4-g32": {"method": "gptq", "scheme": "int4-g32"},
    "gptq-mxfp4-a16": {"method": "gptq", "scheme": "mxfp4-a16"},
    "gptq-nvfp4-a16": {"method": "gptq", "scheme": "nvfp4-a16"},
    "gptq-mixture": {"method": "gptq", "scheme": "int4-g64", "target_bits": 4.5, "candidates": MIXED},
    "best-mixture": {"method": "best", "scheme": "int4-g64", "target_bits": 4.5, "candidates": MIXED},
    "best-mixed": {"method": "best", "target_bits": 4.75} | W4,
    "int8": {"method": "int8"},
    "int8-head": {"method": "int8", "head": "int8"},
    "gptq-int8": {"method": "gptq", "scheme": "int8"},
    "gptq-int8-head": {"method": "gptq", "scheme": "int8", "head": "int8"},
    "int8-kv": {"method": "int8", "kv_cache": "fp8"},
    "int8-kv-head": {"method": "int8", "kv_cache": "fp8-head"},
    "int8-kv-tuned": {"method": "int8", "kv_cache": "fp8", "distill_steps": 64, "own_samples": 128},
    "smoothquant": {"method": "smoothquant"},
    "smoothquant-gptq": {"method": "smoothquant", "rounder": "gptq"},
    "smoothquant-tuned": {"method": "smoothquant", "rounder": "gptq", "distill_steps": 24},
    "smoothquant-static": {"method": "smoothquant", "activations": "tensor"},
    "fp8": {"method": "fp8"},
}
# The schemes that peers have too, by the name that their methods begin with, each with three methods of ours.
SCHEMES = {
    "nvfp4": "nvfp4-a16",
    "mxfp4": "mxfp4-a16",
    "fp8": "fp8",
    "w3": "int3-g128",
    "w3g64": "int3-g64",
    "w2": "int2-g64",
}
OURS |= {
    f"{name}-{method}": {"method": method, "scheme": scheme}
    for name, scheme in SCHEMES.items()
    for method in ("rtn", "gptq", "best")
}
OURS |= {
    f"{name}-codes": {"method": "best", "scheme": scheme, "distill_codes": True} for name, scheme in SCHEMES.items()
}
# Weights annealed, then tuned as by `best`, with and without codes.
ANNEALED = {"method": "best", "rounder": "anneal", "anneal_steps": 100}
for name in ("w3", "w3g64", "w2", "nvfp4", "mxfp4", "fp8"):
    OURS[f"{name}-anneal"] = ANNEALED | {"scheme": SCHEMES[name]}
    OURS[f"{name}-anneal-codes"] = OURS[f"{name}-anneal"] | {"distill_codes": True}
MIXTURES = ("q4_k_m", "q3_k_m", "q2_k", "q2_k_s")  # of llama.cpp, in GGUF files
OURS |= {
    f"{name}-{method}": {"method": method, "scheme": name, "format": "gguf"}
    for name in MIXTURES
    for method in ("rtn", "gptq", "best")
}
OURS |= {f"{name}-anneal": ANNEALED | {"scheme": name, "format": "gguf"} for name in MIXTURES}
OURS |= {"best-200": OURS["best"] | {"iters": 200}, "best-anneal": ANNEALED | W4}
# Calibrated on the model's own text besides, with and without tuned codes, and with more steps of tuning.
ALONE = [name for name in OURS if name in ("best", "best-200") or name.endswith(("-anneal", "-best"))]
for name in ALONE:
    OURS[f"{name}-own"] = OURS[name] | {"own_samples": 128}
    OURS[f"{name}-own-codes"] = OURS[f"{name}-own"] | {"distill_codes": True}
    OURS[f"{name}-own-codes-160"] = OURS[f"{name}-own-codes"] | {"distill_steps": 160}
# All of this by one word, and with more text, half of it begun with the dataset's, in as many steps as read it twice.
OURS |= {f"{name}-finest": {"method": "finest", "scheme": scheme} for name, scheme in SCHEMES.items()}
OURS |= {f"{name}-finest": {"method": "finest", "scheme": name, "format": "gguf"} for name in MIXTURES}
OURS |= {"finest": {"method": "finest"} | W4}
LONG = {"own_prompt": 32, "distill_samples": 3072, "distill_steps": 464}
OURS |= {f"{name}-long": OURS[name] | LONG for name in ("finest", "w3-finest", "w2-finest", "mxfp4-finest")}
THEIRS = {
    "llm-compressor-awq": "--method awq",
    "llm-compressor-gptq": "--method gptq",
    "llm-compressor-smoothquant": "--method smoothquant",
    "llm-compressor-fp8": "--method rtn --scheme FP8_DYNAMIC",
    "llm-compressor-nvfp4": "--method rtn --scheme NVFP4A16",
    "llm-compressor-nvfp4-gptq": "--method gptq --scheme NVFP4A16",
    "llm-compressor-nvfp4-awq": "--method awq --scheme NVFP4A16",
    "llm-compressor-mxfp4": "--method rtn --scheme MXFP4A16",
    "llm-compressor-mxfp4-gptq": "--method gptq --scheme MXFP4A16",
    "autoround-20": "--iters 20",
    "autoround-200": "--iters 200",
    "autoround-nvfp4": "--iters 200 --scheme nvfp4",
    "autoround-nvfp4-best": "--iters 1000 --scheme nvfp4 --ext",
    "autoround-mxfp4": "--iters 200 --scheme mxfp4",
    "autoround-mxfp4-best": "--iters 1000 --scheme mxfp4 --ext",
    "autoround-w3": "--iters 200 --scheme w3 --group-size 128",
    "autoround-w3-best": "--iters 1000 --scheme w3 --group-size 128 --ext",
    "autoround-w3g64-ext": "--iters 200 --scheme w3 --ext",
    "autoround-w2": "--iters 200 --scheme w2",
    "autoround-w3-ext": "--iters 200 --scheme w3 --group-size 128 --ext",
    "autoround-w2-ext": "--iters 200 --scheme w2 --ext",
    "autoround-w2-best": "--iters 1000 --scheme w2 --ext",
    "autoround-q4_k_m": "--iters 200 --scheme gguf:q4_k_m",
    "autoround-q3_k_m": "--iters 200 --scheme gguf:q3_k_m",
    "autoround-q4_k_m-0": "--iters 0 --scheme gguf:q4_k_m",
    "autoround-q3_k_m-0": "--iters 0 --scheme gguf:q3_k_m",
    "autoround-q2_k_s": "--iters 200 --scheme gguf:q2_k_s",
} | {f"llama-{name}": f"--type {name.upper()}" for name in MIXTURES}


def main() -> None:
    args = parse()
    torch.set_grad_enabled(False)
    args.work.mkdir(parents=True, exist_ok=True)
    model = open_source(args.model)
    text = args.text.read_text(encoding="utf-8")
    first = args.work / "calibration.txt"
    first.write_text(text[: int(SHARE * len(text))], encoding="utf-8")
    dataset = str(first) if args.calibrate == "text" else "builtin"
    scored = {
        f"{args.text.stem}, last 40%": text[int(SHARE * len(text)) :],
        "builtin held-out": builtin_text("heldout"),
    }
    parts = [(args.skip, args.windows)] + ([(args.skip + args.windows, args.more)] if args.more else [])
    cuts = [(name, skip, windows_of(text, model, skip, most)) for skip, most in parts for name, text in scored.items()]
    base = BlocksBackend(model, args.device, torch.float32)
    for name in args.run:
        made = args.work / f"{name}-{args.calibrate}"
        if not made.with_suffix(".json").exists():
            facts = make(name, model, dataset, made, args)
            made.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
        facts = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
        facts |= {"model": args.label or args.model, "method": name, "calibration": args.calibrate}
        facts |= {"commit": args.commit, "device": device_name(args.device)}
        checkpoints = [made] + ([args.work / f"{args.against}-{args.calibrate}"] if args.against else [])
        backends = [BlocksBackend(open_source(str(each)), args.device, torch.float32) for each in checkpoints]
        for text, skip, each in cuts:
            lost, *other = (divergence(rounded, base, each) for rounded in backends)
            row = row_of(text, lost) | beside(lost, args.against, *other)
            keep(facts | ({"skipped": skip} if skip else {}) | row, args.results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what each method loses, ours and other toolkits'")
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, split for calibration and scoring")
    parser.add_argument("--calibrate", choices=("text", "builtin"), default="text")
    parser.add_argument("--run", nargs="+", choices=[*OURS, *THEIRS], required=True)
    parser.add_argument("--python", action="append", default=[], help="TOOLKIT=PYTHON, or llamacpp=DIR of programs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoints go")
    parser.add_argument("--skip", type=int, default=0, help="windows of each text before those that are scored")
    parser.add_argument("--windows", type=int, default=16, help="most windows of each text to score")
    parser.add_argument("--more", type=int, default=0, help="score so many windows after these too")
    parser.add_argument("--against", help="a method that WORK holds; rows have the difference to it")
    parser.add_argument("--label", help="the model's name in rows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="")
    return parser.parse_args()


def windows_of(text: str, model: Source, skip: int, most: int) -> Cut:
    """At most `most` windows of a text after the first `skip`."""
    whole = cut(text, model, Protocol(context=CONTEXT, windows=skip + most))
    return replace(whole, windows=whole.windows[skip:], first=whole.first[skip:])


def make(name: str, model: Source, dataset: str, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize into `output`; the program that did it, and its seconds, loading and writing included."""
    begun = time.monotonic()
    if name in OURS:
        asks = {"head", "kv_cache", "distill_steps"}  # for calibration
        free = OURS[name]["method"] in ("rtn", "int8", "fp8") and not OURS[name].keys() & asks
        data = {"dataset": dataset, "num_samples": SAMPLES, "seqlen": LENGTH, "seed": SEED} if not free else {}
        settings = {"eval_windows": 0, "device": args.device, "overwrite": True}
        lowbit.quantize(args.model, output, **settings, **data, **OURS[name])
        return {
            "by": "lowbit",
            "settings": " ".join(f"{key}={value}" for key, value in OURS[name].items()),
            "seconds": round(time.monotonic() - begun, 1),
        }
    toolkit = next((each for each in ("autoround", "llamacpp") if name.startswith(each[:5])), "llm-compressor")
    program = dict(pair.split("=", 1) for pair in args.python)[toolkit]
    script = HERE / "peers" / f"quantize_{toolkit.replace('-', '')}.py"
    ids = output.with_suffix(".ids.safetensors")
    calibration_tokens(dataset, model.tokenizer(), SAMPLES, LENGTH, SEED).save(ids)
    told: list[Any] = [ids, output, *THEIRS[name].split()]
    if toolkit == "llamacpp":
        dense = args.work / "dense" / "model.gguf"
        dense = dense if dense.exists() else dense_gguf(model, dense.parent)
        said = run([sys.executable, script, dense, *told, "--bin", program, "--threads", torch.get_num_threads()])
    else:
        device = ["--device", args.device] if toolkit == "autoround" else []
        said = run([program, script, model.directory, *told, *device])
    facts: dict[str, Any] = json.loads(said.splitlines()[-1])
    return facts | {"settings": THEIRS[name], "seconds": round(time.monotonic() - begun, 1)}


def run(command: list[Any]) -> str:
    """The command's output. SystemExit with its last lines if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def row_of(text: str, found: Divergence) -> dict[str, Any]:
    delta, error = difference(found.quantized, found.baseline)
    return {
        "text": text,
        "context": CONTEXT,
        "windows": len(found.kl),
        "perplexity": round(found.quantized.perplexity, 3),
        "base_perplexity": round(found.baseline.perplexity, 3),
        "delta_nll": round(delta, 4),
        "delta_nll_se": round(error or 0.0, 4),
        "kl": round(found.mean, 4),
        "kl_se": round(found.mean_error or 0.0, 4),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def beside(lost: Divergence, name: str | None = None, other: Divergence | None = None) -> dict[str, Any]:
    """The difference of `lost` to the method `name` on the same windows, in loss and divergence; {} without one."""
    if other is None:
        return {}
    delta, error = difference(lost.quantized, other.quantized)
    kl = replace(lost, kl=[one - two for one, two in zip(lost.kl, other.kl, strict=True)])
    values = {"delta_nll": delta, "delta_nll_se": error or 0.0, "kl": kl.mean, "kl_se": kl.mean_error or 0.0}
    return {"against": name, **{f"{key}_against": round(value, 5) for key, value in values.items()}}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device != "cpu" else f"{os.cpu_count()} CPU cores"


def keep(row: dict[str, Any], results: Path) -> None:
    """Print a row, and write it to `results` in place of an older one of the same run."""
    same = ("model", "method", "calibration", "text", "by", "device", "skipped")
    older = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    print(json.dumps(row), flush=True)
    write_rows(results, [old for old in older if any(old.get(key) != row.get(key) for key in same)] + [row])


if __name__ == "__main__":
    main()
