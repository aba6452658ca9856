"""Our kernels inside vLLM against vLLM's own, in the same run: milliseconds per token, and agreement of tokens.

    python -m benchmarks.bench_vllm --out DIR --limit 170 --commit $(git rev-parse --short HEAD) [ENGINE ...]

ENGINE is a name of ENGINES; default: all. It needs a GPU, vLLM, and lowbit installed in vLLM's environment. Checkpoints
of Llama-2-7B's shapes are first written with random codes. All engines start at the same time, then they are measured
one after another:

    step_ms     time of a decoding step at batch 1 and 8: 128 tokens written after 128, less one token after 128, over
                127; the median of `steps_ms`, with CUDA graphs and torch.compile as vLLM has them by default
    greedy      tokens that continue 8 prompts, and the log-probabilities of the two likeliest at each step
    forced      log-probabilities of fixed tokens, computed by prefill

Engines of one checkpoint are compared with its first engine: greedy tokens up to the first difference, the distance of
the two likeliest tokens there, and the largest difference of forced log-probabilities. Rows go to DIR/vllm.jsonl.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import run_facts

LENGTH = 128  # tokens of a prompt, and tokens written
BRANCH_ENDS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Network:
    """A random Llama.

    weights  standard deviation of the linears' weights
    branch   factor of that for the last linear of each branch. With 1/8 a branch adds little to the residual stream,
             like GPT-2's initialisation; with 1, rounding grows from layer to layer until no two kernels agree
    head     standard deviation of lm_head's
    device   where its tensors are made
    """

    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    layers: int = 32
    vocabulary: int = 32000
    positions: int = 4096
    weights: float = 0.02
    branch: float = 1 / 8
    head: float = 0.1
    device: str = "cuda"


LLAMA_2_7B = Network()
SCHEMES = {"w4": "int4-g128", "w8": "int8-channel", "w8a8": "int8-channel-a8token", "fp8": "fp8", "nvfp4": "nvfp4-a16"}
NVFP4_DIVISOR = 2.0**14  # engines take one for all linears that they fuse
# name -> checkpoint, whether it is ours, kernels that vLLM must not choose
ENGINES: dict[str, tuple[str, bool, str]] = {
    "w4 marlin": ("w4", False, "MacheteLinearKernel"),
    "w4 lowbit": ("w4", True, ""),
    "w4 machete": ("w4", False, "MarlinLinearKernel"),
    "w8 marlin": ("w8", False, "MacheteLinearKernel"),
    "w8 lowbit": ("w8", True, ""),
    "w8a8 cutlass": ("w8a8", False, ""),
    "w8a8 lowbit": ("w8a8", True, ""),
    "fp8 cutlass": ("fp8", False, ""),
    "fp8 lowbit": ("fp8", True, ""),
    "nvfp4 marlin": ("nvfp4", False, ""),
    "nvfp4 lowbit": ("nvfp4", True, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="our kernels inside vLLM beside vLLM's own")
    parser.add_argument("engines", nargs="*", metavar="ENGINE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("/dev/shm/lowbit-models"))
    parser.add_argument("--limit", type=float, default=160, help="seconds after which nothing new is begun")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args.child, args.models, args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.limit
    names = args.engines or list(ENGINES)
    results = list(run_engines(names, args, deadline))
    with (args.out / "vllm.jsonl").open("w") as file:
        for row in [*results, *compare(results)]:
            short = {key: value for key, value in row.items() if key not in ("greedy", "forced")}
            file.write(json.dumps(short | run_facts(args.commit)) + "\n")
            print(json.dumps(short), flush=True)


def write_model(directory: Path, kind: str, net: Network = LLAMA_2_7B) -> None:
    """A checkpoint with random codes, written by our own writer from tensors made on the network's device."""
    import torch

    from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
    from lowbit.export.tensorfile import TensorFileWriter
    from lowbit.quant.scheme import parse_scheme

    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    scheme, generator = parse_scheme(SCHEMES[kind]), torch.Generator(net.device).manual_seed(7)
    writer = TensorFileWriter(directory / "model.safetensors")

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=net.device, dtype=torch.bfloat16)

    linears = {f"self_attn.{x}_proj": (net.hidden, net.hidden) for x in "qkvo"}
    linears |= {f"mlp.{x}_proj": (net.inner, net.hidden) for x in ("gate", "up")}
    linears["mlp.down_proj"] = (net.hidden, net.inner)
    names = {}
    for layer in range(net.layers):
        for role, (n, k) in linears.items():
            name = f"model.layers.{layer}.{role}"
            deviation = net.weights * (net.branch if role in BRANCH_ENDS else 1)
            for key, tensor in COMPRESSED_TENSORS.write(
                name, random_weight(scheme, n, k, deviation, generator)
            ).items():
                writer.add(key, tensor)
            names[name] = scheme
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"model.layers.{layer}.{norm}.weight", 1 + 0.1 * noise(net.hidden))
    writer.add("model.embed_tokens.weight", noise(net.vocabulary, net.hidden))
    writer.add("lm_head.weight", net.head * noise(net.vocabulary, net.hidden))
    writer.add("model.norm.weight", 1 + 0.1 * noise(net.hidden))
    writer.close()
    config = config_of(net) | {"quantization_config": COMPRESSED_TENSORS.quantization_config(names, ["lm_head"])}
    (directory / "config.json").write_text(json.dumps(config))


def config_of(net: Network) -> dict[str, Any]:
    """config.json of the network, not quantized."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": net.hidden,
        "intermediate_size": net.inner,
        "num_attention_heads": net.heads,
        "num_key_value_heads": net.heads,
        "num_hidden_layers": net.layers,
        "vocab_size": net.vocabulary,
        "max_position_embeddings": net.positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def random_weight(scheme: Any, n: int, k: int, deviation: float, generator: Any) -> Any:
    """A weight (n, k) of about that standard deviation: integers with uniform codes around zero, floats rounded from
    normal noise, with one divisor of scales for all weights."""
    import torch

    from lowbit.quant.qtensor import QTensor, round_to_nearest

    if not scheme.number.is_integer:
        noise = deviation * torch.randn(n, k, generator=generator, device=generator.device)
        divisor = torch.tensor(NVFP4_DIVISOR, device=generator.device) if scheme.weights.parent else None
        rounded = round_to_nearest(noise, scheme.weights_only, torch.bfloat16, divisor=divisor)
        return QTensor(rounded.codes, rounded.scales, None, scheme, divisor=rounded.divisor)
    limit, device = int(scheme.number.high), {"generator": generator, "device": generator.device}
    codes = torch.randint(-limit, limit + 1, (n, k), dtype=torch.int8, **device)
    scales = (0.75 + 0.5 * torch.rand(n, scheme.groups(k), **device)) * deviation / (2**scheme.bits * 0.29)
    return QTensor(codes, scales.to(torch.bfloat16), None, scheme)


def run_engines(names: list[str], args: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    """Each engine's row, measured one at a time once all have started, or when most of the time is gone.

    RuntimeError if one of ours dies on the way, since the others would have nothing to compare with.
    """
    kinds = dict.fromkeys(ENGINES[name][0] for name in names)
    with ThreadPoolExecutor() as pool:
        written = {kind: pool.submit(write_model, args.models / kind, kind) for kind in kinds}
    children = {}
    for name in names:
        written[ENGINES[name][0]].result()
        children[name] = start(name, args)
    print(f"all begun, {deadline - time.monotonic():.0f} s left", flush=True)
    try:
        ready = await_ready(children, args.out, time.monotonic() + 0.75 * (deadline - time.monotonic()))
        for name in children.keys() - ready:
            print(f"{name} did not start in time", flush=True)
            end(children.pop(name))
        for name, child in children.items():
            flag(args.out, name, "go").touch()
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            if flag(args.out, name, "json").exists():
                yield json.loads(flag(args.out, name, "json").read_text())
    finally:
        for child in children.values():
            end(child)


def await_ready(children: dict[str, subprocess.Popen[bytes]], out: Path, until: float) -> set[str]:
    """The ready engines: all of them, or those at the time `until`. RuntimeError if one of ours died."""
    ready: set[str] = set()
    while len(ready) < len(children) and time.monotonic() < until:
        time.sleep(0.5)
        for name, child in list(children.items()):
            if name not in ready and flag(out, name, "ready").exists():
                ready.add(name)
                print(f"{name} ready, {until - time.monotonic():.0f} s before the last call", flush=True)
            elif child.poll() is not None:
                print(f"{name} died with {child.returncode}, see {log_of(out, name).name}", flush=True)
                children.pop(name)
                if ENGINES[name][1]:
                    raise RuntimeError(f"{name} died")
    return ready


def start(name: str, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The engine in a process of its own."""
    work = args.models / name.replace(" ", "-")
    environment = os.environ | {
        "VLLM_DISABLED_KERNELS": ENGINES[name][2],
        "VLLM_CACHE_ROOT": str(work / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.bench_vllm", "--child", name]
    command += ["--out", str(args.out), "--models", str(args.models)]
    log = log_of(args.out, name).open("wb")
    child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    time.sleep(1)  # engines that start in the same moment misjudge free memory
    return child


def end(child: subprocess.Popen[bytes]) -> None:
    """Stop an engine and vLLM's own processes, which outlive their parent."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def flag(out: Path, name: str, kind: str) -> Path:
    return out / f"{name.replace(' ', '-')}.{kind}"


def log_of(out: Path, name: str) -> Path:
    return flag(out, name, "log")


def measure(name: str, models: Path, out: Path) -> None:
    """One engine: start, wait for the word, measure, leave."""
    from vllm import LLM

    kind, ours, _ = ENGINES[name]
    begun = time.monotonic()
    engine = LLM(
        model=str(models / kind),
        quantization="lowbit" if ours else None,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=int(2.5 * 2**30),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [1, 8]},
    )
    row: dict[str, Any] = {
        "engine": name,
        "model": kind,
        "layers": LLAMA_2_7B.layers,
        "start_s": time.monotonic() - begun,
    }
    flag(out, name, "ready").touch()
    while not flag(out, name, "go").exists():
        time.sleep(0.05)
    row |= {"greedy": greedy(engine), "forced": forced(engine)}
    every = {batch: steps_ms(engine, batch) for batch in (1, 8)}
    row |= {"step_ms": {batch: statistics.median(steps) for batch, steps in every.items()}, "steps_ms": every}
    flag(out, name, "json").write_text(json.dumps(row))
    os._exit(0)  # vLLM's own shutdown takes seconds


def prompts(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Random tokens."""
    dice = random.Random(seed)
    return [
        {"prompt_token_ids": [dice.randrange(5, LLAMA_2_7B.vocabulary) for _ in range(LENGTH)]} for _ in range(count)
    ]


def greedy(engine: Any) -> list[list[list[Any]]]:
    """For each of 8 prompts, [token, log-probability, that of the second likeliest] at each step."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=2, detokenize=False)
    rows = []
    for output in engine.generate(prompts(8, 1), sampling, use_tqdm=False):
        completion = output.outputs[0]
        steps = zip(completion.token_ids, completion.logprobs, strict=True)
        rows.append([[token, *sorted((e.logprob for e in entry.values()), reverse=True)[:2]] for token, entry in steps])
    return rows


def forced(engine: Any) -> list[list[float]]:
    """Log-probabilities of the tokens of 4 random prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate(prompts(4, 2), sampling, use_tqdm=False)
    return [[e[t].logprob for t, e in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)] for o in outputs]


def steps_ms(engine: Any, batch: int) -> list[float]:
    """Milliseconds of a decoding step at a batch size, five times."""
    from vllm import SamplingParams

    def run(tokens: int, seed: int) -> float:
        sampling = SamplingParams(
            temperature=0, min_tokens=tokens, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begun = time.perf_counter()
        engine.generate(prompts(batch, seed), sampling, use_tqdm=False)
        return time.perf_counter() - begun

    run(8, 0)
    return [1000 * (run(LENGTH, seed) - run(1, seed)) / (LENGTH - 1) for seed in range(5)]


def compare(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each engine against the first of the same checkpoint."""
    first: dict[str, dict[str, Any]] = {}
    for row in results:
        base = first.setdefault(row["model"], row)
        if base is row:
            continue
        same, gaps = [], []
        for mine, other in zip(row["greedy"], base["greedy"], strict=True):
            split = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a[0] != b[0]), None)
            same.append(len(mine) if split is None else split)
            if split is not None:
                gaps.append(min(mine[split][1] - mine[split][2], other[split][1] - other[split][2]))
        pairs = [(a, b) for x, y in zip(row["forced"], base["forced"], strict=True) for a, b in zip(x, y, strict=True)]
        before_split = zip(row["greedy"], base["greedy"], same, strict=True)
        steps = [(a[1], b[1]) for x, y, n in before_split for a, b in zip(x[:n], y[:n], strict=True)]
        yield {
            "compared": row["engine"],
            "with": base["engine"],
            "greedy_tokens_equal": same,
            "of": len(row["greedy"][0]),
            "gap_of_the_two_likeliest_where_they_part": [round(gap, 5) for gap in gaps],
            "largest_difference_of_greedy_logprobs": max((abs(a - b) for a, b in steps), default=0.0),
            "largest_difference_of_forced_logprobs": max(abs(a - b) for a, b in pairs),
            "mean_difference_of_forced_logprobs": statistics.mean(abs(a - b) for a, b in pairs),
        }


if __name__ == "__main__":
    main()
