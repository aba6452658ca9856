"""The kernel chosen for each problem, and the objections of the others."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowbit.quant.kernels import extension, reference, wna16_gemm, wna16_gemv
from lowbit.quant.kernels.describe import EXAMPLES, describe_examples, describe_problem
from lowbit.quant.kernels.extension import reason_against_capability
from lowbit.quant.kernels.problem import Problem
from lowbit.quant.kernels.registry import KERNELS, choose_kernel
from lowbit.quant.kernels.wna16_gemv import MAX_WARPS, choose_cut, most_staged_bytes

ON_CPU = Problem(1, 4096, 4096, 4, 128, torch.float16, "cpu")
ON_H100 = replace(ON_CPU, device="cuda", capability=(9, 0), processors=132)


def test_the_cpu_gets_the_reference_and_is_told_why() -> None:
    assert choose_kernel(ON_CPU).name == "reference"
    assert "not wna16_gemv: the tensors are on the cpu" in describe_problem(ON_CPU)


def test_every_problem_on_a_cpu_has_a_kernel() -> None:
    assert KERNELS[-1].reason_against(replace(ON_CPU, m=10**6)) is None


def test_many_rows_are_declined_with_their_number() -> None:
    assert wna16_gemv.reason_against(replace(ON_H100, m=65)) == "65 rows: it takes at most 64"


def test_more_rows_of_a_stream_are_multiplied_dense_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (extension, reference):
        monkeypatch.setattr(module, "EXTENSION", SimpleNamespace(architectures="80 90a"))
    three = replace(ON_H100, bits=3)
    assert choose_kernel(replace(three, m=16)).name == "wna16_gemv"
    assert choose_kernel(replace(three, m=17)).name == "wna16_dequantize"
    assert choose_kernel(replace(three, m=17, capability=(8, 0))).name == "wna16_gemv"
    assert "3 bits: it takes 4 and 8" in str(wna16_gemm.reason_against(three))


def test_a_gpu_that_nothing_was_built_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (extension, reference):
        monkeypatch.setattr(module, "EXTENSION", SimpleNamespace(architectures="80 90a"))
    assert choose_kernel(replace(ON_H100, m=32)).name == "wna16_gemm"
    on_sm_120 = replace(ON_H100, capability=(12, 0))
    with pytest.raises(RuntimeError, match=r"wna16_dequantize: the GPU is sm_120, \S+_C was built for 80 90a"):
        choose_kernel(on_sm_120)
    assert describe_problem(on_sm_120).startswith(f"no kernel takes {on_sm_120}")


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), "90a", True),
        ((9, 0), "80", False),
        ((8, 9), "80 86", True),
        ((8, 0), "86", False),
        ((10, 0), "90a", False),
        ((10, 0), "80 90+PTX", True),
        ((8, 9), "80+PTX", True),
        ((9, 0), "80+PTX", False),  # it waits neither for a cluster nor for the previous kernel
        ((10, 0), "80+PTX 90a", False),
        ((7, 5), "80 90a 90+PTX", False),
    ],
)
def test_built_architectures(capability, architectures, runs) -> None:
    assert (reason_against_capability(capability, architectures) is None) == runs


@pytest.mark.parametrize("m", [1, 8, 16, 33, 64])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1000, 96), (4096, 4096), (4096, 14336), (5120, 13824), (57344, 8192)])
@pytest.mark.parametrize("bits", [4, 8])
def test_launches_are_possible(m: int, n: int, k: int, bits: int) -> None:
    launch = choose_cut(replace(ON_H100, m=m, n=n, k=k, bits=bits))
    assert 1 <= launch.row_warps * launch.k_warps <= MAX_WARPS
    assert launch.k_warps * launch.cluster <= max(1, -(-k // 128))
    assert choose_cut(replace(ON_H100, m=m, n=n, k=k, bits=bits, capability=(8, 0))).cluster == 1


def test_every_example_names_its_kernel() -> None:
    texts = describe_examples()
    assert len(texts) == len(EXAMPLES)
    first, *reasons = texts[0].splitlines()
    assert re.fullmatch(r"m    1  4096 x 4096  w4 g128 float16: (reference|wna16_gemv)", first)
    assert "    not wna16_gemm: 1 rows: wna16_gemv is faster" in reasons


def test_a_norm_leaves_room_for_the_sums_on_every_gpu() -> None:
    # Shared memory a block may have, less the largest set of partial sums: 32 rows x 64 columns x 9 in float32.
    for capability, kilobytes in (((8, 0), 163), ((8, 6), 99), ((8, 9), 99), ((9, 0), 227)):
        assert most_staged_bytes(capability) <= (kilobytes << 10) - 32 * 64 * 9 * 4 - 1024
