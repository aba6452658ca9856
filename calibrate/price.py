"""Prices of schemes: bits, bytes as written, or time of a decoding step, as integers that an exact solver adds up."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.calibrate.job import Job
from lowbit.errors import CheckpointError
from lowbit.export.engines.engine import FusedLinear
from lowbit.export.engines.lowbit import LOWBIT
from lowbit.export.engines.steps import DENSE, STEPS, kernel_of
from lowbit.export.format import bytes_written
from lowbit.models.skeleton import LinearSpec
from lowbit.quant.naming import EXPERT
from lowbit.quant.scheme import Scheme


@dataclass(frozen=True)
class Price(ABC):
    """The unit that a budget is counted in.

    job     its format and dtypes determine prices
    target  the budget, in `unit`
    digits  decimals of a price that is said in `unit`
    """

    job: Job
    target: float
    unit, digits = "", 4

    @abstractmethod
    def of(self, specs: Sequence[LinearSpec], scheme: Scheme | None) -> int | None:
        """The price of a fused set in a scheme (None: in 16 bits); None if it is not known."""

    @abstractmethod
    def limit(self, weights: int) -> int:
        """The budget as a price, for this number of weights."""

    def rest(self) -> int:
        """The price of all that is outside the sets."""
        return 0

    @abstractmethod
    def told(self, price: int, weights: int) -> float:
        """A price in `unit`."""

    def enough(self, price: int, weights: int) -> float:
        """A price in `unit`, rounded up to `digits`: a budget of it suffices."""
        whole = 10**self.digits
        return math.ceil(round(whole * self.told(price, weights), 3)) / whole


class Bits(Price):
    """Bits per linear weight: codes, scales and zeros."""

    unit = "bits a weight"

    def of(self, specs: Sequence[LinearSpec], scheme: Scheme | None) -> int:
        """Bits of the set."""
        width = 8 * self.job.dtype.itemsize
        scales = 8 * self.job.scale_dtype.itemsize
        bits = (width if scheme is None else scheme.bits_per_weight(spec.k, scales) for spec in specs)
        return round(sum(spec.n * spec.k * each for spec, each in zip(specs, bits, strict=True)))

    def limit(self, weights: int) -> int:
        """All bits."""
        return int(round(self.target * weights, 3))  # 4.1 times a million is no less than 4100000

    def told(self, price: int, weights: int) -> float:
        """The average."""
        return price / max(weights, 1)


class Bytes(Price):
    """Bytes of all tensors of the checkpoint."""

    unit, digits = "bytes", 0

    def of(self, specs: Sequence[LinearSpec], scheme: Scheme | None) -> int:
        """Bytes of the set as written."""
        return sum(self.job.bytes_of(spec.name, spec.n, spec.k, scheme) for spec in specs)

    def limit(self, weights: int) -> int:
        """The target itself."""
        return int(self.target)

    def rest(self) -> int:
        """Bytes of the head, if it is quantized, and of all that stays as it is outside the sets."""
        return self.job.bytes_outside()

    def told(self, price: int, weights: int) -> float:
        """Bytes."""
        return price


class Time(Price):
    """Milliseconds per token of lowbit's engine at batch 1, by the model of `export/engines/steps.py`."""

    unit, digits = "ms a token", 6

    def of(self, specs: Sequence[LinearSpec], scheme: Scheme | None) -> int | None:
        """Nanoseconds of the set's products; None for a kernel that no step was measured with."""
        return self._ns([(spec.n, spec.k) for spec in specs], scheme)

    def _ns(self, shapes: Sequence[tuple[int, int]], scheme: Scheme | None) -> int | None:
        step, fmt = STEPS[self.job.recipe.target_gpu], self.job.format
        kernel: str | None = DENSE
        if scheme is not None:
            layer = FusedLinear(fmt, scheme, sum(n for n, _ in shapes), shapes[0][1])
            kernel = kernel_of(LOWBIT.choose(layer, step.capability)[0], scheme)
        if kernel is None:
            return None
        if scheme is None or kernel == DENSE:  # expanded in memory
            nbytes = sum(n * k for n, k in shapes) * self.job.dtype.itemsize
        else:
            nbytes = sum(bytes_written(fmt, scheme, n, k, self.job.scale_dtype) for n, k in shapes)
        return round(1e6 * step.ms(nbytes, kernel))

    def limit(self, weights: int) -> int:
        """Nanoseconds."""
        return round(1e6 * self.target)

    def rest(self) -> int:
        """Nanoseconds of blocks without their weights, and of the head. CheckpointError for a model with experts."""
        step, job = STEPS[self.job.recipe.target_gpu], self.job
        if any(EXPERT.search(name) for name in job.linears):
            raise CheckpointError("--target-ms knows no steps with experts: give --target-bits or --target-size")
        head = job.skeleton.model.get_output_embeddings()
        n, k = (0, 0) if head is None else head.weight.shape
        scheme = None if job.plan.head is None else job.plan.head.scheme
        products = self._ns([(n, k)], scheme) or self._ns([(n, k)], None) or 0
        return round(1e3 * step.block_us * len(job.skeleton.blocks)) + products

    def told(self, price: int, weights: int) -> float:
        """Milliseconds."""
        return price / 1e6


def price_of(job: Job) -> Price:
    """The price that the recipe's target is counted in."""
    recipe = job.recipe
    if recipe.target_bits is not None:
        return Bits(job, recipe.target_bits)
    if recipe.target_size is not None:
        return Bytes(job, recipe.target_size)
    assert recipe.target_ms is not None
    return Time(job, recipe.target_ms)
