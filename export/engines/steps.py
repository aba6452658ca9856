"""The time of a decoding step of lowbit's engine at batch 1, by GPU: a few numbers, fitted to measured rows.

ms = blocks * block_us / 1000 + the sum over kernels of MB of weights / rate in GB/s

A block's time is that of attention over 128 tokens, norms and launches. `benchmarks/fit_steps.py` fits the numbers to
`benchmarks/results/decode.jsonl` (Llama-2-7B and 13B, Llama-3-8B, ChatGLM2-6B, CodeGeeX-13B).
"""

from dataclasses import dataclass

from lowbit.quant.scheme import Scheme

COARSE, FINE, DENSE, INT8_INPUTS = "wna16, 4 bits", "wna16, 8 bits", "16 bits", "w8a8"


@dataclass(frozen=True)
class Step:
    """The numbers of a GPU.

    capability  its compute capability
    block_us    microseconds of a block, weights aside
    rates       GB/s at which weights are read, by kernel
    error       largest relative error of the rows that were fitted
    """

    capability: int
    block_us: float
    rates: dict[str, float]
    error: float

    def ms(self, nbytes: int, kernel: str) -> float:
        """Milliseconds for reading so many bytes of weights."""
        return nbytes / self.rates[kernel] / 1e6


STEPS = {
    "H100": Step(90, 9.5, {COARSE: 2614.5, FINE: 2740.8, DENSE: 2773.1, INT8_INPUTS: 2596.8}, 0.059),
    "H200": Step(90, 10.8, {COARSE: 3322.1, FINE: 3849.9, DENSE: 3861.9, INT8_INPUTS: 3633.0}, 0.031),
}


def kernel_of(name: str | None, scheme: Scheme) -> str | None:
    """The key of `rates` for the kernel that lowbit chooses for a scheme; None if no step with it was measured."""
    if name == "wna16" and scheme.number.is_integer:
        return {4: COARSE, 8: FINE}.get(scheme.bits)
    return {"w8a8": INT8_INPUTS, "expanded to 16 bits": DENSE}.get(name or "")
