"""docs/FAMILIES.md: results for every type of transformers, tried on tiny random models.

    python -m tests.families.table             all types (an hour of one core; --jobs shares it out among several)
    python -m tests.families.table llama aria  these again; the other rows stay
    python -m tests.families.table --failing   those again that have a cell which does not work
    python -m tests.families.table --vllm PY   the column of vLLM alone, by the Python of its environment: see vllm.py

Rows are stored next to this file, in rows.json. Each type is tried in a separate process with limits of time and
memory. A cell says "works", or gives the reason in a few words.
"""

import argparse
import json
import multiprocessing
import re
import resource
import signal
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import compressed_tensors
import torch
import transformers
from transformers import CompressedTensorsConfig

from lowbit import engine
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.calibrate.plan import Plan
from lowbit.errors import LowbitError
from lowbit.evaluation.backend import load_dense
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import open_source
from lowbit.models.walk import Walk
from tests.builders import calibration
from tests.families.tiny import save_tiny, tiny_model, tiny_size, types
from tests.families.vllm import MOST_USED, WORKS, cells_of

ROWS, PAGE = Path(__file__).with_name("rows.json"), Path(__file__).parents[2] / "docs" / "FAMILIES.md"
SECONDS, MEMORY = 240, 8 << 30  # of one type
LARGEST = 60_000_000  # parameters of a model that counts as tiny
BATCHES = [calibration(2, 24, seed=seed).ids + 3 for seed in (11, 12)]
# 8 bits show every mistake: a fold missing on one side moves the logits by more than half.
METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "awq": {"method": "awq", "bits": 8, "group_size": 32},
    "gptq": {"method": "gptq", "bits": 8, "group_size": 32},
    "smoothquant": {"method": "smoothquant", "alpha": 0.5},
}
LIMIT = 0.25  # relative error of the logits: a token near a tie may go to another expert
COLUMNS = ("linears", "blocks", *METHODS, "transformers", "vllm", "engine")
TOLD = "told"  # before a cell that repeats what the command says before the work

INTRODUCTION = """# Families

Every causal and image-text type of transformers {} as a tiny random model: the default configuration of its class,
shrunk. Made by `make families`, with compressed-tensors {}. All methods round to 8 bits here: any mistake shows in
their logits.

- linears: how many are quantized; how many are left, each with its reason in the report
- blocks: logits computed a block at a time are transformers', for two batches of different tokens
- int8, awq, gptq, smoothquant: quantized, written and read again, the logits are the original's but for rounding
- transformers: loads the int8 output into the class that it names, no weight missing, with the same logits;
  dequantized: with CompressedTensorsConfig(dequantize=True) alone; told: not at all. The command says both before the
  work
- vllm: the most used families in vLLM 0.32 on a CPU, int8 weights and inputs, and 4 bits by gptq, have the
  log-probabilities of the dequantized model; one of them alone, where the other does not. Its CPU kernels for
  quantized experts ask for AMX, which the machine of this page does not have
- engine: lowbit's own computes the unquantized model's logits

How many work:

"""

Row = dict[str, str]
Logits = list[torch.Tensor]


def row_of(kind: str, directory: Path) -> Row:
    """The cells of a type, or, under "none", the reason why it has no row."""
    try:
        size = tiny_size(kind)
        model = tiny_model(kind) if size <= LARGEST else None
    except Exception as error:  # noqa: BLE001  # whatever a type may raise is a cell
        return {"none": f"no tiny configuration ({type(error).__name__})"}
    if model is None:
        return {"none": "not tiny when shrunk"}
    source = save_tiny(kind, directory / "model")
    try:
        open_source(str(source))
    except LowbitError as error:
        if "no decoder language model" in str(error):
            return {"none": "no decoder language model"}
    try:
        wanted = logits_of(model)
    except Exception as error:  # noqa: BLE001  # whatever a type may raise is a cell
        alone = "does not run on text alone" if "pixel" in str(error) or "image" in str(error) else "does not run"
        return {"none": f"transformers {alone}"}
    cells = {"blocks": cell(lambda: blocks_cell(source, wanted))}
    for method in METHODS:
        cells |= method_cells(method, source, directory / method, wanted)
    cells.setdefault("linears", "-")
    cells["transformers"] = transformers_cell(source, directory / "int8") if works(cells, "int8") else "-"
    cells["engine"] = cell(lambda: engine_cell(source, wanted))
    return cells


def cell(check: Callable[[], str | None]) -> str:
    """The result of `check`: "works" for None, or the exception in words."""
    try:
        return check() or WORKS
    except LowbitError as error:
        return f"refused: {in_words(str(error))}"
    except Exception as error:  # noqa: BLE001  # whatever a type may raise is a cell
        return f"fails: {type(error).__name__}"


def in_words(message: str) -> str:
    """The beginning of an error's text without paths, whole words of it."""
    return textwrap.shorten(re.sub(r"/\S+: ", "", message), 60, placeholder="").rstrip(" ,:(")


def works(row: Row, column: str) -> bool:
    return row.get(column, "").startswith(WORKS)


@torch.no_grad()
def logits_of(model: Any) -> Logits:
    return [model(input_ids=ids, use_cache=False).logits.float() for ids in BATCHES]


def distance(found: Iterable[torch.Tensor], wanted: Logits) -> float:
    """The largest relative distance of a batch's logits; infinite where they are no numbers."""
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def blocks_cell(source: Path, wanted: Logits) -> str | None:
    """True if logits computed a block at a time are transformers'."""
    walk = Walk(open_skeleton(open_source(str(source))), "cpu", torch.float32)
    hidden = walk.start(BATCHES)
    with torch.no_grad():
        for index in range(len(walk.skeleton.blocks)):
            with walk.loaded(index):
                hidden = [walk.run(index, states) for states in hidden]
        error = distance(walk.logits(BATCHES, hidden), wanted)
    return None if error < 1e-4 else f"differs by {error:.1g}"


def method_cells(method: str, source: Path, output: Path, wanted: Logits) -> Row:
    """The cell of a method; of `int8` also what became of the linears."""
    cells: Row = {}

    def check() -> str | None:
        job = prepare(open_source(str(source)), complete_recipe(METHODS[method]), "cpu")
        cells["linears"] = linears_cell(job.plan)
        output.mkdir()
        run(job, output, calibration() if job.recipe.dataset else None, lambda report: None)
        error = distance(logits_of(load_dense(open_source(str(output)))), wanted)
        return None if error < LIMIT else f"differs by {error:.1g}"

    cells[method] = cell(check)
    return cells


def linears_cell(plan: Plan) -> str:
    """Counts of quantized linears and of those left in 16 bits, as text."""
    return f"{len(plan.schemes)}, {len(plan.left)} left"


def transformers_cell(source: Path, output: Path) -> str:
    """The result of loading the quantized model in transformers as the command says, or what the command says of it."""
    caveats = prepare(open_source(str(source)), complete_recipe(METHODS["int8"]), "cpu").caveats()
    told = [text for text, engines in caveats.items() if TRANSFORMERS.name in engines]
    dense = any("dequantize=True" in text for text in told)
    found = cell(lambda: loaded_cell(output, dense))
    if found != WORKS:
        return next((f"{TOLD}: {in_words(text)}" for text in told if "dequantize=True" not in text), found)
    return f"{WORKS} dequantized" if dense else found


def loaded_cell(output: Path, dense: bool) -> str | None:
    """None if transformers loads the quantized model into the class that it names, and computes the same.

    dense  weights as they were before they are packed, as the user asks of it
    """
    kind = getattr(transformers, open_source(str(output)).config.architectures[0])
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dense else {}
    theirs, info = kind.from_pretrained(output, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"] or info["unexpected_keys"]:
        return "weights missing"
    error = distance(logits_of(theirs.eval()), logits_of(load_dense(open_source(str(output)))))
    return None if error < 1e-3 else f"differs by {error:.1g}"


def engine_cell(source: Path, wanted: Logits) -> str | None:
    """True if our engine computes the unquantized model's logits."""
    try:
        loaded = engine.load(str(source), "cpu", torch.float32)
    except LowbitError:
        return "none: not among its families"
    error = distance((loaded.logits(ids) for ids in BATCHES), wanted)
    return None if error < 1e-4 else f"differs by {error:.1g}"


def try_type(kind: str) -> Row:
    """The row of a type, tried in a process of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, sender))
    process.start()
    row = receiver.recv() if receiver.poll(SECONDS + 10) else {"none": "took too long or too much memory"}
    process.kill()
    process.join()
    return row


def _child(kind: str, sender: Any) -> None:
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        sender.send(row_of(kind, Path(directory)))


def page_of(rows: dict[str, Row]) -> str:
    """docs/FAMILIES.md from the rows."""
    tried = {kind: row for kind, row in rows.items() if "none" not in row}
    lines = [
        *INTRODUCTION.format(transformers.__version__, compressed_tensors.__version__).splitlines(),
        *(f"- {share_line(column, tried)}" for column in COLUMNS if column != "linears"),
        "",
        f"| type | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    lines += [
        f"| {kind} | {' | '.join(word(row.get(c, '-')) for c in COLUMNS)} |" for kind, row in sorted(tried.items())
    ]
    lines += ["", "## Why not", ""]
    for column in (name for name in COLUMNS if name not in ("linears", "engine")):
        asked = {kind: row[column] for kind, row in tried.items() if column in row}
        lines += listed(column, {kind: text for kind, text in asked.items() if not text.startswith(WORKS)})
    lines += ["", "## Types without a row", ""]
    lines += listed("", {kind: row["none"] for kind, row in rows.items() if "none" in row})
    return "\n".join(lines) + "\n"


def word(text: str) -> str:
    """A cell of the table: a count or a success unchanged, else the first word of the message."""
    return text if text[0].isdigit() or text.startswith(WORKS) else re.split(r"[ :]", text)[0]


def listed(column: str, reasons: dict[str, str]) -> list[str]:
    """One line per reason with its types."""
    kinds: dict[str, list[str]] = {}
    for kind, reason in sorted(reasons.items()):
        kinds.setdefault(f"{column}: {reason}" if column else reason, []).append(kind)
    items = [f"- {reason}: {', '.join(those)}" for reason, those in sorted(kinds.items())]
    return [line for item in items for line in textwrap.wrap(item, 118, subsequent_indent="  ", break_on_hyphens=False)]


def share(column: str, rows: dict[str, Row]) -> float:
    """The part of the rows whose cell in `column` works, of those that have one."""
    asked = [row for row in rows.values() if column in row]
    return sum(works(row, column) for row in asked) / max(len(asked), 1)


def share_line(column: str, rows: dict[str, Row]) -> str:
    asked = sum(column in row for row in rows.values())
    return f"{column}: {round(share(column, rows) * asked)} of {asked} ({share(column, rows):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/FAMILIES.md.")
    parser.add_argument("types", nargs="*", help="types to try again; all where none is named")
    parser.add_argument("--failing", action="store_true", help="try those again that have a cell which does not work")
    parser.add_argument("--jobs", type=int, default=1, help="types tried at once, each with a core and up to 8 GiB")
    parser.add_argument("--vllm", metavar="PYTHON", help="make the column of vLLM alone, with this Python")
    args = parser.parse_args()
    rows: dict[str, Row] = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    if args.vllm:
        with tempfile.TemporaryDirectory() as directory:
            for kind, text in cells_of(args.vllm, Path(directory), args.types or MOST_USED).items():
                keep(rows, kind, rows[kind] | {"vllm": text})
        return
    chosen = args.types or types()
    if args.failing:
        chosen = [kind for kind in chosen if not all(works(rows.get(kind, {}), c) for c in ("blocks", *METHODS))]
    with ThreadPoolExecutor(args.jobs) as pool:
        for kind, row in zip(chosen, pool.map(try_type, chosen), strict=True):
            known = {name: text for name, text in rows.get(kind, {}).items() if name == "vllm"}
            keep(rows, kind, row | known)


def keep(rows: dict[str, Row], kind: str, row: Row) -> None:
    """Take a type's row into `rows`, their file and the page."""
    rows[kind] = row
    click.echo(f"{kind}: {row}")
    ROWS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    PAGE.write_text(page_of(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
