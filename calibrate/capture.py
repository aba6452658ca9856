"""Observation of a running block: linears with a common input, and statistics of that input."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.quant.naming import EXPERT
from lowbit.quant.site import Site
from lowbit.quant.stats import Stats, nothing_seen, stats_of


def sites_of(calls: Iterable[tuple[tuple[str, ...], Tensor]]) -> list[Site]:
    """Linears grouped by input tensor, in order of first use.

    calls  names and inputs from LinearInputs; all inputs must still be alive, since groups are told apart by address
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    widths: dict[tuple[Any, ...], int] = {}
    for names, x in calls:
        key = (x.data_ptr(), x.shape[-1], x.numel())
        groups.setdefault(key, []).extend(name for name in names if name not in groups.get(key, []))
        widths[key] = x.shape[-1]
    return [Site(tuple(names), widths[key]) for key, names in groups.items()]


class SiteStats:
    """Statistics of every site, gathered while batches run under `LinearInputs`."""

    def __init__(self, sites: list[Site]) -> None:
        self._first = {site.linears[0]: site for site in sites}
        self._stats: dict[str, Stats] = {}
        self._missing = set(self._first)
        self._with_gram = True

    @property
    def complete(self) -> bool:
        """True if every site has been seen since `next_batch`."""
        return not self._missing

    def next_batch(self, with_gram: bool) -> None:
        """Start a new batch: no site has been seen in it yet.

        with_gram  True to add to Gram matrices too; those of experts get every batch
        """
        self._missing = set(self._first)
        self._with_gram = with_gram

    def see(self, names: tuple[str, ...], x: Tensor) -> None:
        """Add the tokens of `x`. Only the first linear of a site counts; the others see the same tokens."""
        for name in names:
            if name in self._first:
                self._missing.discard(name)
                known = self._stats.get(name)
                fresh = stats_of(x, self._with_gram or bool(EXPERT.search(name)))
                self._stats[name] = fresh if known is None else known + fresh

    def broken(self) -> Site | None:
        """A site with NaN or infinite inputs, or None."""
        return next(
            (self._first[name] for name, stats in self._stats.items() if not bool(stats.abs_max.isfinite().all())), None
        )

    def add_up(self, device: str) -> None:
        """Sum the statistics over all ranks; afterwards every rank has the same."""
        for name, site in self._first.items() if ranks.count() > 1 else ():
            known = self._stats.get(name) or nothing_seen(site.width, device)
            tokens, gram_tokens = ranks.total(torch.tensor([known.tokens, known.gram_tokens])).tolist()
            if tokens:
                gram = known.gram if known.gram is not None else known.abs_max.new_zeros(site.width, site.width)
                self._stats[name] = Stats(
                    tokens,
                    ranks.total(known.abs_sum),
                    ranks.largest(known.abs_max),
                    ranks.total(gram) if gram_tokens else None,
                    gram_tokens,
                )

    def of(self, linear: str) -> Stats | None:
        """The statistics of the site that `linear` belongs to; None if no token reached it."""
        for first, site in self._first.items():
            if linear in site.linears:
                return self._stats.get(first)
        return None
