"""lowbit: language models in few bits.

The public functions (lowbit.quantize, lowbit.load, ...) are imported at their first use. Each folder of the repository
is a subpackage: quant is lowbit.quant, engine is lowbit.engine.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lowbit.extras import missing

if TYPE_CHECKING:
    from lowbit.api.converting import convert as convert
    from lowbit.api.drafting import tune_drafter as tune_drafter
    from lowbit.api.evaluating import divergence as divergence
    from lowbit.api.evaluating import evaluate as evaluate
    from lowbit.api.evaluating import perplexity as perplexity
    from lowbit.api.inspecting import inspect as inspect
    from lowbit.api.pushing import push as push
    from lowbit.api.quantizing import quantize as quantize
    from lowbit.api.reporting import report as report
    from lowbit.engine.loader import load as load
    from lowbit.engine.sampling import Sampling as Sampling
    from lowbit.quant.recipe import Recipe as Recipe

__version__ = "0.1.0"

# Public name -> the module that has it.
_PUBLIC = {
    "Recipe": "lowbit.quant.recipe",
    "Sampling": "lowbit.engine.sampling",
    "convert": "lowbit.api.converting",
    "divergence": "lowbit.api.evaluating",
    "evaluate": "lowbit.api.evaluating",
    "inspect": "lowbit.api.inspecting",
    "load": "lowbit.engine.loader",
    "perplexity": "lowbit.api.evaluating",
    "push": "lowbit.api.pushing",
    "quantize": "lowbit.api.quantizing",
    "report": "lowbit.api.reporting",
    "tune_drafter": "lowbit.api.drafting",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        raise missing(f"lowbit.{name}", error) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
