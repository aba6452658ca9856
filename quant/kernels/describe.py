"""Text about the extension's build, and about the kernel chosen for each of a list of shapes, with reasons."""

import torch

from lowbit.quant.kernels.extension import EXTENSION
from lowbit.quant.kernels.problem import Problem, place_of
from lowbit.quant.kernels.registry import choose_kernel, kernels_for

# (m, n, k, bits, group size, inputs in codes): a layer of a 7B model, the largest of a 70B one, and special cases.
EXAMPLES = (
    (1, 4096, 4096, 4, 128, False),
    (8, 12288, 4096, 4, 128, False),
    (1, 4096, 4096, 3, 128, False),
    (16, 4096, 14336, 8, -1, False),
    (64, 57344, 8192, 4, 64, False),
    (255, 4096, 4096, 4, 128, False),
    (1, 22016, 4096, 8, -1, False),
    (64, 22016, 4096, 4, 128, True),
    (1, 4096, 4096, 8, -1, True),
    (2048, 28672, 4096, 8, -1, True),
    (8, 22016, 4096, 16, -1, False),
)
H100 = ("cuda", (9, 0), 132, False)


def describe_build() -> str:
    """One line with the CUDA version and architectures of lowbit.quant._C, or a note that it is not built."""
    if EXTENSION is None:
        return "lowbit.quant._C: not built; the plain-torch reference runs everywhere"
    major, minor = divmod(EXTENSION.cuda_version // 10, 100)
    return f"lowbit.quant._C: CUDA {major}.{minor}, architectures {EXTENSION.architectures}"


def local_gpu() -> tuple[str, tuple[int, int] | None, int, bool]:
    """`place_of` this machine's first GPU, or of an H100 if there is none."""
    return place_of(torch.device("cuda", 0)) if torch.cuda.is_available() else H100


def describe_problem(problem: Problem) -> str:
    """The chosen kernel, its launch, and the objections of all kernels before it; or the reason why there is none."""
    try:
        chosen = choose_kernel(problem)
    except RuntimeError as error:
        return str(error)
    lines = [f"{problem}: {chosen.name}"]
    if chosen.choose_cut is not None:
        lines.append(f"    {chosen.choose_cut(problem)}")
    kernels = kernels_for(problem)
    for kernel in kernels[: kernels.index(chosen)]:
        lines.append(f"    not {kernel.name}: {kernel.reason_against(problem)}")
    return "\n".join(lines)


def describe_examples() -> list[str]:
    """The kernel chosen for each of EXAMPLES on this machine's GPU, or on an H100 if there is none."""
    place = local_gpu()
    return [
        describe_problem(Problem(m, n, k, bits, group_size, torch.float16, *place, code_inputs=code_inputs))
        for m, n, k, bits, group_size, code_inputs in EXAMPLES
    ]
