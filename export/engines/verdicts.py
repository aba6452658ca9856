"""The ways in which engines run a file's linears on each generation of GPUs."""

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import groupby

from lowbit.export.engines.engine import FAILS, VERDICTS, FusedLinear
from lowbit.export.engines.sglang import SGLANG
from lowbit.export.engines.table import ENGINES, MACHINES
from lowbit.export.engines.vllm import VLLM

Verdicts = dict[str, dict[str, str]]  # engine -> machine -> one of VERDICTS


def verdicts_of(layers: Iterable[FusedLinear], refused: Container[str] = ()) -> Verdicts:
    """The worst way in which any of `layers` runs, by engine and machine.

    refused  engines that do not load the model's family
    """
    kinds = set(layers)
    # SGLang's layers derive from vLLM's, and what is known of families is known of vLLM
    missing = {*((VLLM.name, SGLANG.name) if VLLM.name in refused else ()), *(n for n in ENGINES if n in refused)}
    return {
        name: {
            machine: FAILS
            if name in missing
            else max((engine.verdict(layer, capability) for layer in kinds), key=VERDICTS.index, default=FAILS)
            for machine, capability in MACHINES.items()
        }
        for name, engine in ENGINES.items()
    }


def describe(verdicts: Mapping[str, str]) -> str:
    """The machines of each verdict, from the best on: `runs on sm_100, sm_120; weights alone on sm_75 to sm_90`."""
    machines = [(machine.rpartition(", ")[2], verdict) for machine, verdict in verdicts.items()]
    if len(set(verdicts.values())) == 1:
        return f"{machines[0][1]} everywhere"
    found = []
    for verdict in VERDICTS:
        runs = [[name for name, _ in run] for same, run in groupby(machines, lambda each: each[1]) if same == verdict]
        places = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in _split_cpu(runs)]
        found += [f"{verdict} on {', '.join(places)}"] if places else []
    return "; ".join(found)


def _split_cpu(runs: list[list[str]]) -> Iterator[list[str]]:
    """Runs of machines, with the CPU, which is no GPU's successor, as a run of its own."""
    for run in runs:
        gpus = [name for name in run if name != "CPU"]
        yield from [part for part in (gpus, [name for name in run if name == "CPU"]) if part]
