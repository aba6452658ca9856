"""A program for torchrun: all ranks together quantize one model by each of RECIPES, or by those named.

Arguments: the model, the output directory, a device, names.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from lowbit.calibrate import ranks
from lowbit.calibrate.budget import spend
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.job import Job, prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import assist, run
from lowbit.calibrate.resume import journaled
from lowbit.models.source import open_source
from tests.builders import calibration

QUICK = {"group_size": 32}
RECIPES = {
    "rtn": {"method": "rtn", **QUICK},
    "awq": {"method": "awq", **QUICK},
    "gptq": {"method": "gptq", "symmetric": False, "transforms": ("rotate",), **QUICK},
    "smoothquant": {"method": "smoothquant"},
    "fp8": {"method": "gptq", "scheme": "fp8"},
    "signround": {"method": "signround", "iters": 8, **QUICK},
    "best": {"method": "best", "iters": 4, "distill_steps": 4, **QUICK},
    "target_bits": {"method": "awq", "target_bits": 5.5, **QUICK},
}
SAMPLES, LENGTH = 10, 512  # batches of 4, 4 and 2 sequences


def job_of(name: str, source: Path, device: str) -> tuple[Job, CalibrationSet | None]:
    """The job of the recipe called `name` on the model in `source`, and its calibration tokens."""
    job = prepare(open_source(str(source)), complete_recipe(RECIPES[name]), ranks.own_device(device))
    tokens = calibration(SAMPLES, LENGTH) if job.recipe.dataset else None
    return (spend(job, tokens) if job.recipe.target_bits and tokens else job), tokens


def quantize_all(source: Path, output: Path, device: str, recipes: Iterable[str] = RECIPES) -> None:
    """A checkpoint in `output` for each recipe. An existing journal is resumed."""
    for name in recipes:
        job, tokens = job_of(name, source, device)
        with journaled(output / name, job, tokens, resume=True) as journal:
            if ranks.leads():
                (output / name).mkdir(parents=True, exist_ok=True)
                run(job, output / name, tokens, lambda report: None, journal)
            else:
                assist(job, tokens, journal)


if __name__ == "__main__":
    ranks.join()
    quantize_all(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:] or RECIPES)
    ranks.leave()
