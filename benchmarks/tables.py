"""The tables of figures in the documents, made from the rows in benchmarks/results.

python -m benchmarks.tables            write every table anew, between its marks
python -m benchmarks.tables --check    only say what would change, and fail if something would

A document has <!-- table: NAME --> and <!-- end of table -->, each on its own line. The lines between them come from
TABLES[NAME]. tests/house/test_figures.py compares the documents with it.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path
from statistics import median
from string import ascii_uppercase
from typing import Any

from lowbit.engine.shapes import METHODS as DECODED
from lowbit.engine.shapes import SHAPES
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.engine import FusedLinear
from lowbit.export.engines.table import engines_for
from lowbit.export.engines.verdicts import describe, verdicts_of
from lowbit.quant.scheme import parse_scheme

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->\n)", re.DOTALL)

Row = Mapping[str, Any]
ROUGH = "0ceb7e1"  # the commit of ENGINE's rows that have no mark
H100, H200, CORES = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "2 CPU cores"


@cache
def rows(stem: str) -> tuple[Row, ...]:
    """The rows of a file of benchmarks/results, in the order in which they were measured."""
    lines = (ROOT / "benchmarks" / "results" / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def matching(stem: str, **wanted: Any) -> list[Row]:
    return [row for row in rows(stem) if all(row.get(key) == value for key, value in wanted.items())]


def first(stem: str, **wanted: Any) -> Row:
    """The first row with these values: a sweep measures its main shape again beside each variant."""
    found = matching(stem, **wanted)
    if not found:
        raise LookupError(f"no row of {stem}.jsonl has {wanted}")
    return found[0]


def fixed(value: float, places: int) -> str:
    """`value` with so many decimals, halves rounded up as on paper."""
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))


def three_digits(value: float) -> str:
    """`value` with one decimal below 100."""
    return fixed(value, 0 if value >= 99.95 else 1)


def table(head: str, lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; `head` names the columns, divided by |."""
    names = [name.strip() for name in head.split("|")]
    return "".join((_line(names), "|" + "---|" * len(names) + "\n", *map(_line, lines)))


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n"


# Loss


def by_hand(method: str, calibration: str | None, by: str = "lowbit") -> dict[str, Any]:
    """The columns of the first rows, from before bench_quality: another name for each text, and no machine."""
    return {"method": method, "calibration": calibration, "by": by, "device": None}


def on(device: str, method: str, calibration: str = "text", by: str = "lowbit") -> dict[str, Any]:
    return {"method": method, "calibration": calibration, "by": by, "device": device}


PEER, ROUND = "llm-compressor 0.14.0.1", "AutoRound 0.16.1"
RESULTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("bfloat16", "", by_hand("none", None, "")),
    ("`int8`, per channel", "none", by_hand("int8", None)),
    ("`awq` int4-g64", "builtin, 128 x 512", by_hand("awq", "builtin 128 x 512, seed 42")),
    ("`awq` int4-g64", "builtin, 32 x 512", by_hand("awq", "builtin 32 x 512, seed 42")),
    (
        "llm-compressor 0.14 AWQ, int4-g64",
        "the same 32 x 512 tokens",
        by_hand("awq", "builtin 32 x 512, seed 42", PEER),
    ),
    ("`smoothquant` W8A8", "WikiText-2's other part, 128 x 512", on(CORES, "smoothquant")),
    ("the same, `--rounder gptq --distill-steps 24`", "the same", on(CORES, "smoothquant-tuned")),
    (
        "llm-compressor 0.14 SmoothQuant, GPTQ, W8A8",
        "the same tokens",
        on(CORES, "llm-compressor-smoothquant", by=PEER),
    ),
    ("bfloat16, on the H100", "", {}),
    ("`gptq` int4-g64", "WikiText-2's other part, 128 x 512", on(H100, "gptq")),
    ("llm-compressor 0.14 GPTQ, int4-g64", "the same tokens", on(H100, "llm-compressor-gptq", by=PEER)),
    ("`best --distill-codes` int4-g64, on an H200", "the same", on(H200, "best-codes")),
    ("`best --own-samples 128` int4-g64, on an H200", "the same", on(H200, "best-own")),
    ("`best` int4-g64, as it was", "the same", on(H100, "best")),
    ("AutoRound 0.16.1, 20 iterations, int4-g64", "the same tokens", on(H100, "autoround-20", by=ROUND)),
    ("AutoRound 0.16.1, 200 iterations, int4-g64", "the same tokens", on(H100, "autoround-200", by=ROUND)),
    ("`best` int4-g64, as it was", "builtin, 128 x 512", on(H100, "best", "builtin")),
    ("AutoRound 0.16.1, 20 iterations, int4-g64", "the same tokens", on(H100, "autoround-20", "builtin", ROUND)),
)
ASIDE = "text"  # WikiText-2's other part, as bench_quality calls it
METHODS: tuple[tuple[str, str, str, str], ...] = (
    ("`gptq`", H100, "gptq", "lowbit"),
    ("llm-compressor 0.14, GPTQ", H100, "llm-compressor-gptq", PEER),
    ("`signround --iters 20`", H100, "signround", "lowbit"),
    ("AutoRound 0.16.1, 20 iterations", H100, "autoround-20", ROUND),
    ("AutoRound 0.16.1, 200 iterations", H100, "autoround-200", ROUND),
    ("`best`, as it was", H100, "best", "lowbit"),
    ("`gptq --transforms rotate`", CORES, "gptq-rotated", "lowbit"),
    ("`best --transforms rotate`", CORES, "best-rotated", "lowbit"),
    ("`gptq --asym`", H100, "gptq-asymmetric", "lowbit"),
    ("`best --asym`, as it was", H100, "best-asymmetric", "lowbit"),
    ("`best --target-bits 4.75`, as it was", H100, "best-mixed", "lowbit"),
    ("W8A8: `smoothquant`", CORES, "smoothquant", "lowbit"),
    ("W8A8: llm-compressor, SmoothQuant 0.8, GPTQ", CORES, "llm-compressor-smoothquant", PEER),
    ("W8A8: `smoothquant --rounder gptq`", H100, "smoothquant-gptq", "lowbit"),
    ("W8A8: that, `--distill-steps 24`", CORES, "smoothquant-tuned", "lowbit"),
)
BOLD = "`best`, as it was"
# Schemes of weights, each with ours and other toolkits' methods: machine, method, toolkit.
CODES = "`best --distill-codes`"
GRIDS: tuple[tuple[str, str, str, str, str], ...] = (
    ("int4-g64", "`best`", H200, "best", "lowbit"),
    ("int4-g64", CODES, H200, "best-codes", "lowbit"),
    ("int4-g64", "the same, `--first gptq`", H200, "best-from-gptq-codes", "lowbit"),
    ("int4-g64", "AutoRound 0.16.1, 200 iterations *", H100, "autoround-200", ROUND),
    ("int3-g64", "AutoRound 0.16.1, 200 iterations, extended", H200, "autoround-w3g64-ext", ROUND),
    ("int3-g128", "`best --rounder anneal`", H200, "w3-anneal", "lowbit"),
    ("int3-g128", "the same, `--distill-codes`", H200, "w3-anneal-codes", "lowbit"),
    ("int3-g128", "AutoRound 0.16.1, 200 iterations, extended", H200, "autoround-w3-ext", ROUND),
    ("int2-g64", "`best --rounder anneal`", H200, "w2-anneal", "lowbit"),
    ("int2-g64", "the same, `--distill-codes`", H200, "w2-anneal-codes", "lowbit"),
    ("int2-g64", "AutoRound 0.16.1, 200 iterations, extended", H200, "autoround-w2-ext", ROUND),
    ("int4-g32", "`gptq`", H200, "gptq-int4-g32", "lowbit"),
    ("int4-g32", "`best`", H200, "best-int4-g32", "lowbit"),
    ("uint4-g64", "`best`", H200, "best-asymmetric", "lowbit"),
    ("4.5 bits, mixed", "`gptq`", H200, "gptq-mixture", "lowbit"),
    ("4.5 bits, mixed", "`best`", H200, "best-mixture", "lowbit"),
    ("nvfp4-a16", "`gptq`", H200, "gptq-nvfp4-a16", "lowbit"),
    ("nvfp4-a16", "`best`", H200, "nvfp4-best", "lowbit"),
    ("nvfp4-a16", CODES, H200, "nvfp4-codes", "lowbit"),
    ("nvfp4-a16", "llm-compressor 0.14, GPTQ", H200, "llm-compressor-nvfp4-gptq", PEER),
    ("nvfp4-a16", "llm-compressor 0.14, to nearest", H200, "llm-compressor-nvfp4", PEER),
    ("mxfp4-a16", "`gptq`", H200, "gptq-mxfp4-a16", "lowbit"),
    ("mxfp4-a16", "`best`", H200, "mxfp4-best", "lowbit"),
    ("mxfp4-a16", CODES, H200, "mxfp4-codes", "lowbit"),
    ("mxfp4-a16", "llm-compressor 0.14, GPTQ", H200, "llm-compressor-mxfp4-gptq", PEER),
    ("mxfp4-a16", "llm-compressor 0.14, to nearest", H200, "llm-compressor-mxfp4", PEER),
    ("fp8", "`fp8`", H200, "fp8", "lowbit"),
    ("fp8", "`best`", H200, "fp8-best", "lowbit"),
    ("fp8", "llm-compressor 0.14, FP8_DYNAMIC", H200, "llm-compressor-fp8", PEER),
    ("int8", "`int8`", H200, "int8", "lowbit"),
    ("int8", "`int8 --head int8`", H200, "int8-head", "lowbit"),
    ("int8", "`gptq`", H200, "gptq-int8", "lowbit"),
    ("int8", "`gptq --head int8`", H200, "gptq-int8-head", "lowbit"),
    ("int8", "`int8 --kv-cache fp8`", H200, "int8-kv", "lowbit"),
    ("int8", "`int8 --kv-cache fp8-head`", H200, "int8-kv-head", "lowbit"),
    ("int8", "`int8 --kv-cache fp8`, tuned", H200, "int8-kv-tuned", "lowbit"),
)
# Methods with the paired difference to another one on the same windows: weights, label, method, the other's label.
PAIRED: tuple[tuple[str, str, str, str], ...] = (
    ("int8", "`gptq --head int8`", "gptq-int8-head", "`gptq`"),
    ("4.5 bits, mixed", "`gptq`", "gptq-mixture", "nvfp4-a16, `gptq`"),
)
LATER = 16  # windows of each text before those of `codes`
TUNED: tuple[tuple[str, str, str, str], ...] = (
    ("demo", "int4-g64", "best", "best-codes"),
    ("demo", "int3-g128", "w3-anneal", "w3-anneal-codes"),
    ("demo", "int2-g64", "w2-anneal", "w2-anneal-codes"),
    ("demo", "nvfp4-a16", "nvfp4-best", "nvfp4-codes"),
    ("second", "int4-g64", "best", "best-codes"),
)


# Ours and other toolkits' beside one another on all windows, by an H200: model, weights, label, method, toolkit.
OWN, OWN_CODES = "`best`", "`best --distill-codes`"  # with --own-samples 128
ANNEALED, FINEST, LONG = "annealed", "`finest`", "`finest`, on more text"  # with tuned codes
LLAMA = "llama.cpp of llama-cpp-python 0.3.36"
BESIDE: tuple[tuple[str, str, str, str, str], ...] = (
    ("demo", "int4-g64", OWN, "best-own", "lowbit"),
    ("demo", "int4-g64", OWN_CODES, "best-own-codes", "lowbit"),
    ("demo", "int4-g64", ANNEALED, "best-anneal-own-codes-160", "lowbit"),
    ("demo", "int4-g64", FINEST, "finest", "lowbit"),
    ("demo", "int4-g64", LONG, "finest-long", "lowbit"),
    ("demo", "int4-g64", "AutoRound, 200", "autoround-200", ROUND),
    ("demo", "int3-g64", OWN, "w3g64-anneal-own", "lowbit"),
    ("demo", "int3-g64", OWN_CODES, "w3g64-anneal-own-codes", "lowbit"),
    ("demo", "int3-g64", "AutoRound, 200, extended", "autoround-w3g64-ext", ROUND),
    ("demo", "int3-g128", ANNEALED, "w3-anneal-own-codes-160", "lowbit"),
    ("demo", "int3-g128", FINEST, "w3-finest", "lowbit"),
    ("demo", "int3-g128", LONG, "w3-finest-long", "lowbit"),
    ("demo", "int3-g128", "AutoRound, 200, extended", "autoround-w3-ext", ROUND),
    ("demo", "int2-g64", ANNEALED, "w2-anneal-own-codes-160", "lowbit"),
    ("demo", "int2-g64", FINEST, "w2-finest", "lowbit"),
    ("demo", "int2-g64", LONG, "w2-finest-long", "lowbit"),
    ("demo", "int2-g64", "AutoRound, 200, extended", "autoround-w2-ext", ROUND),
    ("demo", "nvfp4-a16", OWN, "nvfp4-best-own", "lowbit"),
    ("demo", "nvfp4-a16", OWN_CODES, "nvfp4-best-own-codes", "lowbit"),
    ("demo", "nvfp4-a16", ANNEALED, "nvfp4-anneal-own-codes-160", "lowbit"),
    ("demo", "nvfp4-a16", "AutoRound, 200", "autoround-nvfp4", ROUND),
    ("demo", "mxfp4-a16", OWN_CODES, "mxfp4-best-own-codes", "lowbit"),
    ("demo", "mxfp4-a16", FINEST, "mxfp4-finest", "lowbit"),
    ("demo", "mxfp4-a16", LONG, "mxfp4-finest-long", "lowbit"),
    ("demo", "mxfp4-a16", "AutoRound, 200", "autoround-mxfp4", ROUND),
    ("demo", "mxfp4-a16", "llm-compressor, GPTQ", "llm-compressor-mxfp4-gptq", PEER),
    ("demo", "fp8", OWN, "fp8-best-own", "lowbit"),
    ("demo", "fp8", "codes, 160 steps", "fp8-best-own-codes-160", "lowbit"),
    ("demo", "fp8", ANNEALED, "fp8-anneal-own-codes-160", "lowbit"),
    ("demo", "fp8", FINEST, "fp8-finest", "lowbit"),
    ("demo", "fp8", "llm-compressor", "llm-compressor-fp8", PEER),
    ("pruned-400", "int4-g64", FINEST, "finest", "lowbit"),
    ("pruned-400", "int4-g64", "AutoRound, 200", "autoround-200", ROUND),
    ("pruned-400", "int3-g128", FINEST, "w3-finest", "lowbit"),
    ("pruned-400", "int3-g128", "AutoRound, 200, extended", "autoround-w3-ext", ROUND),
    ("pruned-400", "int2-g64", LONG, "w2-finest-long", "lowbit"),
    ("pruned-400", "int2-g64", "AutoRound, 200, extended", "autoround-w2-ext", ROUND),
    ("pruned-400", "nvfp4-a16", FINEST, "nvfp4-finest", "lowbit"),
    ("pruned-400", "nvfp4-a16", "AutoRound, 200", "autoround-nvfp4", ROUND),
)
# The same of GGUF: llama.cpp's mixtures.
LARGER = {("demo", "q3_k_m", "AutoRound, 200"): "AutoRound, 200, in 8% more bytes"}
QUANTIZERS = tuple(
    (model, weights, LARGER.get((model, weights, label), label), method.format(weights), by)
    for model in ("demo", "pruned-400")
    for weights in ("q4_k_m", "q3_k_m", "q2_k", "q2_k_s")
    for label, method, by in (
        ("`best`", "{}-best", "lowbit"),
        (OWN_CODES, "{}-best-own-codes", "lowbit"),
        (ANNEALED, "{}-anneal-own-codes-160", "lowbit"),
        ("llama-quantize", "llama-{}", LLAMA),
        ("AutoRound, to nearest", "autoround-{}-0", ROUND),
        ("AutoRound, 200", "autoround-{}", ROUND),
    )
)


def demo_rows(**wanted: Any) -> list[Row]:
    """The matching rows of the demo model on the usual windows, the first of each text."""
    return [row for row in matching("quality", skipped=None, **wanted) if row["model"].startswith("demo")]


def scored(wanted: Mapping[str, Any], text: str) -> Row | None:
    """The demo's row on the text whose name begins with `text`, in upper or lower case."""
    found = [row for row in demo_rows(**wanted) if row["text"].lower().startswith(text)]
    return found[-1] if found else None


def loss(row: Row | None) -> str:
    """+0.089 ± 0.006: nats a token above the unquantized model, as many decimals as the error needs."""
    if row is None or row["method"] == "none":
        return ""
    mean, error = row["delta_nll"], row["delta_nll_se"]
    places = 4 if mean < 0.005 else 3
    return f"{'+' if mean >= 0 else ''}{fixed(mean, places)} ± {fixed(error, places)}"


def results() -> str:
    lines = []
    for label, calibrated, wanted in RESULTS:
        found = [scored(wanted or on(H100, "best"), text) for text in ("wikitext", "builtin")]
        cells = [label, calibrated]
        for row in found:
            assert row is not None, label
            cells += [fixed(row["perplexity"], 3), loss(row)] if wanted else [fixed(row["base_perplexity"], 3), ""]
        lines.append(cells)
    return table("weights | calibration | WikiText-2 | loss | builtin held-out | loss", lines)


def methods() -> str:
    """A line's first cells are of its own machine, those on the cores marked; the others are of the H100."""
    lines = []
    for label, device, method, by in METHODS:
        star = " *" if device == CORES else ""
        own = [loss(scored(on(device, method, ASIDE, by), text)) + star for text in ("wikitext", "builtin")]
        other = [loss(scored(on(H100, method, "builtin", by), text)) for text in ("wikitext", "builtin")]
        cells = [f"**{cell}**" if label == BOLD else cell for cell in own + other]
        lines.append([label, *cells])
    head = "calibrated on | WikiText-2 | | documentation | "
    return table(head, [["scored on", "WikiText-2", "documentation", "WikiText-2", "documentation"], *lines])


def measured(wanted: Mapping[str, Any]) -> list[str]:
    """The losses on both texts; empty if none was measured."""
    found = [loss(scored(wanted, text)) for text in ("wikitext", "builtin")]
    return found if any(found) else []


def grids() -> str:
    lines, before = [], ""
    for scheme, label, device, method, by in GRIDS:
        found = measured(on(device, method, ASIDE, by))
        if found:
            lines.append(["" if scheme == before else scheme, label, *found])
            before = scheme
    return table("weights | by | WikiText-2 | documentation", lines)


def paired() -> str:
    """The differences of two methods on the same windows."""
    lines = []
    for weights, label, method, other in PAIRED:
        for text, kind in (("wikitext", "WikiText-2"), ("builtin", "documentation")):
            row = scored(on(H200, method, ASIDE), text)
            if row is not None and "against" in row:
                pairs = [(row[f"{key}_against"], row[f"{key}_se_against"]) for key in ("delta_nll", "kl")]
                cells = [f"{mean:+.4f} ± {error:.4f}" for mean, error in pairs]
                lines.append([weights, label, other, kind, str(row["windows"]), *cells])
    return table("weights | by | less | text | windows | loss | divergence", lines)


def mixtures() -> str:
    """The divergence of the demo model rounded to nearest, in a mixture and in single schemes."""
    lines = [
        [row["scheme"], fixed(row["bits"], 2), f"{fixed(row['measured'], 3)} ± {fixed(row['measured_se'], 3)}"]
        for row in matching("mixture", model="demo")
    ]
    return table("weights | bits a weight | divergence, nats", lines)


def codes() -> str:
    """Loss and divergence on later windows without and with tuned codes."""
    lines = []
    for model, scheme, *methods in TUNED:
        for calibration in ("text", "builtin"):
            for method, label in zip(methods, ("no", "yes"), strict=True):
                wanted = on(H200, method, calibration) | {"model": model, "skipped": LATER}
                found = sorted(matching("quality", **wanted), key=lambda row: row["text"], reverse=True)
                if found:
                    cells = [cell for row in found for cell in (loss(row), divergence(row))]
                    lines.append([model, scheme, KINDS[calibration], label, *cells])
    head = "model | weights | calibrated on | codes tuned | WikiText-2: loss | divergence | documentation: loss | "
    return table(head + "divergence", lines)


KINDS = {"text": "WikiText-2", "builtin": "documentation"}


def beside(methods: Iterable[tuple[str, str, str, str, str]] = BESIDE) -> str:
    """Loss and divergence on all windows, the usual and the later ones together."""
    lines, before = [], ("", "")
    for model, weights, label, method, by in methods:
        found = [row for row in matching("quality", model=model, **on(H200, method, ASIDE, by)) if "kl" in row]
        texts = [[row for row in found if row["text"].lower().startswith(text)] for text in ("wikitext", "builtin")]
        if all(texts):
            each = [pooled(part) for part in texts]
            counts = " / ".join(str(sum(row["windows"] for row in part)) for part in texts)
            shown = ("" if before[0] == model else model, "" if before == (model, weights) else weights)
            lines.append([*shown, label, counts, *(cell for row in each for cell in (loss(row), divergence(row)))])
            before = model, weights
    head = "model | weights | by | windows | WikiText-2 | divergence | documentation | divergence"
    return table(head, lines)


def gguf() -> str:
    """The demo's perplexity by llama.cpp and by us, as we compute and with inputs rounded as llama.cpp rounds them."""
    lines = []
    for name, row in {row["file"].removeprefix("demo-"): row for row in rows("gguf") if "rounded" in row}.items():
        cells = [name, str(row["windows"]), fixed(row["llama_cpp"], 3)]
        for ours, apart in (("perplexity", "relative"), ("rounded", "relative_rounded")):
            error = f" ± {fixed(100 * row[f'{apart}_se'], 2)}" if f"{apart}_se" in row else ""
            cells += [fixed(row[ours], 3), f"{fixed(100 * row[apart], 2)}{error}%"]
        lines.append(cells)
    return table("file | windows | llama.cpp | ours | apart | ours, inputs rounded alike | apart", lines)


def pooled(found: list[Row]) -> Row:
    """One row of all windows of `found`, rows of the same method and text on different windows."""
    counts = [row["windows"] for row in found]
    joined: dict[str, Any] = dict(found[0])
    for key in ("delta_nll", "kl"):
        joined[key] = sum(count * row[key] for count, row in zip(counts, found, strict=True)) / sum(counts)
        squares = sum((count * row[f"{key}_se"]) ** 2 for count, row in zip(counts, found, strict=True))
        joined[f"{key}_se"] = squares**0.5 / sum(counts)
    return joined


def divergence(row: Row) -> str:
    places = 4 if row["kl"] < 0.005 else 3
    return f"{fixed(row['kl'], places)} ± {fixed(row['kl_se'], places)}"


# Speed


DECODE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Llama-2-7B, W4", {"shape": "llama2-7b", "method": "w4"}),
    ("the same, int8 cache", {"shape": "llama2-7b", "method": "w4", "cache": "int8"}),
    ("Llama-2-7B, int8", {"shape": "llama2-7b", "method": "int8"}),
    ("Llama-2-7B, W8A8", {"shape": "llama2-7b", "method": "w8a8"}),
    ("Llama-2-7B, bfloat16", {"shape": "llama2-7b", "method": "dense", "dtype": "bfloat16"}),
    ("Llama-2-7B, float16", {"shape": "llama2-7b", "method": "dense"}),
    ("Llama-3-8B, W4, int8 head", {"shape": "llama3-8b", "method": "w4", "head": "int8-channel"}),
    ("Llama-2-13B, W4", {"shape": "llama2-13b", "method": "w4"}),
    ("Llama-2-13B, float16", {"shape": "llama2-13b", "method": "dense"}),
    ("CodeGeeX-13B, int8", {"shape": "codegeex-13b", "method": "int8"}),
    ("ChatGLM2-6B, W4", {"shape": "chatglm2-6b", "method": "w4"}),
    ("ChatGLM2-6B, float16", {"shape": "chatglm2-6b", "method": "dense"}),
)
USUAL = {"dtype": "float16", "cache": "same", "head": "dense", "gpu": H100}
MARKS = {ROUGH: "", "9b88251": " a", "14bfcca": " b"}


def decode() -> str:
    """Tokens a second, the share of the floor, and the mark of the commit."""

    def cell(wanted: Mapping[str, Any], batch: int, prompt: int) -> str:
        found = matching("decode", **USUAL | dict(wanted) | {"batch": batch, "prompt": prompt})
        if not found:
            return ""
        row = found[-1]
        return f"{fixed(row['tokens_per_s'], 0)} ({fixed(100 * row['share_of_floor'], 0)}%){MARKS[row['commit']]}"

    sizes = [(batch, prompt) for batch in (1, 8) for prompt in (128, 2048)]
    head = "shape and weights | " + " | ".join(f"{batch} x {prompt}" for batch, prompt in sizes)
    return table(head, [[label, *(cell(wanted, *size) for size in sizes)] for label, wanted in DECODE])


def lookup() -> str:
    texts = {
        "edits": "a given text: files of 2,048 tokens with changes",
        "code": "code: modules of the standard library",
        "prose": "prose: CPython's documentation",
        "repeat": "code, begun again behind itself",
    }
    lines = [
        [label, *(fixed(first("lookup", text=text, drafts=n)["tokens_per_step"], 2) for n in (3, 7))]
        for text, label in texts.items()
    ]
    return table("text | tokens a step with 3 drafts | with 7", lines)


def drafts() -> str:
    """Rows of drafters: what they save and what they cost."""
    lines = []
    for row in rows("drafts"):
        if "shape" in row:
            head = row.get("head", "int8")
            name = f"{row['shape']} {row['weights']}, head in {head}, {row['right_set']} right by hand"
        else:
            name = f"{row['model']}, its own head, {row['text']}" + ", shared GPU" * bool(row.get("shared_gpu"))
        share = 100 * row["draft_ms"] / (row["draft_ms"] + row["check_ms"])
        times = (row["ms_per_token"], row["plain_ms_per_token"], row["draft_ms"], row["check_ms"])
        right = " ".join(f"{100 * each:.0f}" for each in row["right"][:4])
        most = "chosen" if row["drafts"] is None else str(row["drafts"])
        tokens = fixed(row["tokens_per_step"], 2)
        lines.append([name, most, tokens, right, *(fixed(each, 2) for each in times), f"{fixed(share, 0)}%"])
    head = "model | drafts | tokens a step | right by place, % | ms a token | without | drafts, ms | check, ms | share"
    return table(head, lines)


DRAFTED = {"llama2-7b": "Llama-2-7B", "llama3-8b": "Llama-3-8B", "llama2-13b": "Llama-2-13B"}


def draft_steps() -> str:
    """Steps that check several rows of one sequence, beside those of one."""
    lines = []
    for shape, name in DRAFTED.items():
        for positions in (128, 1900):
            ms = [first("draft_steps", shape=shape, positions=positions, rows=n)["ms"] for n in (1, 2, 4, 8)]
            lines.append([name, str(positions), *(fixed(each, 3) for each in ms), fixed(ms[-1] / ms[0], 2)])
    return table("W4 | positions | 1 row, ms | 2 | 4 | 8 | 8 over 1", lines)


def spread(row: Row) -> str:
    return f"{fixed(min(row['block_s_all']), 1)} to {fixed(max(row['block_s_all']), 1)}"


CALIBRATED = {
    "gptq": ("`gptq` int4-g128", "{}, of which rounding {rounding}"),
    "awq": ("`awq` int4-g128", "{}: scales {transforms}, ranges {rounding}"),
    "smoothquant": ("`smoothquant`", "{}: scales {transforms}, next inputs {next inputs}"),
    "signround": ("`signround --iters 200` int4-g128", "{}, of which rounding {rounding}"),
}


def calibrate() -> str:
    lines = []
    for method, (label, said) in CALIBRATED.items():
        row = first("calibrate", method=method)
        block = said.format(spread(row), **{phase: fixed(took, 1) for phase, took in row["phases_s"].items()})
        between = fixed(row["between_s"], 1) if "between_s" in row else ""
        whole = ("" if between else "at most ") + fixed(row["model_s"], 0)
        lines.append([label, block, between, whole, fixed(row["peak_gpu_gib"], 1)])
    head = "method | a block | between blocks | 32 blocks, files read and written | GPU memory, GiB"
    return table(head, lines)


VLLM = {
    "w4": ("W4A16, groups of 128", "Marlin"),
    "w8": ("W8A16, per channel", "Marlin"),
    "w8a8": ("W8A8, per token", "CUTLASS"),
}
VLLM_H200 = {
    "w4 marlin": ("W4A16, groups of 128", "Marlin"),
    "w4 lowbit": ("W4A16, groups of 128", "ours"),
    "fp8 lowbit": ("FP8, per channel and token", "ours"),
}


def vllm() -> str:
    """Milliseconds of a step inside vLLM."""
    lines = []
    for model, (label, kernel) in VLLM.items():
        steps = [first("vllm", engine=f"{model} {by}")["step_ms"] for by in (kernel.lower(), "lowbit")]
        lines.append([label, kernel, *(fixed(step[batch], 2) for step in steps for batch in ("1", "8"))])
    return table("checkpoint | vLLM's kernel | batch 1 | batch 8 | ours, batch 1 | batch 8", lines)


def vllm_h200() -> str:
    """Milliseconds of a step inside vLLM on an H200."""

    def line(row: Row) -> Iterable[str]:
        checkpoint, kernels = VLLM_H200[row["engine"]]
        without = "" if row.get("prefetch", True) else ", next weight not prefetched"
        yield from (checkpoint, kernels + without + ", in company" * row.get("shared_gpu", False))
        for batch, ms in row["step_ms"].items():
            every = row.get("steps_ms", {}).get(batch)
            spread = f" ({fixed(min(every), 2)} to {fixed(max(every), 2)})" if every else ""
            yield fixed(ms, 2) + spread
        yield row["commit"]

    found = [row for row in rows("vllm") if row.get("gpu") == H200 and "engine" in row]
    return table("checkpoint | kernels | batch 1 | batch 8 | at", map(line, found))


def vllm_schemes() -> str:
    """Distances of log-probabilities inside vLLM with our kernels to the dense model, by scheme."""
    return _inside_vllm(False)


def vllm_own() -> str:
    """The same of vLLM's own kernels."""
    return _inside_vllm(True)


def _inside_vllm(own: bool) -> str:
    lines = []
    for row in (row for row in rows("vllm_schemes") if row.get("own", False) == own):
        split = row.get("split", 1)
        mode = row["mode"] if split == 1 else f"{row['mode']}, {split} processes"
        name = [f"`{row['scheme']}`", mode, *([row.get("inputs", "")] if own else [])]
        cells = [fixed(value, 3) for part in ("prompt", "new") for value in row.get(part, ())]
        lines.append([*name, *(cells or ["does not load", "", "", ""])])
    head = "scheme | vLLM | inputs | " if own else "scheme | vLLM | "
    return table(f"{head}prompts, mean | most | new tokens, mean | most", lines)


def agreement() -> str:
    """Mean distances of log-probabilities, for three models."""
    exact = "exact, float64"
    pairs = [(exact, "exact, float32"), (exact, "exact, bfloat16"), (exact, "vLLM"), (exact, "vLLM, our linears")]
    pairs += [("vLLM", "vLLM, our linears")]
    models = ("wild", "tame", "smoothquant int8-channel-a8token")
    lines = [
        [f"{b} and {a}", *(fixed(first("w8a8_agreement", checkpoint=m, one=a, other=b)["mean"], 2) for m in models)]
        for a, b in pairs
    ]
    return table(
        "between | `wild`: random, as at 06fe4eb | `tame`: random, as in that run | the demo, `smoothquant`, a text",
        lines,
    )


# Kernels


GEMV_SHAPES = ((4096, 4096), (12288, 4096), (22016, 4096), (28672, 4096), (4096, 14336), (5120, 13824), (57344, 8192))
GEMM_SHAPES = ((4096, 4096), (12288, 4096), (22016, 4096), (28672, 4096), (5120, 13824), (57344, 8192))
DENSE_SHAPES = ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (15360, 5120), (5120, 13824), (32000, 4096))
ALL_SHAPES = (
    *((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (6144, 4096), (28672, 4096), (4096, 14336)),
    *((5120, 5120), (15360, 5120), (20480, 5120), (5120, 20480), (27648, 5120), (5120, 13824), (57344, 8192)),
    (8192, 28672),
)
W4 = {"ours": True, "bits": 4, "group_size": 128, "dtype": "float16", "symmetric": True}
W8 = {"ours": True, "bits": 8, "group_size": -1, "dtype": "float16", "symmetric": True}


def ours(stem: str, scheme: Mapping[str, Any], m: int, n: int, k: int, dependent: bool = True) -> Row:
    return first(stem, **scheme, m=m, n=n, k=k, dependent=dependent)


def peer(stem: str, bits: int, m: int, n: int, k: int) -> str:
    """The time of the fastest other kernel for weights of these bits, or for dense ones."""
    found = [row for row in matching(stem, ours=False, m=m, n=n, k=k) if row["bits"] in (bits, 16)]
    return fixed(min(row["us"] for row in found), 2)


def kernels() -> str:
    lines = []
    for n, k in ALL_SHAPES:
        plain = ours("wna16_gemv", W4, 1, n, k, dependent=False)
        cells = [f"{n} x {k}", fixed(plain["floor_us"], 2), fixed(plain["us"], 2)]
        for m in (1, 8, 16, 32, 64):
            stem = "wna16_gemv" if m <= 8 else "wna16_gemm"
            cells += [fixed(ours(stem, W4, m, n, k)["us"], 2), peer(stem, 4, m, n, k)]
        lines.append(cells)
    head = "n x k | floor | m = 1 | pdl | peer | " + " | ".join(f"m = {m} | peer" for m in (8, 16, 32, 64))
    return table(head, lines)


def gemv() -> str:
    lines = []
    for n, k in GEMV_SHAPES:
        cells = [f"{n} x {k}"]
        for bits, scheme, counts in ((4, W4, (1, 8)), (8, W8, (1,))):
            cells.append(fixed(ours("wna16_gemv", scheme, 1, n, k)["floor_us"], 2))
            for m in counts:
                cells += [fixed(ours("wna16_gemv", scheme, m, n, k)["us"], 2), peer("wna16_gemv", bits, m, n, k)]
        lines.append(cells)
    return table("n x k | W4 g128 floor | m = 1 | peer | m = 8 | peer | W8 floor | m = 1 | peer", lines)


def gemm() -> str:
    """A star where the rule takes wna16_gemv."""
    lines = []
    for n, k in GEMM_SHAPES:
        cells = [f"{n} x {k}", fixed(ours("wna16_gemm", W4, 16, n, k)["floor_us"], 2)]
        for m in (16, 32, 64):
            row = ours("wna16_gemm", W4, m, n, k)
            star = "*" if row["kernel"] == "wna16_gemv" else ""
            cells += [fixed(row["us"], 2) + star, peer("wna16_gemm", 4, m, n, k)]
        lines.append(cells)
    return table("n x k | floor | m = 16 | peer | m = 32 | peer | m = 64 | peer", lines)


def prefill() -> str:
    lines = []
    names = ("wna16_gemm", "wna16_dequantize", "vllm machete w4", "vllm marlin w4", "cublas")
    for n, k in GEMM_SHAPES[:4]:
        for m in (128, 512):
            size = {"m": m, "n": n, "k": k}
            found = [first("wna16_prefill", kernel=name, bits=16 if name == "cublas" else 4, **size) for name in names]
            label = f"{n} x {k}" if m == 128 else ""
            lines.append([label, str(m), *(three_digits(row["us"]) for row in found)])
    return table("n x k | m | slabs | copy + cuBLAS | Machete | Marlin | cuBLAS, dense weight", lines)


def dense() -> str:
    lines = []
    for n, k in DENSE_SHAPES:
        cells = [f"{n} x {k}", fixed(first("dense_gemv", m=1, n=n, k=k)["floor_us"], 1)]
        for m in (1, 16, 64):
            for wanted in ({"kernel": "dense_gemv", "dependent": True}, {"kernel": "cublas"}):
                cells.append(fixed(first("dense_gemv", m=m, n=n, k=k, **wanted)["us"], 1))
        lines.append(cells)
    return table("n x k | floor | m = 1 | cuBLAS | m = 16 | cuBLAS | m = 64 | cuBLAS", lines)


def dequantize() -> str:
    lines = []
    for n, k in ((4096, 4096), (4096, 14336), (28672, 4096)):
        found = [first("wna16_dequantize", kernel="wna16_dequantize", n=n, k=k, bits=bits) for bits in (4, 8)]
        lines.append([f"{n} x {k}", *(cell for row in found for cell in (fixed(row["us"], 1), fixed(row["gbs"], 0)))])
    return table("n x k | W4 g128, us | GB/s | W8 per channel, us | GB/s", lines)


NUMBERS = {
    "w4": "int4 g128",
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "w3": "int3 g128",
    "w2": "int2 g128",
    "int8": "int8",
    "fp8": "FP8",
    "fp8-block": "FP8, 128 x 128 blocks",
}


def numbers_steps() -> str:
    """Steps of Llama-2-7B with weights of each number type, 128 tokens in the cache, of one run."""
    lines = []
    for method, name in NUMBERS.items():
        one, eight = (first("numbers_steps", method=method, batch=batch) for batch in (1, 8))
        cells = (fixed(one["floor_ms"], 3), fixed(one["ms_per_token"], 3), fixed(one["tokens_per_s"], 0))
        share, more = fixed(100 * one["share_of_floor"], 0), fixed(eight["ms_per_token"], 3)
        lines.append([name, *cells, f"{share}%", more])
    return table("weights | floor, ms | batch 1, ms | tokens/s | share of the floor | batch 8, ms", lines)


NUMBER_SCHEMES = {
    "int4-g128": "int4 g128",
    "nvfp4-a16": "NVFP4",
    "mxfp4-a16": "MXFP4",
    "int3-g128": "int3 g128",
    "int2-g128": "int2 g128",
    "int8": "int8",
    "fp8-a16": "FP8",
    "fp8-block-a16": "FP8, 128 x 128 blocks",
}
NUMBER_SHAPES = ((12288, 4096), (4096, 11008), (22016, 4096), (28672, 8192))


def numbers() -> str:
    """Products of one and of eight rows with weights of each number type, and their shares of the read floor."""

    def cell(scheme: str, m: int, n: int, k: int) -> str:
        found = matching("numbers", scheme=scheme, m=m, n=n, k=k)
        return f"{fixed(found[0]['us'], 1)} ({fixed(100 * found[0]['floor_us'] / found[0]['us'], 0)}%)" if found else ""

    lines = []
    for scheme, name in NUMBER_SCHEMES.items():
        for m in (1, 8) if matching("numbers", scheme=scheme, m=8) else (1,):
            lines.append([name, str(m), *(cell(scheme, m, n, k) for n, k in NUMBER_SHAPES)])
    return table(f"weights | rows of x | {' | '.join(f'{n} x {k}' for n, k in NUMBER_SHAPES)}", lines)


PEER_SCHEMES = NUMBER_SCHEMES | {"int6-g128": "int6 g128"}
PEER_KERNELS = {"marlin": "Marlin", "machete": "Machete", "humming": "Humming", "gemlite": "gemlite"}


def number_peers() -> str:
    """On how many shapes ours are ahead of the fastest peer, and their share of its time, by number type and rows."""
    lines = []
    for scheme, name in PEER_SCHEMES.items():
        for m in (1, 4, 8, 16):
            found = matching("number_peers", scheme=scheme, m=m)
            shapes = sorted({(row["n"], row["k"]) for row in found if not row["ours"]})
            if not shapes:
                continue
            fastest = [min(row["us"] for row in found if not row["ours"] and (row["n"], row["k"]) == s) for s in shapes]
            cells = []
            for dependent in (True, False):
                ours = (
                    first("number_peers", scheme=scheme, m=m, n=n, k=k, ours=True, dependent=dependent)
                    for n, k in shapes
                )
                parts = sorted(row["us"] / us for row, us in zip(ours, fastest, strict=True))
                ahead = f"{sum(part < 1 for part in parts)} of {len(parts)}"
                cells += [ahead, *(fixed(part, 2) for part in (parts[0], median(parts), parts[-1]))]
            lines.append([name, str(m), *cells])
    return table("weights | rows of x | ahead | least | median | most | plainly, ahead | least | median | most", lines)


def number_peer_times() -> str:
    """Products of one and of eight rows with weights of two shapes, of every kernel."""
    lines = []
    for n, k in ((4096, 4096), (22016, 4096)):
        for scheme, name in PEER_SCHEMES.items():
            for m in (1, 8):
                found = matching("number_peers", scheme=scheme, m=m, n=n, k=k)
                wanted = [{"ours": True, "dependent": True}, {"ours": True, "dependent": False}]
                wanted += [{"kernel": kernel} for kernel in PEER_KERNELS]
                times = ([row["us"] for row in found if each.items() <= row.items()] for each in wanted)
                cells = (fixed(us[0], 1) if us else "" for us in times)
                lines.append([f"{n} x {k}", name, str(m), fixed(found[0]["floor_us"], 1), *cells])
    return table(f"n x k | weights | rows of x | floor | ours | plainly | {' | '.join(PEER_KERNELS.values())}", lines)


EXPERT_NAMES = {
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "glm-4.5-air": "GLM-4.5-Air",
    "gpt-oss-20b": "gpt-oss-20b",
}
EXPERT_TYPES = {"int4-g128": "int4 g128", "mxfp4-a16": "MXFP4"}


def expert_peers() -> str:
    """Up and down of a layer's experts in 4 bits, ours and other libraries'."""
    lines = []
    for row in rows("expert_peers"):
        us = [row.get(f"{name}_us") for name in ("marlin", "humming", "triton")]
        gain = min(each for each in us if each) / row["experts_us"]
        cells = (fixed(each, 1) if each else "" for each in (row["experts_us"], *us))
        name = f"{EXPERT_NAMES[row['shape']]}, {EXPERT_TYPES[row['scheme']]}"
        lines.append([name, str(row["m"]), three_digits(row["distinct"]), *cells, fixed(gain, 2)])
    return table(
        "layer | rows | distinct experts | ours | Marlin | Humming | Triton | times as fast as the best", lines
    )


FP8_SHAPES = ((12288, 4096), (4096, 11008), (22016, 4096))
FP8_KERNELS = (
    ("this library", {"ours": True, "part": "product"}),
    ("with rounding", {"ours": True, "part": "rounding + product"}),
    ("cuBLAS", {"kernel": "torch._scaled_mm", "ours": False}),
    ("cuBLAS, fast", {"kernel": "torch._scaled_mm fast"}),
    ("vLLM's CUTLASS", {"kernel": "vllm cutlass", "part": "product"}),
    ("with rounding", {"kernel": "vllm cutlass", "part": "rounding + product"}),
)


BLOCK_KERNELS = (
    ("this library", {"ours": True, "part": "product"}),
    ("with rounding", {"ours": True, "part": "rounding + product"}),
    ("cuBLAS in blocks", {"kernel": "torch scaled_mm", "ours": False}),
    ("vLLM's CUTLASS", {"kernel": "vllm cutlass"}),
    ("DeepGEMM", {"kernel": "deepgemm"}),
)


W4A8_SHAPES = ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (28672, 4096))
W4A8_ROWS = (16, 32, 64, 128, 256, 512, 1024)


def by_rows_of_x(stem: str, kernels: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Products by the number of rows, us, of rows in the file `stem`; kernels without rows are left out."""
    lines, kernels = [], [(name, wanted) for name, wanted in kernels if matching(stem, **wanted)]
    for n, k in FP8_SHAPES:
        for m in sorted({row["m"] for row in matching(stem, n=n, k=k)}):
            found = [matching(stem, n=n, k=k, m=m, **wanted) for _, wanted in kernels]
            cells = (fixed(rows[0]["us"], 1) if rows else "" for rows in found)
            lines.append([f"{n} x {k}", str(m), fixed(first(stem, n=n, k=k, m=m)["floor_us"], 1), *cells])
    return table(f"n x k | rows of x | floor | {' | '.join(name for name, _ in kernels)}", lines)


def fp8_products() -> str:
    return by_rows_of_x("w8a8_fp8", FP8_KERNELS)


def int4_by_int8() -> str:
    """Products of int4 with int8, and of the same weight with x in half precision, by the number of rows."""

    def cell(n: int, k: int, m: int) -> str:
        parts = ("product", "product of halves")
        return ", ".join(fixed(first("w4a8_gemm", n=n, k=k, m=m, part=part)["us"], 1) for part in parts)

    lines = ([f"{n} x {k}", *(cell(n, k, m) for m in W4A8_ROWS)] for n, k in W4A8_SHAPES)
    return table(f"n x k | {' | '.join(f'm = {m}' for m in W4A8_ROWS)}", lines)


W4A8_PEERS = (
    ("ours", {"ours": True, "part": "product"}),
    ("rounded", {"ours": True, "part": "rounding + product"}),
    ("Marlin", {"kernel": "vllm marlin int8"}),
    ("CUTLASS", {"kernel": "vllm cutlass fp8"}),
    ("Humming", {"kernel": "humming int8"}),
    ("ours, 16", {"ours": True, "part": "product of halves"}),
    ("Marlin, 16", {"kernel": "vllm marlin w4"}),
    ("Machete, 16", {"kernel": "vllm machete w4"}),
    ("Humming, 16", {"kernel": "humming"}),
)


def w4a8_peers() -> str:
    """Products of int4 with rows in 8 bits and in half precision, ours and other libraries', us."""
    lines, stem = [], "w4a8_peers"
    for n, k in sorted({(row["n"], row["k"]) for row in rows(stem)}):
        for m in (16, 32, 64):
            found = (matching(stem, n=n, k=k, m=m, **wanted) for _, wanted in W4A8_PEERS)
            lines.append([f"{n} x {k}", str(m), *(fixed(each[0]["us"], 1) if each else "" for each in found)])
    return table(f"n x k | rows | {' | '.join(name for name, _ in W4A8_PEERS)}", lines)


def prompt_peers() -> str:
    """Prompts of 192 to 1024 rows with int4 weights, ours and other libraries', us, and ours over the fastest."""
    stem, peers = "prompt_peers", {"vllm machete w4": "Machete", "vllm marlin w4": "Marlin", "humming": "Humming"}
    lines = []
    for n, k in sorted({(row["n"], row["k"]) for row in rows(stem)}):
        for m in (192, 256, 512, 1024):
            size = {"n": n, "k": k, "m": m}
            ours = first(stem, chosen=True, **size)["us"]
            theirs = [first(stem, kernel=kernel, **size)["us"] for kernel in peers]
            dense = first(stem, kernel="cublas", **size)["us"]
            cells = (three_digits(each) for each in (ours, *theirs, dense))
            lines.append([f"{n} x {k}", str(m), *cells, fixed(ours / min(theirs), 2)])
    return table(
        f"n x k | rows of x | ours | {' | '.join(peers.values())} | cuBLAS, dense weight | of the fastest", lines
    )


def fp8_blocks() -> str:
    return by_rows_of_x("w8a8_blocks", BLOCK_KERNELS)


ATTENTIONS = ((32, 8, 2048), (32, 1, 32768), (8, 8, 2048), (8, 1, 32768))  # key heads, batch, positions
CACHES = {"same": "float16", "int8": "int8", "fp8": "FP8", "int4": "int4"}


def attention() -> str:
    """Attention over each type of cache, and its share of the read floor."""

    def cell(cache: str, kv_heads: int, batch: int, length: int) -> str:
        sizes = {"kv_heads": kv_heads, "batch": batch, "length": length}
        row = first("decode_attention", cache=cache, commit=ATTENDED, **sizes)
        best = min(row["us"], row.get("dependent_us", row["us"]))
        return f"{fixed(best, 1)} ({fixed(100 * row['floor_us'] / best, 0)}%)"

    lines = ([name, *(cell(cache, *size) for size in ATTENTIONS)] for cache, name in CACHES.items())
    heads = " | ".join(f"{kv_heads} heads, {batch} x {length}" for kv_heads, batch, length in ATTENTIONS)
    return table(f"cache | {heads}", lines)


EXPERTS = {
    "qwen3-30b-a3b": "Qwen3-30B-A3B, W4, int8 head",
    "gpt-oss-20b": "gpt-oss-20b, experts in MXFP4",
    "mixtral-8x7b": "Mixtral-8x7B, W4, int8 head",
    "glm-4.5-air": "GLM-4.5-Air, W4, int8 head",
    "deepseek-v2-lite": "DeepSeek-V2-Lite, W4, int8 head",
}


def decode_experts() -> str:
    """Steps of mixtures of experts, 128 tokens in the cache: the last row of each."""

    def cell(shape: str, batch: int) -> str:
        found = matching("decode_experts", shape=shape, batch=batch)
        if not found:
            return ""
        row = found[-1]
        share = fixed(100 * row["share_of_floor"], 0)
        return f"{fixed(row['tokens_per_s'], 0)} ({share}%, {three_digits(row['experts'])})"

    lines = ([label, *(cell(shape, batch) for batch in (1, 8, 16))] for shape, label in EXPERTS.items())
    return table("shape and weights | 1 x 128 | 8 x 128 | 16 x 128", (line for line in lines if any(line[1:])))


def wna16_experts() -> str:
    """Layers of experts alone, microseconds: the last row of each."""
    lines = []
    for shape, label in EXPERTS.items():
        for m in (1, 8, 16):
            found = matching("wna16_experts", shape=shape, m=m)
            if found:
                parts = ("route_us", "up_us", "up_floor_us", "down_us", "down_floor_us", "layer_us", "layer_floor_us")
                cells = (three_digits(found[-1][part]) for part in parts)
                lines.append([label.partition(",")[0], str(m), three_digits(found[-1]["distinct"]), *cells])
    return table("layer | rows | distinct experts | choice | up | floor | down | floor | all | floor", lines)


def route_experts() -> str:
    """Microseconds of a row's choice."""
    lines = []
    for row in matching("route_experts", m=1):
        cells = (fixed(row[part], 1) for part in ("us", "dependent_us", "torch_us"))
        lines.append([f"{row['experts']} x {row['k']}", str(row["top"]), *cells])
    return table("experts x inputs | chosen | alone | dependent launch | torch's operators", lines)


def latent_attention() -> str:
    """Microseconds of a step's attention over compressed rows, and those of a kernel that reads these alone."""
    cases = [(m, length) for m in (1, 8) for length in (128, 2048, 8192)]
    lines = []
    for heads in (16, 128):
        found = [first("latent_attention", heads=heads, m=m, length=length) for m, length in cases]
        lines.append([str(heads), *(f"{fixed(row['us'], 1)} ({fixed(row['floor_us'], 1)})" for row in found)])
    return table(" | ".join(["heads", *(f"{m} x {length}" for m, length in cases)]), lines)


def gptq_block() -> str:
    lines = [[str(n), fixed(took("gptq_block", n), 1), fixed(took("loop", n) / 1000, 1)] for n in (4096, 11008)]
    return table("rows of the weight | kernel, us | torch's loop, ms", lines)


def took(kernel: str, n: int) -> float:
    return float(first("gptq_block", kernel=kernel, n=n)["us"])


# Readers


def readers() -> str:
    """A line per checkpoint, with the commit of our own reading, and a column per reader.

    Readers and errors are listed below. If a checkpoint was made again, as our own reading shows, other readers'
    results for the old one are dropped.
    """
    cells: dict[tuple[str, str], Row] = {}
    for row in rows("formats"):
        name, reader = pair = row["checkpoint"], row["reader"]
        if reader == "lowbit" and pair in cells and cells[pair]["perplexity"] != row["perplexity"]:
            cells = {(other, by): cell for (other, by), cell in cells.items() if other != name}
        cells[pair] = row
    programs = list(dict.fromkeys(reader for _, reader in cells))
    errors = list(dict.fromkeys(row["error"] for row in cells.values() if row["error"]))

    def text(row: Row | None) -> str:
        if row is None:
            return ""
        places = 3 if (row["perplexity"] or 0) < 1e4 else 0
        return f"error {errors.index(row['error']) + 1}" if row["error"] else fixed(row["perplexity"], places)

    lines = []
    for name in sorted({name for name, _ in cells}):
        line = [name, cells[name, "lowbit"]["commit"], *(text(cells.get((name, reader))) for reader in programs)]
        while not line[-1]:  # a row may have fewer cells than the head
            line.pop()
        lines.append(line)
    said = [f"- {letter}: {reader}\n" for letter, reader in zip(ascii_uppercase, programs, strict=False)]
    said += [f"- error {number}: {error.replace('`', chr(39))}\n" for number, error in enumerate(errors, 1)]
    head = " | ".join(["checkpoint", "at", *ascii_uppercase[: len(programs)]])
    return table(head, lines) + "\n" + "".join(said)


SECONDS = ("median_s", "least_s", "most_s")


def commands() -> str:
    """Response times of commands that need no model, in milliseconds."""
    lines = [
        [f"`{name}`" if name.startswith("lowbit") else name, *(fixed(1000 * row[key], 0) for key in SECONDS)]
        for row in rows("commands")
        if (name := row["command"])
    ]
    return table("command | median, ms | fastest | slowest of ten", lines)


def rounding() -> str:
    """Seconds of `--method rtn` on a model of the shape of Llama-2-7B."""
    lines = []
    for row in matching("rtn", shape="7B", layers="all"):
        took = row.get("seconds_all", [row["seconds"]])
        spread = f"{fixed(min(took), 1)} to {fixed(max(took), 1)}" if len(took) > 1 else ""
        cells = [row["gpu"] or "CPU", str(row["cores"]), row["commit"], fixed(row["seconds"], 1), spread]
        lines.append([*cells, fixed(row["cpu_seconds"], 0)])
    return table("device | cores | at | seconds, median | of all runs | processor time", lines)


# The commits of rows of an H200: of steps, of attention alone, and of first tokens.
NEWER, ATTENDED, FIRST = "54e28ce", "2da1ecf", "a8e4787"
H200_SHAPES = (
    ("Llama-2-7B, W4", "llama2-7b", "w4", "float16", "same"),
    ("the same, int8 cache", "llama2-7b", "w4", "float16", "int8"),
    ("Llama-2-7B, int8", "llama2-7b", "int8", "float16", "same"),
    ("Llama-2-7B, W8A8", "llama2-7b", "w8a8", "float16", "same"),
    ("Llama-2-7B, bfloat16", "llama2-7b", "dense", "bfloat16", "same"),
    ("Llama-3-8B, W4, int8 head", "llama3-8b", "w4", "float16", "same"),
    ("Llama-2-13B, W4", "llama2-13b", "w4", "float16", "same"),
    ("CodeGeeX-13B, int8", "codegeex-13b", "int8", "float16", "same"),
    ("ChatGLM2-6B, W4", "chatglm2-6b", "w4", "float16", "same"),
    ("ChatGLM2-6B, float16", "chatglm2-6b", "dense", "float16", "same"),
)


def decode_h200() -> str:
    """ENGINE's speeds on an H200."""

    def line(label: str, shape: str, method: str, dtype: str, cache: str) -> Iterable[str]:
        yield label
        for batch, prompt in ((1, 128), (1, 2048), (8, 128), (8, 2048)):
            named = {"shape": shape, "method": method, "dtype": dtype, "cache": cache, "commit": NEWER}
            found = matching("decode", batch=batch, prompt=prompt, **named)
            shown = (f"{fixed(row['tokens_per_s'], 0)} ({fixed(100 * row['share_of_floor'], 0)}%)" for row in found)
            yield next(shown, "")

    return table("shape and weights | 1 x 128 | 1 x 2048 | 8 x 128 | 8 x 2048", (line(*each) for each in H200_SHAPES))


def first_token() -> str:
    """ENGINE's times from a prompt to its first token."""
    prompts = [(1, tokens) for tokens in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)] + [(8, 128)]

    def line(label: str, padded: bool) -> Iterable[str]:
        yield label
        for batch, prompt in prompts:
            found = matching("first_token", method="w4", padded=padded, batch=batch, prompt=prompt, commit=FIRST)
            yield next((fixed(row["ms"], 1) for row in found), "")

    head = " | ".join(str(tokens) if batch == 1 else f"{batch} x {tokens}" for batch, tokens in prompts)
    return table(f"tokens | {head}", (line("captured up to 2048", True), line("plainly", False)))


SERVED, STARTED = "a8e4787", "bebb072"  # the commits of SERVING's rows, and of those of starts


def serving() -> str:
    """SERVING's times over HTTP by numbers of clients."""

    def line(clients: int, prompt: int) -> Iterable[str]:
        [row] = matching("serve", case="clients", clients=clients, prompt=prompt, commit=SERVED)
        yield from (str(clients), str(prompt), fixed(row["tokens_per_s"], 0))
        yield from (fixed(row[f"ms_{name}"], 2) for name in ("between_median", "between_p99"))
        yield fixed(row["ms_first_median"], 0)

    head = "clients | tokens of a prompt | tokens/s | between tokens, ms | 99% within | first token, ms"
    return table(head, (line(*each) for each in ((1, 128), (4, 128), (8, 128), (16, 128), (1, 2048), (4, 2048))))


COMPARED = "0ccf8a3"  # the commit of SERVING's comparison
PEERS = {"lowbit": "lowbit", "vLLM 0.26": "vllm marlin"}  # and its servers


def served_peers() -> str:
    """SERVING's times of `lowbit serve` and of `vllm serve`."""

    def line(name: str, clients: int, prompt: int) -> Iterable[str]:
        alike = {"clients": clients, "prompt": prompt, "commit": COMPARED}
        yield from (str(clients), str(prompt), name)
        if name not in PEERS:
            [row] = matching("serve", case="peer_bench", **alike)
            yield from ("", fixed(row["ms_between_median"], 2), "", "")
            return
        [row] = matching("serve", case="peer_clients", server=PEERS[name], **alike)
        yield fixed(row["tokens_per_s"], 0)
        yield from (fixed(row[f"ms_{part}"], 2) for part in ("between_median", "between_p99"))
        yield fixed(row["ms_first_median"], 0)

    head = "clients | tokens of a prompt | server | tokens/s | between tokens, ms | 99% within | first token, ms"
    sizes = ((1, 128), (4, 128), (16, 128), (1, 2048), (4, 2048))
    return table(head, (line(name, *size) for size in sizes for name in ("`lowbit bench`", *PEERS)))


def peer_steps() -> str:
    """SERVING's pauses, conversations and starts of the same servers."""

    def line(name: str) -> Iterable[str]:
        [stall], [talk], [start] = (
            matching("serve", case=f"peer_{case}", server=PEERS[name], commit=COMPARED)
            for case in ("stall", "dialogue", "start")
        )
        yield from (name, fixed(stall["ms_between_most_first"], 0))
        yield from (fixed(stall[f"ms_between_most{part}"], 0) for part in ("_median", ""))
        yield from (fixed(stall["ms_first_median"], 0), fixed(talk["ms_first_all"], 0), fixed(start["seconds"], 1))

    head = "server | first pause, ms | later ones | at most | their first token | 20 turns' first tokens | start, s"
    return table(head, map(line, PEERS))


def peer_features() -> str:
    """SERVING's pauses of a stream while a request with other features of sampling comes."""

    def line(feature: str) -> Iterable[str]:
        yield feature
        for server in PEERS.values():
            found = matching("serve", case="peer_feature", feature=feature, server=server, commit=COMPARED)
            yield from (fixed(row[f"ms_between_most{part}"], 0) for row in found for part in ("_first", ""))

    head = "request with | lowbit, ms | later | vLLM 0.26, ms | later"
    return table(head, map(line, ("none", "top_p", "penalty", "logprobs")))


def starts() -> str:
    """SERVING's seconds of starts, by stages."""
    found = list(matching("serve", case="start", commit=STARTED))
    stages = list(found[0]["stages"])
    lines = [
        ["the server is ready", *(fixed(value, 2) for value in (row["seconds"], *row["stages"].values()))]
        for row in found
    ]
    for row in matching("serve", case="start_generate", commit=STARTED):
        lines.append(["`lowbit generate` writes", fixed(row["seconds"], 2), *[""] * len(stages)])
    return table(" | ".join(["until", "s", *stages]), lines)


def served_steps() -> str:
    """SERVING's times of a step by its surroundings, and of a conversation."""
    alike = {"commit": SERVED}
    bare = matching("serve", case="bare", clients=1, **alike)
    [http] = matching("serve", case="clients", clients=1, prompt=128, **alike)
    masked = {row["grammar"]: row["ms_between_median"] for row in matching("serve", case="session", **alike)}
    [talk] = matching("serve", case="dialogue", **alike)
    lines = [
        ["a token of the engine alone", " and ".join(fixed(row["ms_between_median"], 2) for row in bare)],
        ["of a stream over HTTP", fixed(http["ms_between_median"], 2)],
        ["in the batch, and with a JSON schema", f"{fixed(masked['none'], 2)}, {fixed(masked['json_schema'], 2)}"],
        [f"the first tokens of {talk['turns']} turns, together", fixed(talk["ms_first_all"], 0)],
        ["the same prompts without a conversation", fixed(talk["ms_first_all_fresh"], 0)],
    ]
    return table("time of | ms", lines)


RUN_BY = (  # a row: the schemes, of which the first is asked for
    ("int4-g128", "int4-g64", "uint4-g128"),
    ("int8",),
    ("int8-a8",),
    ("int8-a8-static",),
    ("int3-g128", "int2-g64", "int6-g64"),
    ("fp8",),
    ("fp8-static",),
    ("fp8-a16",),
    ("fp8-block",),
    ("nvfp4",),
    ("nvfp4-a16",),
    ("mxfp4",),
    ("mxfp4-a16",),
    ("mxfp8",),
)


SHORTER = (
    ("sm_", ""),
    ("expanded to 16 bits everywhere", "expanded"),
    ("weights alone on", "weights:"),
    ("weights alone", "weights"),
)


def _places(described: str) -> str:
    """A cell: `100-120; weights: 75-90`; no place where it fails."""
    parts = [part for part in described.split("; ") if not part.startswith("fails on")]
    text = "; ".join(part.removeprefix("runs on ").removeprefix("runs ") for part in parts)
    for long, short in SHORTER:
        text = text.replace(long, short)
    return "no" if text == "fails everywhere" else text.replace(" to ", "-")


def engines() -> str:
    """The table of engines: each scheme on each generation, by the rules that `inspect` asks (export/engines)."""
    lines, fmt = [], FORMATS["compressed-tensors"]
    for names in RUN_BY:
        found = verdicts_of([FusedLinear(fmt, parse_scheme(names[0]), 4096, 4096)])
        cells = (_places(describe(found[engine.name])) for engine in engines_for(fmt))
        lines.append([", ".join(f"`{name}`" for name in names), *cells])
    heads = (f"{each.name} {each.version.split()[0]}" for each in engines_for(fmt))
    return table(" | ".join(["scheme", *heads]), lines)


# The rows of `schemes`, from most bits to fewest; a scheme without a figure is left out.
CHOICES = (
    "bfloat16",
    "int8",
    "fp8",
    "fp8-block",
    "int8-a8",
    "int6-g64",
    "nvfp4-a16",
    "int4-g32",
    "int4-g64",
    "int4-g128",
)
CHOICES += ("mxfp4-a16", "int3-g128", "int2-g64")
NAMED_BY = re.compile(r"scheme[= ](\S+)|(?:--)?bits[= ](\d) (?:--)?group[-_]size[= ](\d+)")
INTEGERS_BY = {"int8": "int8", "smoothquant": "int8-a8", "fp8": "fp8"}  # methods that name their scheme
SHAPE = "llama2-7b"
# Commits of the rows that `schemes` shows.
SHOWN = (None, "3444ccb", "ff315dd", "94ceede", "ee692f7", "4c09b55", "5bdb525", "142586a")


def scheme_of(row: Row) -> str | None:
    """The scheme of a row of quality.jsonl; None if one scheme does not describe it."""
    if "target" in row.get("settings", "") or "--asym" in row.get("settings", ""):
        return None
    found = NAMED_BY.search(row.get("settings", ""))
    if found is None:
        return INTEGERS_BY.get(row["method"].split("-")[0])
    return found[1] or f"int{found[2]}-g{found[3]}"


def shown(stem: str, **wanted: Any) -> list[Row]:
    """The matching rows of SHOWN."""
    return [row for row in matching(stem, **wanted) if row.get("commit") in SHOWN]


def schemes() -> str:
    """The table of schemes: bits, size of Llama-2-7B, the least loss on the demo model, and decoding speed."""
    sizes = SHAPES[SHAPE]
    inside = len(sizes.layers) * (4 * sizes.hidden**2 + 3 * sizes.hidden * sizes.inner)
    outside = 2 * sizes.vocabulary * sizes.hidden
    speeds = {str(parse_scheme(text)) if text else "bfloat16": name for name, text in DECODED.items()}
    alike = {"shape": SHAPE, "batch": 1, "prompt": 128, "cache": "same", "head": "dense", "gpu": H200}
    lines = []
    for name in CHOICES:
        bits = 16.0 if name == "bfloat16" else parse_scheme(name).bits_per_weight(sizes.hidden)
        losses = [row for row in demo_rows(by="lowbit") if row.get("commit") in SHOWN and scheme_of(row) == name]
        losses = [
            row for row in losses if row["text"].lower().startswith("wikitext") and row["calibration"] in ("text", None)
        ]
        decoded = shown("decode", method=speeds[name], **alike) if name in speeds else []
        losses = [row for row in losses if "-codes" not in row["method"]]  # they learned the text's kind
        best = min(losses, key=lambda row: row["delta_nll"], default=None)
        cost = f"{loss(best)}, `{best['method']}`" if best else "0" if name == "bfloat16" else ""
        if cost or decoded:
            speed = fixed(decoded[-1]["tokens_per_s"], 0) if decoded else ""
            lines.append([f"`{name}`", fixed(bits, 2), fixed((inside * bits + outside * 16) / 8e9, 2), cost, speed])
    return table("scheme | bits a weight | Llama-2-7B, GB | loss, nats a token | tokens/s, H200, batch 1", lines)


TABLES: dict[str, Callable[[], str]] = {
    "results": results,
    "methods": methods,
    "grids": grids,
    "paired": paired,
    "mixtures": mixtures,
    "codes": codes,
    "beside": beside,
    "quantizers": lambda: beside(QUANTIZERS),
    "gguf": gguf,
    "decode": decode,
    "decode_h200": decode_h200,
    "first_token": first_token,
    "lookup": lookup,
    "drafts": drafts,
    "draft_steps": draft_steps,
    "calibrate": calibrate,
    "readers": readers,
    "vllm": vllm,
    "vllm_h200": vllm_h200,
    "vllm_schemes": vllm_schemes,
    "vllm_own": vllm_own,
    "agreement": agreement,
    "kernels": kernels,
    "wna16_gemv": gemv,
    "numbers": numbers,
    "numbers_steps": numbers_steps,
    "number_peers": number_peers,
    "number_peer_times": number_peer_times,
    "expert_peers": expert_peers,
    "w8a8_fp8": fp8_products,
    "w8a8_blocks": fp8_blocks,
    "w4a8_gemm": int4_by_int8,
    "w4a8_peers": w4a8_peers,
    "prompt_peers": prompt_peers,
    "decode_attention": attention,
    "wna16_gemm": gemm,
    "wna16_prefill": prefill,
    "wna16_dequantize": dequantize,
    "dense_gemv": dense,
    "gptq_block": gptq_block,
    "decode_experts": decode_experts,
    "wna16_experts": wna16_experts,
    "route_experts": route_experts,
    "latent_attention": latent_attention,
    "engines": engines,
    "schemes": schemes,
    "commands": commands,
    "rounding": rounding,
    "serving": serving,
    "served_steps": served_steps,
    "starts": starts,
    "served_peers": served_peers,
    "peer_steps": peer_steps,
    "peer_features": peer_features,
}


def leads() -> list[str]:
    """On how many shapes the rows have our kernels, launched dependent, ahead of every other."""

    def ahead(stem: str, m: int) -> str:
        mine: dict[tuple[int, int], float] = {}
        for row in matching(stem, **W4, m=m, dependent=True):
            mine.setdefault((row["n"], row["k"]), row["us"])
        won = sum(us < float(peer(stem, 4, m, *shape)) for shape, us in mine.items())
        return f"{won} of {len(mine)}"

    few = {ahead("wna16_gemv", m) for m in (1, 2, 4, 8)} | {ahead("wna16_gemm", m) for m in (16, 32)}
    most = ahead("wna16_gemm", 64)
    assert few == {"20 of 20"}, few
    return [f"on all 20 shapes of each run up to m = 32, and on {most.split()[0]} at m = 64"]


def chains() -> list[str]:
    """The share of the floor that a block's four dense products reach."""
    shares = [row["floor_us"] / row["us"] for row in rows("dense_gemv") if row["kernel"].endswith("block")]
    mine, torch = (fixed(100 * share, 0) for share in shares[:2])
    return [f"the four products of a block in a chain {mine}%, torch's {torch}%"]


def sentences() -> dict[str, tuple[str, ...]]:
    """Parts of sentences that a document must have, with their figures from the rows."""

    def rate(batch: int = 1, shape: str = "llama2-7b", **wanted: Any) -> str:
        row = matching("decode", **USUAL | wanted | {"shape": shape, "batch": batch, "prompt": 128})[-1]
        return fixed(row["tokens_per_s"], 0)

    def cost(*wanted: Any) -> str:
        row = scored(on(H100, *wanted), "wikitext")
        assert row is not None, wanted
        return fixed(row["delta_nll"], 2)

    w4, w8, bf16 = rate(method="w4"), rate(method="int8"), rate(method="dense", dtype="bfloat16")
    larger = [rate(batch, "llama2-13b", method="w4") for batch in (1, 8)]
    step = [fixed(first("vllm", engine=f"w4 {by}")["step_ms"]["1"], 2) for by in ("lowbit", "marlin")]
    memory = [fixed(first("memory", method=method)["peak_host_gib"], 1) for method in ("int8", "awq")]
    return {
        "README.md": (
            f"decodes at {w4} tokens a second with 4-bit weights",
            f"bfloat16 reaches {bf16}",
            f"`gptq` at 4 bits costs {cost('gptq')} nats a token",
            f"a peer's GPTQ {cost('llm-compressor-gptq', ASIDE, PEER)} on",
        ),
        "docs/KERNELS.md": (*leads(), *chains()),
        "docs/RESULTS.md": (
            f"Llama-2-7B {w4} with 4 bits, {w8} with int8 weights, {bf16} in bfloat16",
            f"13B {larger[0]} with 4 bits, {larger[1]} at batch 8",
            f"takes {step[0]} ms on our 4-bit kernels, {step[1]} on Marlin's",
            f"`int8` {memory[0]} GiB on",
            f"`awq` with 16 x 512 tokens {memory[1]} GiB",
        ),
    }


def unsaid() -> list[str]:
    """The `sentences` that are missing in the documents."""
    texts = {name: " ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in sentences()}
    return [f"{name}: {part}" for name, parts in sentences().items() for part in parts if part not in texts[name]]


def documents() -> list[Path]:
    """The README and the pages of the site, in order; not the diary."""
    pages = (ROOT / "docs").rglob("*.md")
    return sorted(path for path in (ROOT / "README.md", *pages) if path.parent.name != "history")


def rendered(text: str) -> str:
    """A document's text with every marked table made from the rows."""
    return MARKED.sub(lambda found: found[1] + "\n" + TABLES[found[2]]() + "\n" + found[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(description="the documents' tables of figures, from the rows")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document would change")
    check = parser.parse_args().check
    changed = bool(unsaid())
    sys.stdout.writelines(f"{line}\n" for line in unsaid())
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new == old:
            continue
        changed = True
        names = [str(path.relative_to(ROOT))] * 2
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), *names, n=0))
        if not check:
            path.write_text(new, encoding="utf-8")
    sys.exit(check and changed)


if __name__ == "__main__":
    main()
