"""A layer's experts for few rows against the floor of the experts that the rows touch, in bfloat16.

    python -m benchmarks.bench_wna16_experts --commit $(git rev-parse --short HEAD)
    python -m benchmarks.bench_wna16_experts --commit $(git rev-parse --short HEAD) --sweep

prints rows and writes benchmarks/results/wna16_experts.jsonl: microseconds in a graph with dependent launch of the
choice, of up, of down and of all three, each row's experts chosen at random; with --sweep those of up and of down for
every split, and wna16_experts_sweep.jsonl.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import CALLS, Floor, run_facts, time_calls, write_rows
from lowbit.engine.shapes import random_weight
from lowbit.quant.kernels import ops, wna16_experts
from lowbit.quant.kernels.packed import PackedWeight, prepack
from lowbit.quant.kernels.pairs import Chosen
from lowbit.quant.kernels.route_experts import RouteCall, Rule
from lowbit.quant.kernels.wna16_experts import DownCall, Gate, UpCall
from lowbit.quant.kernels.wna16_gemv import CROWD, ROOM, GemvCut
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import parse_scheme

RESULTS = Path(__file__).with_name("results")
DTYPE = torch.bfloat16
ROWS = (1, 2, 4, 8, 16)
COPIES = 2  # of a layer: calls choose other experts each time, and so read what L2 does not hold


@dataclass(frozen=True)
class Layer:
    """A layer's sizes: `count` experts of hidden x inner, `top` of a row."""

    hidden: int
    inner: int
    count: int
    top: int


SHAPES = {
    "qwen3-30b-a3b": Layer(2048, 768, 128, 8),
    "mixtral-8x7b": Layer(4096, 14336, 8, 2),
    "gpt-oss-20b": Layer(2880, 2880, 32, 4),
    "glm-4.5-air": Layer(4096, 1408, 128, 8),
    "deepseek-v2-lite": Layer(2048, 1408, 64, 6),
}


class Case:
    """Random weights of a layer and random choices, for calls that each read other memory."""

    def __init__(self, layer: Layer, scheme: str, m: int) -> None:
        self.layer, self.m = layer, m
        like = torch.empty(0, dtype=DTYPE, device="cuda")
        self.copies = [self.weights(scheme, like) for _ in range(COPIES)]
        self.router = torch.randn(layer.count, layer.hidden, dtype=DTYPE, device="cuda")
        self.x = torch.randn(m, layer.hidden, dtype=DTYPE, device="cuda")
        self.chosen = [self.choice() for _ in range(CALLS)]
        self.inner = ops.experts_up(self.up(0))

    def weights(self, scheme: str, like: Tensor) -> tuple[PackedWeight, PackedWeight]:
        """Gate and up, and down, of all experts."""
        layer, made = self.layer, []
        for n, k, paired in ((2 * layer.inner, layer.hidden, True), (layer.hidden, layer.inner, False)):
            weight = random_weight(layer.count * n, k, parse_scheme(scheme), like)
            assert isinstance(weight, QTensor)
            made.append(prepack(weight, DTYPE, n if paired else 16))
        return made[0], made[1]

    def choice(self) -> Chosen:
        """Random experts of every row."""
        experts = torch.rand(self.m, self.layer.count, device="cuda").topk(self.layer.top).indices.int()
        return Chosen(experts, torch.rand(self.m, self.layer.top, device="cuda"), self.layer.count)

    def up(self, i: int, chosen: Chosen | None = None) -> UpCall:
        """The call of up with choice `i`."""
        chosen = chosen or self.chosen[i]
        up, down = self.copies[i % COPIES]
        return UpCall(self.x, up, chosen, Gate("silu_mul"), dependent=True, next_weight=down.words)

    def down(self, i: int, inner: Tensor, chosen: Chosen | None = None) -> DownCall:
        """The call of down with choice `i`."""
        weight = self.copies[i % COPIES][1]
        return DownCall(inner, weight, chosen or self.chosen[i], residual=self.x, dependent=True)

    def route(self) -> Chosen:
        """The choice that the router makes."""
        call = RouteCall(self.x, self.router, Rule(self.layer.top), dependent=True)
        return Chosen(*ops.route_experts(call), self.layer.count)

    def whole(self, i: int) -> Tensor:
        """The choice, whose result is not used, then up and down with choice `i`."""
        self.route()
        return self.experts(i)

    def experts(self, i: int) -> Tensor:
        """Up and down with choice `i`."""
        return ops.experts_down(self.down(i, ops.experts_up(self.up(i))))

    @property
    def distinct(self) -> float:
        """Mean number of distinct experts of a choice."""
        return sum(len(chosen.experts.unique()) for chosen in self.chosen) / len(self.chosen)

    def nbytes(self) -> tuple[float, float]:
        """Mean bytes of up and of down that a call reads."""
        share = self.distinct / self.layer.count
        return self.copies[0][0].nbytes * share, self.copies[0][1].nbytes * share


def timed(call: Callable[[int], object]) -> float:
    """Microseconds of one call, over all choices."""
    return time_calls([lambda i=i: call(i) for i in range(CALLS)]).us


def measure(name: str, scheme: str, m: int, floor: Floor) -> dict:
    """The figures of one layer."""
    case = Case(SHAPES[name], scheme, m)
    up, down = case.nbytes()
    return {
        "shape": name,
        "scheme": scheme,
        "m": m,
        "distinct": round(case.distinct, 2),
        "route_us": timed(lambda i: case.route()),
        "up_us": timed(lambda i: ops.experts_up(case.up(i))),
        "up_floor_us": floor.time(int(up)).us,
        "down_us": timed(lambda i: ops.experts_down(case.down(i, case.inner))),
        "down_floor_us": floor.time(int(down)).us,
        "layer_us": timed(case.whole),
        "layer_floor_us": floor.time(int(up + down)).us,
    }


def sweep(name: str, scheme: str, m: int) -> Iterator[dict]:
    """The times of up and down for every split of k."""
    case, top = Case(SHAPES[name], scheme, m), SHAPES[name].top
    for room in (ROOM, CROWD):
        for k_warps in (*range(1, 9), 12, 16, 24):
            for row_warps in (1, 2, 4):
                if row_warps * k_warps > room:
                    continue
                cut = GemvCut(1, row_warps, k_warps, 1, room)
                row = {"shape": name, "m": m, "room": room, "k_warps": k_warps, "row_warps": row_warps}
                row["up_us"] = timed(lambda i, cut=cut: wna16_experts.run_up(case.up(i), cut))
                if k_warps % top == 0:
                    row["down_us"] = timed(lambda i, cut=cut: wna16_experts.run_down(case.down(i, case.inner), cut))
                yield row


def main() -> None:
    """Measures every shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    facts, rows, floor = run_facts(args.commit), [], None if args.sweep else Floor()
    for name in args.shapes:
        layer, scheme = SHAPES[name], parse_scheme(args.scheme)
        if reason := scheme.reason_against_shape(layer.inner, layer.hidden):
            print(f"{name}: {reason}")
            continue
        for m in args.rows:
            made = sweep(name, args.scheme, m) if floor is None else [measure(name, args.scheme, m, floor)]
            for row in made:
                rows.append(row | facts)
                print(row, flush=True)
            torch.cuda.empty_cache()
    write_rows(args.results / f"wna16_experts{'_sweep' if args.sweep else ''}.jsonl", rows)


if __name__ == "__main__":
    main()
