"""What calibration sees while a block runs: which linears share an input, and the statistics of it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from quant.site import Site
from quant.stats import Stats, stats_of


def sites_of(calls: Iterable[tuple[tuple[str, ...], Tensor]]) -> list[Site]:
    """Linears grouped by the input they were seen with, in order of first use.

    calls  names and inputs as LinearInputs reported them; the inputs must all still be alive, or addresses repeat
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    widths: dict[tuple[Any, ...], int] = {}
    for names, x in calls:
        key = (x.data_ptr(), x.shape[-1], x.numel())
        groups.setdefault(key, []).extend(name for name in names if name not in groups.get(key, []))
        widths[key] = x.shape[-1]
    return [Site(tuple(names), widths[key]) for key, names in groups.items()]


class SiteStats:
    """Statistics of every site, gathered while batches run under `LinearInputs`.

    gram_tokens  how many tokens the Gram matrix of a site should see; later tokens add to the other sums alone
    """

    def __init__(self, sites: list[Site], gram_tokens: int) -> None:
        self._first = {site.linears[0]: site for site in sites}
        self._gram_tokens = gram_tokens
        self._stats: dict[str, Stats] = {}
        self._missing = set(self._first)

    @property
    def complete(self) -> bool:
        """Whether every site has been seen since `next_batch`."""
        return not self._missing

    def next_batch(self) -> None:
        """A batch begins, in which no site has been seen."""
        self._missing = set(self._first)

    def see(self, names: tuple[str, ...], x: Tensor) -> None:
        """Add the tokens of `x`; linears of a site after the first see the same tokens and are passed over."""
        for name in names:
            if name in self._first:
                self._missing.discard(name)
                known = self._stats.get(name)
                with_gram = known is None or known.gram_tokens < self._gram_tokens
                fresh = stats_of(x, with_gram)
                self._stats[name] = fresh if known is None else known + fresh

    def broken(self) -> Site | None:
        """A site that has seen an input that is NaN or infinite, or None."""
        return next(
            (self._first[name] for name, stats in self._stats.items() if not bool(stats.abs_max.isfinite().all())), None
        )

    def of(self, linear: str) -> Stats | None:
        """The statistics of the site that `linear` belongs to; None where no token reached it."""
        for first, site in self._first.items():
            if linear in site.linears:
                return self._stats.get(first)
        return None
