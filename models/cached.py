"""Keys and values as attention stores them in a cache: seen, and rounded as an FP8 cache rounds them.

transformers' models get their attention function from one table, and call it with queries (B, heads, T, D), rotated
keys and values (B, kv_heads, T, D). Their lookup in that table is replaced for as long as a context lasts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.errors import CheckpointError
from lowbit.models.products import straight_through
from lowbit.models.skeleton import Skeleton
from lowbit.quant.numbers import FP8
from lowbit.quant.numerics import fake_quantize_inputs

See = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@contextmanager
def attending(see: See) -> Iterator[None]:
    """A context in which `see(module, queries, keys, values)` gives each attention its keys and values."""
    table: Any = ALL_ATTENTION_FUNCTIONS
    before = table.get_interface

    def get_interface(name: Any, default: Any) -> Any:
        attend = before(name, default)

        def seeing(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            return attend(module, query, *see(module, query, key, value), *args, **kwargs)

        return seeing

    table.get_interface = get_interface
    try:
        yield
    finally:
        table.get_interface = before


@contextmanager
def rounded_cache(skeleton: Skeleton, cache: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """A context in which the keys and values of the modules in `cache` are rounded by these scales; in the backward
    pass rounding counts as the identity. CheckpointError, when the model attends, for other numbers of scales than one
    or one per head."""
    if not cache:
        yield
        return
    scales = {skeleton.model.get_submodule(name): pair for name, pair in cache.items()}

    def see(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if module not in scales:
            return key, value
        k_scale, v_scale = (scale.to(key.device) for scale in scales[module])
        for name, scale, heads in (("keys", k_scale, key.shape[1]), ("values", v_scale, value.shape[1])):
            if scale.numel() not in (1, heads):
                raise CheckpointError(
                    f"{skeleton.source.directory}: {scale.numel()} scales of a cache of {name} with {heads} heads; "
                    "one, or one per head, is expected"
                )
        k_rounds, v_rounds = (partial(fake_quantize_inputs, number=FP8, scale=scale) for scale in (k_scale, v_scale))
        return straight_through(k_rounds, key), straight_through(v_rounds, value)

    with attending(see):
        yield


def file_name(skeleton: Skeleton, module: str) -> str:
    """The name that the file's tensors give to a module of the model, which transformers may have renamed."""
    for block in skeleton.blocks:
        for spec in block.linears if module.startswith(f"{block.name}.") else ():
            if spec.placement.parameter.removesuffix(".weight").rpartition(".")[0] == module:
                return spec.name.rpartition(".")[0]
    raise CheckpointError(f"{module}: it attends, but none of its own linears makes its keys; leave out --kv-cache")
