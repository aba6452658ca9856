"""latent_attention: the reference against heads of keys and values, the kernel against the reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.kv_cache import CACHE_NUMBERS, KVCache, empty_cache, loaded
from lowbit.quant.kernels.latent_attention import RANK, TURNED, LatentCall, choose_splits, reference
from tests.kernels.make import opcheck

CONTEXT = 700
HEADS, STILL, V_DIM = 3, 24, 20


def make_call(
    positions: list[int],
    dtype: torch.dtype,
    device: str = "cpu",
    heads: int = HEADS,
    sizes: tuple[int, int] = (RANK, TURNED),
    cache: str = "same",
) -> LatentCall:
    """Tokens of a sequence each, with views of one product's outputs, in a cache of random rows."""
    rank, turned = sizes
    m, context, like = len(positions), max(*positions, CONTEXT) + 1, torch.empty(0, dtype=dtype, device=device)
    scales = (torch.full((1,), 0.02, device=device),) * 2
    number = CACHE_NUMBERS[cache]
    k, v = (empty_cache(number, (m * context, 1, width), like, scales) for width in (rank, turned))
    held = KVCache(k.k, v.k, k.k_scales, v.k_scales)
    if cache == "same":
        held.k.copy_(torch.randn(held.k.shape)), held.v.copy_(torch.randn(held.v.shape))
    rows = torch.randn(m, heads * (STILL + turned) + rank + turned).to(device, dtype)
    q, compressed, tail = rows.split([heads * (STILL + turned), rank, turned], -1)
    angles = torch.rand(context, turned // 2 + 4) * 6
    where = torch.tensor(positions, device=device)
    absorbed = torch.randn(heads, m, rank).to(device, dtype) / 2
    return LatentCall(
        absorbed,
        q.unflatten(-1, (heads, -1))[..., STILL:],
        compressed,
        tail,
        (torch.rand(rank) + 0.5).to(device, dtype),
        angles.cos().to(device),
        angles.sin().to(device),
        where,
        torch.arange(m, device=device) * context,
        where,
        held,
        (STILL + turned) ** -0.5,
        1e-6,
    )


def copied(call: LatentCall) -> LatentCall:
    """The same call with a cache of its own."""
    return replace(call, cache=KVCache(*(None if part is None else part.clone() for part in vars(call.cache).values())))


def rotated(x: Tensor, call: LatentCall) -> Tensor:
    """x (m, ..., turned), each row by its own angles, in complex numbers."""
    half = x.shape[-1] // 2
    turn = torch.complex(call.cosines[call.turns, :half], call.sines[call.turns, :half])
    pairs = torch.complex(x[..., :half], x[..., half:]) * turn.view(-1, *[1] * (x.ndim - 2), half)
    return torch.cat([pairs.real, pairs.imag], -1)


def test_scores_and_values_are_those_of_heads():
    call = make_call([0, 9, 63], torch.float32, sizes=(32, 8))
    keys, values = torch.randn(HEADS, STILL, 32), torch.randn(HEADS, V_DIM, 32)
    still = torch.randn(3, HEADS, STILL)
    call = replace(call, q=torch.einsum("mhs,hsr->hmr", still, keys))
    out = torch.einsum("hmr,hvr->mhv", ops.attend_latent(call), values)
    for row, position in enumerate([0, 9, 63]):
        seen = slice(int(call.starts[row]), int(call.starts[row]) + position + 1)
        rows, tails = call.cache.k[seen, 0], call.cache.v[seen, 0]
        k = torch.cat([torch.einsum("tr,hsr->hts", rows, keys), tails.expand(HEADS, -1, -1)], -1)
        q = torch.cat([still[row], rotated(call.q_turned, call)[row]], -1)
        weights = (torch.einsum("hd,htd->ht", q, k) * call.scale).softmax(-1)
        wanted = torch.einsum("ht,tr,hvr->hv", weights, rows, values)
        torch.testing.assert_close(out[row], wanted, atol=1e-4, rtol=1e-4)


def test_the_newest_rows_are_normed_rotated_and_stored():
    call = make_call([7, 0], torch.float32, sizes=(32, 8))
    others = call.cache.k.clone()
    ops.attend_latent(call)
    slots = call.starts + call.positions
    x = call.compressed
    wanted = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + call.norm_eps) * call.norm
    torch.testing.assert_close(call.cache.k[slots, 0], wanted)
    torch.testing.assert_close(call.cache.v[slots, 0], rotated(call.turned, call))
    others[slots] = call.cache.k[slots]
    assert torch.equal(call.cache.k, others)


def test_other_caches_are_read_as_they_are_stored():
    call = make_call([0, 3], torch.float32, cache="int8")
    ops.attend_latent(call)
    exact = replace(make_call([0, 3], torch.float32), **{n: getattr(call, n) for n in ("compressed", "turned", "norm")})
    reference(replace(exact, cosines=call.cosines, sines=call.sines))
    slots = call.starts + call.positions
    step = call.cache.k_scales[slots].unsqueeze(-1)
    assert ((loaded(call.cache.k, call.cache.k_scales) - exact.cache.k)[slots].abs() <= 0.5001 * step).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions has the shape"),
        ({"norm": torch.ones(8)}, "norm has the shape"),
        ({"turned": torch.zeros(8, 2).T}, r"turned is torch.float32 \(2, 8\), strides \(1, 2\)"),
        ({"compressed": torch.zeros(2, 16)}, "compressed is torch.float32"),
        ({"cosines": torch.zeros(9, 3), "sines": torch.zeros(9, 3)}, "tables"),
        ({"cache": KVCache(torch.zeros(9, 1, 16), torch.zeros(9, 1, 8))}, "for rows of 32 and 8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attend_latent(replace(make_call([1, 2], torch.float32, sizes=(32, 8)), **change))


def test_the_operator_passes_opcheck():
    opcheck(ops.attend_latent, make_call([3, 5], torch.float32, sizes=(32, 8)))


def assert_as_the_reference(call: LatentCall, out: Tensor, wanted: LatentCall) -> None:
    """The result and the stored rows are the reference's, to roundings of halves."""
    mean, slots = reference(wanted), call.starts + call.positions
    slack = 2.0**-9 if out.dtype == torch.float16 else 2.0**-6
    assert (out.float() - mean.float()).abs().max() <= slack * mean.float().abs().max()
    for part, same in ((call.cache.k, wanted.cache.k), (call.cache.v, wanted.cache.v)):
        torch.testing.assert_close(part[slots].float(), same[slots].float(), atol=slack / 4, rtol=slack)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [16, 3, 128])
def test_the_gpu_computes_the_reference(heads, dtype):
    for positions in ([0], [63, 64, 65, 0], [699, 5], list(range(500, 516))):
        for norm in (True, False):
            call = make_call(positions, dtype, "cuda", heads)
            call = call if norm else replace(call, norm=None)
            wanted, again = copied(call), copied(call)
            out = ops.attend_latent(call)
            assert_as_the_reference(call, out, wanted)
            assert torch.equal(ops.attend_latent(again), out)


@pytest.mark.gpu
def test_on_a_gpu_a_row_does_not_see_its_batch_and_graphs_replay():
    call = replace(make_call([699, 5, 64, 300], torch.bfloat16, "cuda", 16), longest=CONTEXT)
    alone = copied(call)
    whole = ops.attend_latent(call)
    for row in range(4):
        views = {name: getattr(alone, name)[row : row + 1] for name in ("q_turned", "compressed", "turned", "turns")}
        views |= {name: getattr(alone, name)[row : row + 1] for name in ("starts", "positions")}
        one = replace(alone, q=alone.q[:, row : row + 1].contiguous(), **views)
        assert torch.equal(ops.attend_latent(one)[:, 0], whole[:, row])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend_latent(call)
    for positions in ([0, 1, 2, 3], [698, 64, 63, 128]):
        call.positions.copy_(torch.tensor(positions))
        graph.replay()
        assert_as_the_reference(call, out, copied(call))


def test_splits_depend_on_the_longest_sequence_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for rows in ([1], [1, 2, 3]):
        call = make_call(rows, torch.float16)
        assert [choose_splits(replace(call, longest=n)) for n in (0, 1, 64, 65, 512, 4096)] == [8, 1, 1, 2, 8, 8]
