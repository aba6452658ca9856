"""The kernels of mixtures of experts, run on the CPU lane by lane: they compute the references; mistakes are found."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit.quant.kernels import packed, route_experts, wna16_experts
from lowbit.quant.kernels.pairs import Chosen
from lowbit.quant.kernels.problem import PART, Deferred, NextNorm
from lowbit.quant.kernels.route_experts import RouteCall, Rule
from lowbit.quant.kernels.wna16_experts import DownCall, Gate, UpCall
from lowbit.quant.kernels.wna16_gemv import CROWD, ROOM, GemvCut
from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.emulator.planted import built, require_found
from tests.kernels.make import make_float
from tests.kernels.test_emulated import HALVES, assert_close, assert_next_norm, random_weight

FLOATS = ("mxfp4-a16", "nvfp4-a16", "fp8-a16")
SOURCES = ("wna16_gemv.cu", "route_experts.cu")


@pytest.fixture(scope="session")
def library() -> Path:
    """The emulated kernels of experts; skips where they cannot be built."""
    return built(only=SOURCES)


def random_chosen(m: int, count: int, top: int) -> Chosen:
    """Distinct experts for every row, with weights of both signs."""
    experts = torch.stack([torch.randperm(count)[:top] for _ in range(m)]).int()
    return Chosen(experts, torch.randn(m, top), count)


def random_experts(
    pick: random.Random, n: int, k: int, dtype: torch.dtype, pair_block: int, floats: bool
) -> packed.PackedWeight:
    """Integers of 4 or 8 bits, or some of `floats`."""
    if floats and pick.random() < 0.4:
        return make_float(pick.choice(FLOATS), n, k, dtype, pair_block=pair_block)
    return random_weight(pick, n, k, pick.choice([4, 8]), dtype, pair_block)


def random_up(pick: random.Random, floats: bool) -> UpCall:
    dtype, m = pick.choice(HALVES), pick.choice([1, 1, 3, 8, 19])
    count, k, n = pick.randint(1, 5), pick.choice([32, 128, 160, 192, 512, 1024]), pick.choice([16, 48, 64, 288])
    chosen = random_chosen(m, count, pick.randint(1, min(count, 4)))
    weight = random_experts(pick, count * n, k, dtype, n, floats)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(count, n).to(dtype) if pick.random() < 0.4 else None
    # results as large as the sums, whose rounding they have
    largest = float((x.float() @ packed.dequantize_packed(weight).T).abs().max())
    gates = Gate("silu_mul"), Gate("gelu_tanh_mul"), Gate("clamped_mul", 0.3 * largest, 1.702)
    deferred = Deferred(torch.rand(m, k // PART) * 40, 1e-3) if k % 64 == 0 and pick.random() < 0.5 else None
    ahead = torch.zeros(count * pick.choice([1, 300]), 64, dtype=torch.int32) if pick.random() < 0.5 else None
    return UpCall(x, weight, chosen, pick.choice(gates), bias, deferred, pick.random() < 0.7, ahead)


def random_cut(pick: random.Random, warps: list[int]) -> GemvCut:
    """A cut with one of these numbers of warps along k."""
    k_warps, crowded = pick.choice(warps), pick.random() < 0.5
    room = CROWD if crowded or k_warps > ROOM else ROOM
    return GemvCut(1, pick.randint(1, room // k_warps), k_warps, 1, room)


def check_up(gpu: Gpu, seeds: range, floats: bool = True) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        call = gpu.put(random_up(pick, floats))
        cut = random_cut(pick, [1, 2, 3, 4, 8, 12, 24])
        gpu.start(seed, (call.x.shape, call.weight.n, call.weight.bits, call.gate, call.chosen.count, cut))
        call.check()
        gpu.late(call.x, call.chosen.experts, call.chosen.weights, call.deferred and call.deferred.squares)
        with gpu:
            y = wna16_experts.run_up(call, cut, None if len(call.x) == 1 else pick.choice([None, 1, 2, 5]))
        assert_close(y, wna16_experts.reference_up(call), call.x.dtype)
        inner = call.weight.n // call.chosen.count // 2
        assert not y[..., inner:].any()


def random_down(pick: random.Random, floats: bool) -> DownCall:
    dtype, m = pick.choice(HALVES), pick.choice([1, 1, 3, 8, 19])
    count, k, n = pick.randint(1, 9), pick.choice([32, 128, 160, 640]), pick.choice([16, 48, 64, 192])
    chosen = random_chosen(m, count, pick.randint(1, count))
    weight = random_experts(pick, count * n, k, dtype, 16, floats)
    x = torch.zeros(m, chosen.top, -(-k // 128) * 128, dtype=dtype)
    x[..., :k] = torch.randn(m, chosen.top, k)
    bias = torch.randn(count, n).to(dtype) if pick.random() < 0.4 else None
    residual = torch.randn(m, n).to(dtype) if pick.random() < 0.7 else None
    size = pick.choice([None, 7, 5000, 100_000])
    ahead = None if size is None else torch.zeros(size, dtype=torch.int8)
    norm = None
    if n % 64 == 0:
        z, squares = torch.full((m, n), torch.nan, dtype=dtype), torch.full((m, n // PART), torch.nan)
        norm = NextNorm(torch.randn(n).to(dtype), z, squares)
    return DownCall(x, weight, chosen, bias, residual, pick.random() < 0.7, ahead, norm)


def check_down(gpu: Gpu, seeds: range, floats: bool = True) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        call = gpu.put(random_down(pick, floats))
        top = call.chosen.top
        cut = random_cut(pick, [top * each for each in (1, 2, 3, 6) if top * each <= CROWD])
        gpu.start(seed, (call.x.shape, call.weight.n, call.weight.bits, call.chosen.count, cut))
        call.check()
        gpu.late(call.x, call.residual)
        if call.next_norm:
            gpu.untouched(call.next_norm.z, call.next_norm.squares)
        with gpu:
            y = wna16_experts.run_down(call, cut)
        assert_close(y, wna16_experts.reference_down(replace(call, next_norm=None)), call.x.dtype)
        if call.next_norm:
            assert_next_norm(y, call.next_norm)


def one_row(call, i: int):
    """`call` of its row i alone."""
    chosen = Chosen(call.chosen.experts[i : i + 1], call.chosen.weights[i : i + 1], call.chosen.count)
    rows = {"x": call.x[i : i + 1], "chosen": chosen}
    if isinstance(call, UpCall) and call.deferred:
        rows["deferred"] = replace(call.deferred, squares=call.deferred.squares[i : i + 1])
    if isinstance(call, DownCall):
        rows |= {"residual": call.residual[i : i + 1], "next_norm": None}
    return replace(call, **rows)


def run_in_four_parts(call: UpCall, cut: GemvCut) -> torch.Tensor:
    """The up of one row by this cut; of several by half as many warps."""
    return wna16_experts.run_up(call, cut if len(call.x) == 1 else wna16_experts.rows_cut(cut, True), cut.k_warps)


def check_bits(gpu: Gpu) -> None:
    """A row has the same bits in every order of the threads, and whoever shares its batch."""
    pick, m = random.Random(0), 5
    chosen = random_chosen(m, 6, 3)
    weights = (
        random_weight(pick, 6 * 96, 512, 4, torch.float16, 96),
        random_weight(pick, 6 * 64, 48 * 8, 4, HALVES[0], 16),
    )
    squares = Deferred(torch.rand(m, 512 // PART) * 40, 1e-3)
    up = UpCall(torch.randn(m, 512).half(), weights[0], chosen, Gate("silu_mul"), None, squares, True)
    down = DownCall(torch.randn(m, 3, 384).half(), weights[1], chosen, None, torch.randn(m, 64).half())
    for call, run, cut in (
        (up, run_in_four_parts, GemvCut(1, 1, 4, 1)),
        (down, wna16_experts.run_down, GemvCut(1, 1, 6, 1)),
    ):
        results = []
        for seed in range(3):
            gpu.start(seed, type(call))
            with gpu:
                results.append(run(gpu.put(call), cut))
        assert all(torch.equal(results[0], result) for result in results)
        for i in range(m):
            gpu.start(i, (type(call), i))
            with gpu:
                alone = run(gpu.put(one_row(call, i)), cut)
            assert torch.equal(alone[0], results[0][i])


def random_route(pick: random.Random) -> RouteCall:
    """Numbers whose sums are exact, among which are many equals; some rows of NaN."""
    dtype, m, groups = pick.choice(HALVES), pick.choice([1, 3, 5]), pick.choice([1, 1, 2, 4, 8])
    experts, k = groups * pick.choice([2, 5, 16, 32]), pick.choice([8, 64, 72, 320, 512])
    used, best = pick.randint(1, groups), pick.choice([1, 2])
    top = pick.randint(1, min(used * (experts // groups), 12))
    scores = pick.choice(["softmax", "sigmoid", "chosen"])
    rule = Rule(top, scores, pick.random() < 0.5, pick.choice([1.0, 2.5]), groups, used, best)
    x, weight = (torch.randint(-1, 2, (rows, k)).to(dtype) for rows in (m, experts))
    if pick.random() < 0.2:
        x[-1, 3] = torch.nan
    bias = torch.randint(-3, 4, (experts,)).to(dtype) if pick.random() < 0.4 else None
    correction = torch.randn(experts) if scores == "sigmoid" and pick.random() < 0.6 else None
    deferred = Deferred(torch.ones(m, k // PART) * 16, 0.0) if k % 64 == 0 and pick.random() < 0.5 else None
    factors = torch.rand(experts) + 0.5 if pick.random() < 0.4 else None
    return RouteCall(x, weight, rule, bias, correction, deferred, pick.random() < 0.7, factors)


def check_route(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        call = gpu.put(random_route(random.Random(seed)))
        gpu.start(seed, (call.x.shape, len(call.weight), call.rule))
        call.check()
        gpu.late(call.x, call.deferred and call.deferred.squares)
        with gpu:
            experts, weights = route_experts.run_kernel(call)
        wanted, wanted_weights = route_experts.reference(call)
        sound = call.x.isfinite().all(1)
        assert torch.equal(experts[sound], wanted[sound])
        assert torch.allclose(weights[sound], wanted_weights[sound], rtol=1e-4, atol=1e-6)
        assert ((experts >= 0) & (experts < len(call.weight))).all()
        assert weights[~sound].isnan().all()


CHECKS = {
    "up": (check_up, range(60)),
    "down": (check_down, range(60)),
    "the same bits in every order": (check_bits,),
    "route_experts": (check_route, range(80)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_compute_the_reference(library: Path, name: str) -> None:
    function, *args = CHECKS[name]
    failure = failure_of(library, function, *args)
    assert failure is None, failure


MUTANTS = {
    "the choice read before it is made": (
        Mutant(
            "wna16_gemv.cu",
            "    wait_for_previous_kernel();\n    stamp(Stage::kWaited);\n",
            "    stamp(Stage::kWaited);\n",
        ),
        (check_up, range(60), False),
        "AssertionError|the previous kernel had finished|waited for the previous one|past the end of a tensor",
    ),
    "experts that take each other's chunks": (
        Mutant("wna16_gemv.cu", "share.first = kDown ? turn", "share.first = kDown ? threadIdx.z - turn * args.top"),
        (check_down, range(60), False),
        "AssertionError",
    ),
    "x read behind its last row": (
        Mutant("wna16_gemv.cu", "min((block + b) * 64, left)", "(block + b) * 64"),
        (check_up, range(60), False),
        "AssertionError|past the end of a tensor",
    ),
    "of equals not the first": (
        Mutant("route_experts.cu", "better += keys.x > mine;", "better += keys.x >> 32 > mine >> 32;"),
        (check_route, range(80)),
        "AssertionError",
    ),
    "logits read before all blocks have sent theirs": (
        Mutant("route_experts.cu", "if (cluster) wait_for_messages(&values.sent);\n  else", "if (!cluster)"),
        (check_route, range(80)),
        "AssertionError|after it had left|before it had begun",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(library: Path, name: str) -> None:
    mutant, (function, *args), expected = MUTANTS[name]
    require_found(mutant, built(mutant, SOURCES), function, *args, expected=expected)
