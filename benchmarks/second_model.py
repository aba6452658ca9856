"""A second small model to measure methods on: another family, width and depth than the demo's, trained here in minutes.

    python -m benchmarks.second_model demo --text FILE --out DIR [--student pruned] [--steps 2000] [--device cuda]

It has the demo's tokenizer, and begins as one of STUDENTS:

    qwen3   a Qwen3 of 10 blocks with a hidden size of 512 (norms of queries and keys, 8 heads, 4 of keys and values),
            with random weights. Minutes of training teach it little, and 4 bits hardly hurt it.
    pruned  20 of the demo's 30 blocks as a Mistral, with the 512 of its 576 channels that carry the most energy, and 12
            heads in place of 9: every row is a multiple of 256, as the blocks of K-quants want it.

It learns the demo's distribution (Kullback-Leibler divergence) on the first 60% of FILE, on the calibration part of the
builtin documentation, and on the docstrings of the standard library and a few packages that are installed; so the rest
of FILE and the held-out documentation are new to it. It is no model to use. Its weights are bfloat16 as trained; the
demo's were rounded to 4 bits once. One seed and one set of packages give one model, up to the order of sums on the
device.
"""

import argparse
import importlib.util
import json
import math
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.bench_quality import SHARE
from lowbit.calibrate.data import builtin_text
from lowbit.models.source import open_source

PACKAGES = ("torch", "transformers", "numpy")
LEFT_OUT = {"pydoc_data", "test", "tests", "site-packages", "dist-packages"}  # the topics are what is scored
DOCSTRING = re.compile(r'"""(.{200,}?)"""', re.DOTALL)
MOST = 12_000_000  # characters of docstrings
LENGTH, ROWS, SEED = 512, 32, 0
RATES, WARM_UP = {"qwen3": 1.5e-3, "pruned": 5e-4}, 100
HIDDEN = 512  # channels of either student
CUT_BLOCKS = range(10, 20)  # of the teacher, in the pruned student
NOISE = 0.02  # of a copied head, relative to its weights, so that it parts from the first


def main() -> None:
    parser = argparse.ArgumentParser(description="train a small model on the demo's distribution")
    parser.add_argument("teacher")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", choices=RATES, default="qwen3")
    parser.add_argument("--steps", type=int, default=2000, help="of 16384 tokens")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    source = open_source(args.teacher)
    tokenizer = source.tokenizer()
    text = args.text.read_text(encoding="utf-8")
    pieces = [text[: int(SHARE * len(text))], builtin_text("calibration"), *docstrings()]
    ids = torch.tensor([token for row in tokenizer(pieces, verbose=False).input_ids for token in row])
    print(f"{len(ids)} tokens of {len(pieces)} texts", flush=True)
    teacher: Any = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.bfloat16)
    teacher = teacher.to(args.device).eval()
    student: Any = (
        pruned(teacher, ids[: 8 * LENGTH].view(8, LENGTH))
        if args.student == "pruned"
        else Qwen3ForCausalLM(config(source.vocabulary, tokenizer))
    )
    learn(student.to(args.device), teacher, ids, args.steps, RATES[args.student])
    student.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps({"tokens": len(ids), "steps": args.steps, "seed": SEED}))


@torch.no_grad()
def pruned(teacher: Any, ids: Tensor) -> MistralForCausalLM:
    """A Mistral with the `teacher`'s channels of most energy on `ids` (B, T), without CUT_BLOCKS."""
    old, device = teacher.config, teacher.device
    states = teacher(ids.to(device), output_hidden_states=True, use_cache=False).hidden_states
    energy = sum(each.float().square().mean((0, 1)) / each.float().square().mean() for each in states)
    kept = energy.topk(HIDDEN).indices.sort().values
    scale = math.sqrt(old.hidden_size / HIDDEN)  # the root of a mean over fewer channels
    heads = old.num_attention_heads // old.num_key_value_heads
    blocks = [block for at, block in enumerate(teacher.model.layers) if at not in CUT_BLOCKS]
    shape = {key: getattr(old, key) for key in ("vocab_size", "intermediate_size", "head_dim", "rms_norm_eps")}
    new = MistralForCausalLM(
        MistralConfig(
            **shape,
            hidden_size=HIDDEN,
            num_hidden_layers=len(blocks),
            num_attention_heads=old.num_attention_heads + heads,
            num_key_value_heads=old.num_key_value_heads + 1,
            max_position_embeddings=2048,
            rope_parameters=old.rope_parameters,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=old.bos_token_id,
            eos_token_id=old.eos_token_id,
        )
    ).to(device)
    new.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight[:, kept])
    new.model.norm.weight.copy_(teacher.model.norm.weight[kept] * scale)
    for block, source in zip(new.model.layers, blocks, strict=True):
        for name, parameter in source.named_parameters():
            value = parameter.float()
            if name.endswith("layernorm.weight"):
                value = value[kept] * scale
            elif name.startswith(("self_attn.o_proj", "mlp.down_proj")):
                value = value[kept]
            else:
                value = value[:, kept]
            block.get_parameter(name).copy_(with_head(name, value, heads * old.head_dim, old.head_dim))
    return new


def with_head(name: str, value: Tensor, group: int, size: int) -> Tensor:
    """The weight `value` of a block with its first head of keys and values, and the queries of that head, once more.

    group, size  rows of the queries of a head of keys, and rows of that head

    Both copies together return what the one did, up to NOISE.
    """
    part = name.removeprefix("self_attn.").removesuffix(".weight")
    if part not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return value
    if part == "o_proj":
        first = value[:, :group] / 2
        return torch.cat([first, value[:, group:], first * (1 + NOISE * torch.randn_like(first))], 1)
    first = value[: group if part == "q_proj" else size]
    return torch.cat([value, first * (1 + NOISE * torch.randn_like(first))])


def config(vocabulary: int, tokenizer: Any) -> Qwen3Config:
    """The shape of the Qwen3: 56 million parameters, of which 25 are embeddings."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def docstrings() -> Iterator[str]:
    """The docstrings of modules, one text each, in the order of paths, until there are MOST characters."""
    left = MOST
    places = [Path(sysconfig.get_path("stdlib"))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        places += [Path(spec.origin).parent] if spec and spec.origin else []
    for place in places:
        for path in sorted(place.rglob("*.py")):
            if LEFT_OUT.isdisjoint(path.relative_to(place).parts):
                found = DOCSTRING.findall(path.read_text(encoding="utf-8", errors="ignore"))
                if found and left > 0:
                    left -= sum(map(len, found))
                    yield "\n\n".join(found)


def learn(student: Any, teacher: Any, ids: Tensor, steps: int, most: float) -> None:
    """Train `student` on the teacher's distribution over random windows of `ids`, at a rate of at most `most`."""
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW(student.parameters(), lr=most, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    generator, begun = torch.Generator().manual_seed(SEED), time.monotonic()
    for step in range(steps):
        rate = most * min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate
        starts = torch.randint(len(ids) - LENGTH, (ROWS,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts]).to(device)
        loss = divergence(student, teacher, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats, {time.monotonic() - begun:.0f} s", flush=True)


def divergence(student: Any, teacher: Any, batch: Tensor) -> Tensor:
    """The mean divergence of the student's next-token distributions from the teacher's, in nats."""
    with torch.no_grad():
        wanted = teacher(batch, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    with torch.autocast(batch.device.type, torch.bfloat16):
        found = student(batch, use_cache=False).logits.flatten(0, 1)
    return torch.nn.functional.kl_div(found.log_softmax(-1), wanted, log_target=True, reduction="batchmean")


if __name__ == "__main__":
    main()
