"""The estimates that budgets are spent by, against the divergence that is measured.

    python -m benchmarks.bench_mixture demo --text FILE [--device cuda] [--every 2] [--windows 8]

The estimate is that of calibrate/budget.py, from at most 2048 tokens of the builtin documentation. The measurement is
the mean Kullback-Leibler divergence of the whole model's output, over windows of 512 tokens of FILE, a text of another
family. Rows go to benchmarks/results/mixture.jsonl: the whole model in a mixture within 4.5 bits and in single schemes
of at most that, all rounded to nearest; then, with one fused set alone rounded, the rank correlation of both over sets,
for each scheme and for all together.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowbit.calibrate.budget import spend
from lowbit.calibrate.data import calibration_tokens
from lowbit.calibrate.job import Job, prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.mixtures import Option
from lowbit.models.source import open_source
from lowbit.quant.algos.clip import round_plainly
from lowbit.quant.naming import fused_set
from lowbit.quant.scheme import Scheme, name_of, parse_scheme

RESULTS = Path(__file__).with_name("results") / "mixture.jsonl"
CANDIDATES = ("int3-g64", "int4-g64", "int4-g32", "int6-g64", "int8", "16bit")
SINGLES = ("int4-g64", "int4-g32", "mxfp4-a16", "nvfp4-a16")  # of at most TARGET bits
TARGET, LENGTH = 4.5, 512


class Measurer:
    """The whole model in float32 on a device, and its logits on the windows of a text."""

    def __init__(self, job: Job, text: str, windows: int, device: str) -> None:
        source, self.job = job.source, job
        self.model: Any = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32).to(device).eval()
        ids = source.tokenizer()(text, return_tensors="pt").input_ids[0, : windows * LENGTH]
        self.ids = ids.view(windows, LENGTH).to(device)
        self.exact = self._scores()

    def _scores(self) -> Tensor:
        return torch.cat([self.model(row[None], use_cache=False).logits.log_softmax(-1) for row in self.ids])

    def divergence(self, chosen: Mapping[str, Scheme | None]) -> tuple[float, float]:
        """Mean divergence in nats per token with linears rounded to `chosen`, and its standard error over windows."""
        saved = {name: self.weight(name).data.clone() for name, scheme in chosen.items() if scheme is not None}
        for name, w in saved.items():
            scheme = chosen[name]
            assert scheme is not None
            self.weight(name).data.copy_(round_plainly(w, scheme, self.job.scale_dtype).dequantize())
        scores = self._scores()
        for name, w in saved.items():
            self.weight(name).data.copy_(w)
        by_window = (self.exact.exp() * (self.exact - scores)).sum(-1).double().mean(-1)
        return float(by_window.mean()), float(by_window.std() / len(by_window) ** 0.5)

    def weight(self, name: str) -> nn.Parameter:
        """The weight of a linear."""
        return self.model.get_submodule(name).weight


def rank_correlation(one: Iterable[float], other: Iterable[float]) -> float:
    """Spearman's coefficient."""
    ranks = [np.argsort(np.argsort(list(values))) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    """All rows of a model."""
    parser = argparse.ArgumentParser(description="estimated and measured divergence of schemes")
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=int, default=1, help="of the sets, only each n-th; 0 for none")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4, help="windows of 512 tokens for the estimate")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    source = open_source(args.model)
    recipe = complete_recipe({"method": "rtn", "scheme": "int4-g64", "target_bits": TARGET, "candidates": CANDIDATES})
    tokens = calibration_tokens("builtin", source.tokenizer(), args.samples, LENGTH, recipe.seed)
    job = spend(prepare(source, recipe, args.device), tokens)
    assert job.mixture is not None
    measurer = Measurer(job, args.text.read_text(encoding="utf-8"), args.windows, args.device)
    about = {"model": args.model, "text": args.text.stem, "windows": args.windows, "device": args.device}
    about |= {"commit": args.commit, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    with args.results.open("a", encoding="utf-8") as file:
        for row in (*wholes(job, measurer), *(ranks(job, measurer, args.every) if args.every else ())):
            file.write(json.dumps(row | about) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)


def wholes(job: Job, measurer: Measurer) -> Iterator[dict[str, Any]]:
    """The whole model in the mixture, then in each single scheme."""
    assert job.mixture is not None
    mixture = {"estimated": round(job.mixture.divergence, 5), "estimated_se": round(job.mixture.error, 5)}
    for name in ("mixture", *SINGLES):
        shapes = {linear: [(spec.n, spec.k)] for linear, spec in job.linears.items()}
        single = None if name == "mixture" else parse_scheme(name)
        schemes = {
            linear: single.fitting(shapes[linear]) if single else job.plan.schemes.get(linear) for linear in shapes
        }
        widths = (
            (scheme.bits_per_weight(spec.k) if scheme else 16, spec)
            for scheme, spec in zip(schemes.values(), job.linears.values(), strict=True)
        )
        bits = sum(width * spec.n * spec.k for width, spec in widths)
        value, error = measurer.divergence(schemes)
        row = {"scheme": name, "bits": round(bits / sum(n * k for [(n, k)] in shapes.values()), 4)}
        row |= {"measured": round(value, 5), "measured_se": round(error, 5)}
        yield row | (mixture if single is None else {})


def ranks(job: Job, measurer: Measurer, every: int) -> Iterator[dict[str, Any]]:
    """Rank correlations by scheme and over all."""
    assert job.mixture is not None
    pairs: dict[str, list[tuple[Option, float]]] = {}
    for key in list(job.mixture.options)[::every]:
        members = [name for name in job.linears if fused_set(name) == key]
        for option in job.mixture.options[key]:
            if option.scheme is not None:
                measured, _ = measurer.divergence(dict.fromkeys(members, option.scheme))
                pairs.setdefault(name_of(option.scheme), []).append((option, measured))
    pairs["all"] = [pair for found in pairs.values() for pair in found]
    for scheme, found in pairs.items():
        if len(found) > 2:
            estimates, measured = [option.divergence for option, _ in found], [value for _, value in found]
            row = {"scheme": scheme, "sets": len(found), "rank": round(rank_correlation(estimates, measured), 4)}
            row |= {"estimated": round(sum(estimates), 5), "measured": round(sum(measured), 5)}
            yield row


if __name__ == "__main__":
    main()
