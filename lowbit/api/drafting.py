"""`lowbit.tune_drafter`: a drafter's head, tuned on the text that a quantized model writes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lowbit.api.quantizing import Stage
from lowbit.api.recording import store
from lowbit.api.shared import ignore
from lowbit.arguments import typed
from lowbit.calibrate.data import BuiltinPart, builtin_text
from lowbit.engine.drafts.eagle import Eagle
from lowbit.engine.drafts.lessons import Writer
from lowbit.engine.drafts.training import Plan, acceptance, open_head, reason_against, train, trained
from lowbit.engine.engine import Engine
from lowbit.engine.loader import load, require_drafter, with_drafter
from lowbit.errors import CheckpointError, UsageError
from lowbit.export.checkpoint import Checkpoint
from lowbit.export.staging import refuse_output, staged
from lowbit.models.files import model_directory
from lowbit.progress import Step, watched_by

STEPS = 200  # of the optimizer
RATE = 2e-4  # a tenth of that of a new head
ROWS, TOGETHER = 8, 64  # texts of a step, and those that are written at a time
TEXTS, HELD_OUT = 128, 8  # prompts that are learned, and others that are measured
PROMPT, NEW = 64, 128  # tokens of a prompt, and written behind it


@dataclass(frozen=True)
class Tuned:
    """A tuned drafter.

    output  its directory; None if the drafter drafts no less as it is
    before, after  tokens a step, greedy, behind prompts that were not learned
    row     all of it as JSON values
    """

    output: Path | None
    before: float
    after: float
    row: dict[str, Any]


@typed()
def tune_drafter(
    checkpoint: str | Path,
    drafter: str | Path,
    output: str | Path,
    *,
    device: str = "auto",
    steps: int = STEPS,
    overwrite: bool = False,
    progress: Callable[[Any], None] = ignore,
) -> Tuned:
    """Tune an EAGLE-3 head for the model in `checkpoint` on text that this writes itself, and write it to `output`.

    >>> import lowbit
    >>> lowbit.tune_drafter("my-model", "my-model", "my-head")
    Traceback (most recent call last):
        ...
    lowbit.errors.CheckpointError: my-model/config.json: architectures are ['LlamaForCausalLM'], no drafter; known...

    A head was trained with the unquantized model, whose features and choices are others. Nothing is written if the
    tuned head drafts no more tokens than before. What was measured goes to the checkpoint's rows and report.

    checkpoint  a directory, as `quantize` writes it
    drafter     the head's directory, or a hub id
    steps       of the optimizer, of 8 texts each
    progress    called with each event

    Raises CheckpointError for a head of another model, or of a kind that is not trained.
    """
    if steps < 1:
        raise UsageError(f"{steps} steps of tuning: at least 1 is needed")
    place, target = model_directory(str(checkpoint)), Path(output)
    with watched_by(progress):
        refuse_output(target, overwrite)
        head = require_tunable(place, str(drafter))
        progress(Stage("loading the checkpoint with its drafter"))
        plain = load(place, device, context=PROMPT + NEW)
        learned, held = _prompts(plain, "calibration", TEXTS), _prompts(plain, "heldout", HELD_OUT)
        progress(Stage("measuring the drafter"))
        drafted = with_drafter(plain, head.directory)
        before, _ = acceptance(drafted, held, NEW)
        found = _tuned(drafted, head, learned, (steps, progress))
        with TemporaryDirectory(dir=target.absolute().parent) as scratch:
            made = Path(scratch)
            save_file(found, made / "model.safetensors", metadata={"format": "pt"})
            copyfile(head.directory / "config.json", made / "config.json")
            progress(Stage("measuring the tuned drafter"))
            after, right = acceptance(with_drafter(plain, made), held, NEW)
            if after > before:
                with staged(target, overwrite) as staging:
                    for file in made.iterdir():  # the contents alone: what is temporary is for its owner's eyes
                        copyfile(file, staging / file.name)
    row = {"evaluation": "drafts", "drafter": head.directory.name, "tokens_per_step": round(after, 4)}
    row |= {"right": [round(share, 4) for share in right], "baseline": {"tokens_per_step": round(before, 4)}}
    row |= {"steps": steps, "prompt": PROMPT, "output": NEW, "device": str(plain.decoder.weights.device)}
    store(place, [row])
    return Tuned(target if after > before else None, before, after, row)


def require_tunable(checkpoint: Path, drafter: str) -> Checkpoint:
    """The drafter that is named. CheckpointError if it was made for another model, or is of a kind that is not
    trained."""
    head = require_drafter(checkpoint, model_directory(drafter))
    if reason := reason_against(head):
        raise CheckpointError(f"{head.head}: the drafter cannot be tuned: {reason}")
    return head


def _tuned(
    model: Engine, head: Checkpoint, prompts: list[list[int]], how: tuple[int, Callable[[Any], None]]
) -> dict[str, Tensor]:
    """The tensors of the drafter after its training.

    how  steps, progress
    """
    steps, progress = how
    assert isinstance(model.head, Eagle)
    progress(Stage("writing texts of the checkpoint's own"))
    writer = Writer(model, model.head.taps, TOGETHER, PROMPT + NEW)
    parts = [prompts[first : first + TOGETHER] for first in range(0, len(prompts), TOGETHER)]
    lessons = [each for part in parts for each in writer.lessons(writer.write(part, NEW), model.head.targets, ROWS)]
    learned = open_head(head, model.decoder.weights.embedding.float())
    train(learned, lessons, Plan(math.inf, RATE, most=steps), lambda done: progress(Step("tuning", done, steps)))
    return trained(head, learned)


def _prompts(model: Engine, part: BuiltinPart, count: int) -> list[list[int]]:
    """Prompts of builtin text."""
    tokens = model.encode(builtin_text(part))
    found = [tokens[first : first + PROMPT] for first in range(0, len(tokens), len(tokens) // count)]
    return [prompt for prompt in found if len(prompt) == PROMPT][:count]
