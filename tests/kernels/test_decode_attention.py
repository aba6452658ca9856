"""append_heads and decode_attention: the reference against torch's own attention, the kernels against the reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import decode_attention, ops
from lowbit.quant.kernels.decode_attention import (
    MAX_SPLITS,
    PLAIN_BYTES,
    SHORT,
    AppendCall,
    AttentionCall,
    KVCache,
    append_reference,
    attend_reference,
    choose_splits,
    choose_warps,
    loaded,
    most_bytes,
)
from tests.kernels.make import opcheck

CONTEXT = 96
# heads, kv_heads, head_dim: multi-head, grouped (by 4, by 7, by 16), and widths that fill no lane count
SHAPES = [(4, 4, 128), (8, 2, 64), (14, 2, 64), (32, 2, 128), (4, 1, 256), (3, 3, 80), (2, 2, 16)]


def make_cache(slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, int8: bool, device: str) -> KVCache:
    kind = torch.int8 if int8 else dtype
    k, v = (torch.zeros(slots, kv_heads, head_dim, dtype=kind, device=device) for _ in range(2))
    if not int8:
        return KVCache(k, v)
    return KVCache(k, v, *(torch.zeros(slots, kv_heads, dtype=dtype, device=device) for _ in range(2)))


def make_append(shape, positions: list[int], dtype: torch.dtype, int8: bool, device: str = "cpu") -> AppendCall:
    """Random heads for one token of each of several sequences; the rest of the cache is random too."""
    heads, kv_heads, head_dim = shape
    m, context = len(positions), max(*positions, CONTEXT) + 1
    cache = make_cache(m * context, kv_heads, head_dim, dtype, int8, device)
    for codes, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        if scales is None:
            codes.copy_(torch.randn(codes.shape))
        else:
            codes.copy_(torch.randint(-127, 128, codes.shape))
            scales.copy_(torch.rand(scales.shape) * 0.02 + 0.002)
    where = torch.tensor(positions, device=device)
    angles = torch.rand(context, head_dim // 2) * 6
    qkv = torch.randn(m, (heads + 2 * kv_heads) * head_dim).to(device, dtype)
    slots = where + torch.arange(m, device=device) * context
    q_norm, k_norm = (torch.rand(head_dim).to(device, dtype) + 0.5 for _ in range(2))
    return AppendCall(qkv, where, slots, angles.cos().to(device), angles.sin().to(device), cache, q_norm, k_norm, 1e-6)


def attention_of(call: AppendCall, q: Tensor, **settings) -> AttentionCall:
    return AttentionCall(
        q, call.cache, call.slots - call.positions, call.positions, call.cache.head_dim**-0.5, **settings
    )


def test_a_sink_takes_its_share_of_every_softmax():
    call = make_append((4, 2, 16), [0, 11, 40], torch.float32, int8=False)
    q, sinks = ops.append_heads(call), torch.tensor([-1.0, 0.0, 2.0, -torch.inf])
    out, plain = (ops.attend(attention_of(call, q, sinks=each)).unflatten(1, (4, -1)) for each in (sinks, None))
    k = call.cache.k[call.slots[0]].repeat_interleave(2, 0)
    score = (q[0].view(4, 16) * k).sum(-1) / 4  # the first row sees one position
    torch.testing.assert_close(out[0], plain[0] * torch.sigmoid(score - sinks).unsqueeze(1))
    torch.testing.assert_close(out[:, 3], plain[:, 3])


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_torchs(shape, window):
    call = make_append(shape, [0, 11, 40], torch.float32, int8=False)
    q = ops.append_heads(call)
    out = ops.attend(attention_of(call, q, window=window))
    heads, kv_heads, head_dim = shape
    for row, position in enumerate([0, 11, 40]):
        start = int(call.slots[row]) - position
        seen = slice(max(start, start + position + 1 - window) if window else start, start + position + 1)
        kept = (part[seen].transpose(0, 1) for part in (call.cache.k, call.cache.v))
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in kept)
        wanted = torch.nn.functional.scaled_dot_product_attention(q[row].view(heads, 1, head_dim), k, v)
        torch.testing.assert_close(out[row], wanted.flatten(), atol=1e-5, rtol=1e-5)


def test_a_softcap_bounds_scores():
    call = make_append((2, 1, 16), [30], torch.float32, int8=False)
    q = 8 * ops.append_heads(call)
    out = ops.attend(attention_of(call, q, softcap=3.0))
    scores = q.view(2, 16) @ call.cache.k[:31, 0].T / 4
    wanted = (3 * torch.tanh(scores / 3)).softmax(-1) @ call.cache.v[:31, 0]
    torch.testing.assert_close(out.view(2, 16), wanted, atol=1e-5, rtol=1e-5)


def test_heads_are_normed_turned_and_stored():
    call = make_append((2, 1, 16), [7], torch.float32, int8=False)
    q = ops.append_heads(call).view(2, 16)
    heads = call.qkv.view(4, 16)
    normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-6)
    turn = torch.complex(call.cosines[7], call.sines[7])
    for got, wanted in ((q, normed[:2] * call.q_norm), (call.cache.k[7], normed[2:3] * call.k_norm)):
        turned = torch.complex(wanted[:, :8], wanted[:, 8:]) * turn
        torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1))
    assert torch.equal(call.cache.v[7], heads[3:])


def test_int8_keeps_a_head_to_half_a_step_of_its_own_scale():
    call = make_append((2, 2, 32), [7, 9], torch.float32, int8=True)
    plain = replace(call, cache=make_cache(len(call.cache.k), 2, 32, torch.float32, False, "cpu"))
    ops.append_heads(call)
    ops.append_heads(plain)
    for codes, scales, exact in (
        (call.cache.k, call.cache.k_scales, plain.cache.k),
        (call.cache.v, call.cache.v_scales, plain.cache.v),
    ):
        error = (loaded(codes, scales) - exact)[call.slots].abs()
        assert (error <= scales[call.slots].unsqueeze(-1) * 0.5001).all()
        assert (codes[call.slots].abs().amax(-1) == 127).all()


def test_a_zero_head_is_stored_as_zeros():
    call = make_append((1, 1, 16), [3], torch.float16, int8=True)
    call.qkv.zero_()
    ops.append_heads(call)
    assert not call.cache.k[3].any()
    assert not call.cache.v[3].any()
    assert (call.cache.k_scales[3] > 0).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_rows_are_no_work(device):
    call = make_append((2, 1, 16), [3], torch.float16, False, device)
    call = replace(call, qkv=call.qkv[:0], positions=call.positions[:0], slots=call.slots[:0])
    q = ops.append_heads(call)
    assert ops.attend(attention_of(call, q)).shape == q.shape == (0, 32)


@pytest.mark.parametrize("part", [0, 1, 2])  # the head of q, of k, of v
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_int8_does_not_hide_what_is_no_number(device, dtype, part):
    call = make_append((1, 1, 16), [3, 40], dtype, True, device)
    call.qkv[1, 16 * part + 5] = torch.nan
    out = ops.attend(attention_of(call, ops.append_heads(call)))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions has the shape"),
        ({"qkv": torch.zeros(2, 24)}, "holds no q beside 2 heads"),
        ({"qkv": torch.zeros(2, 96, dtype=torch.float64)}, "int8 has scales"),
        ({"k_norm": torch.zeros(8)}, "k_norm has the shape"),
        ({"k_norm": torch.zeros(16).half()}, "k_norm is torch.float16 on cpu; torch.float32 on cpu is needed"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots is torch.int32"),
        ({"qkv": torch.zeros(96, 2).T}, r"strides \(1, 2\); contiguous \(2, 96\) is needed"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    call = make_append((2, 2, 16), [7, 9], torch.float32, int8=False)
    with pytest.raises(ValueError, match=message):
        ops.append_heads(replace(call, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions is torch.int32 on cpu; torch.int64 on cpu"),
        ({"starts": torch.zeros(3, dtype=torch.int64)}, "starts has the shape"),
        ({"q": torch.zeros(2, 64)[:, :32]}, r"strides \(64, 1\); contiguous \(2, 32\) is needed"),
        ({"q": torch.zeros(2, 48)}, "no multiple of 2 heads of 16"),
        ({"adjacent": 3}, "3 adjacent rows of 2, a window of 0: they divide the rows"),
        ({"adjacent": 2, "window": 4}, "2 adjacent rows of 2, a window of 4"),
        ({"cache": make_cache(200, 2, 16, torch.float16, True, "cpu")}, "k_scales is torch.float16"),
    ],
)
def test_attention_refuses_what_does_not_fit(change, message):
    call = make_append((2, 2, 16), [7, 9], torch.float32, int8=True)
    with pytest.raises(ValueError, match=message):
        ops.attend(replace(attention_of(call, torch.zeros(2, 32)), **change))


def test_a_cut_depends_on_sizes_alone():
    for m, shape, processors, long, short in (
        (1, (32, 32, 128), 132, 8, 4),
        (2, (32, 32, 128), 132, 5, 4),
        (4, (32, 32, 128), 132, 2, 2),
        (8, (32, 32, 128), 132, 1, 1),
        (8, (40, 40, 128), 132, 2, 1),
        (16, (32, 32, 128), 132, 2, 1),
        (1, (32, 8, 128), 132, 8, 4),
        (1, (28, 4, 128), 132, 8, 4),
        (1, (32, 32, 128), 0, 1, 1),
    ):
        call = make_append(shape, [5] * m, torch.float16, int8=False)
        q = torch.zeros(m, shape[0] * shape[2], dtype=torch.float16)
        splits = [choose_splits(attention_of(call, q, longest=most), processors) for most in (0, 4096, SHORT)]
        assert splits == [long, long, short]
        assert choose_splits(attention_of(call, q, window=128), processors) == short


@pytest.mark.parametrize(
    ("shape", "splits", "longest", "int8", "warps"),
    [
        ((32, 32, 128), 1, 2176, True, 8),
        ((32, 32, 128), 4, 0, True, 8),
        ((32, 32, 128), 5, 2176, True, 4),
        ((32, 32, 128), 1, SHORT, True, 4),
        ((4, 1, 256), 1, 2176, True, 4),
        ((32, 32, 128), 1, 2176, False, 4),
    ],
)
def test_long_int8_caches_get_more_warps(shape, splits, longest, int8, warps):
    call = make_append(shape, [5], torch.float16, int8)
    q = torch.zeros(1, shape[0] * shape[2], dtype=torch.float16)
    assert choose_warps(attention_of(call, q, longest=longest), splits) == warps


def test_the_bytes_of_a_cache_are_those_of_its_longest_sequence():
    call = make_append((32, 32, 128), [5] * 8, torch.float16, int8=False)
    q = torch.zeros(8, 4096, dtype=torch.float16)
    assert most_bytes(attention_of(call, q, longest=2176)) == 8 * 2176 * 32 * 128 * 2 * 2 > PLAIN_BYTES
    assert most_bytes(attention_of(call, q, longest=2176, window=512)) == 8 * 512 * 32 * 128 * 2 * 2 < PLAIN_BYTES
    assert most_bytes(attention_of(call, q)) == 0


def test_operators_pass_opcheck():
    call = make_append((2, 2, 16), [7, 9], torch.float32, int8=True)
    opcheck(ops.append_heads, replace(call, k_norm=None))
    attention = AttentionCall(
        torch.randn(2, 32), call.cache, call.slots - call.positions, call.positions, 0.25, 4, 0.0, 64
    )
    opcheck(ops.attend, attention)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compute_the_reference(shape, dtype, int8):
    for positions, settings in (
        ([0], {}),
        ([5, 0, 95, 63, 64], {}),
        ([2047, 130], {}),
        ([1000, 3], {"window": 64}),
        ([700], {"softcap": 5.0}),
        (list(range(16)), {}),
    ):
        call = make_append(shape, positions, dtype, int8, "cuda")
        parts = (None if part is None else part.clone() for part in vars(call.cache).values())
        reference = replace(call, cache=KVCache(*parts))
        q = ops.append_heads(call)
        wide = replace(reference, qkv=reference.qkv.float()) if not int8 else reference
        check_append(call, q, wide, dtype)
        attention = attention_of(call, q, **settings)
        got = ops.attend(attention)
        wanted = attend_reference(in_float32(attention))
        slack = 2.0**-10 if dtype == torch.float16 else 2.0**-7
        assert (got.float() - wanted).abs().max() <= slack * wanted.abs().max()
        again = ops.attend(attention)
        assert torch.equal(got, again)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_adjacent_rows_share_the_reads_of_their_sequence(shape, int8):
    for positions, adjacent in (([0, 1, 2], 3), ([700, 701, 702, 703, 63, 64, 65, 66], 4), (range(2040, 2048), 8)):
        call = make_append(shape, list(positions), torch.float16, int8, "cuda")
        starts = (call.slots - call.positions)[::adjacent].repeat_interleave(adjacent)
        call = replace(call, slots=starts + call.positions)
        attention = replace(attention_of(call, ops.append_heads(call)), adjacent=adjacent)
        wanted = attend_reference(in_float32(attention))
        assert (ops.attend(attention).float() - wanted).abs().max() <= 2.0**-10 * wanted.abs().max()


def in_float32(call: AttentionCall) -> AttentionCall:
    """The same attention with the cache's values as float32: what its codes stand for."""
    cache = call.cache
    k, v = loaded(cache.k, cache.k_scales), loaded(cache.v, cache.v_scales)
    return replace(call, q=call.q.float(), cache=KVCache(k, v))


def check_append(call: AppendCall, q: Tensor, reference: AppendCall, dtype: torch.dtype) -> None:
    """q and the cache after the kernel are the reference's to one rounding; int8 codes to one step."""
    if reference.qkv.dtype == torch.float32:
        cache = KVCache(reference.cache.k.float(), reference.cache.v.float())
        wanted = append_reference(replace(reference, cache=cache))
        slack = 2.0**-10 if dtype == torch.float16 else 2.0**-7
        torch.testing.assert_close(q.float(), wanted, atol=slack / 8, rtol=slack)
        torch.testing.assert_close(call.cache.k.float(), cache.k, atol=slack / 8, rtol=slack)
        torch.testing.assert_close(call.cache.v.float(), cache.v, atol=slack / 8, rtol=slack)
        return
    append_reference(reference)
    for got, wanted in zip(vars(call.cache).values(), vars(reference.cache).values(), strict=True):
        off = (got.float() - wanted.float()).abs()
        assert off.max() <= (1 if got.dtype == torch.int8 else 2.0**-7 * wanted.float().abs().max())
        assert (off > 0).float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("splits", range(1, MAX_SPLITS + 1))
def test_every_cut_computes_the_reference(splits, int8, monkeypatch):
    monkeypatch.setattr(decode_attention, "choose_splits", lambda call, processors: splits)
    for shape in ((4, 4, 128), (32, 2, 128), (4, 1, 256)):
        call = make_append(shape, [700, 5, 63, 2047], torch.float16, int8, "cuda")
        attention = attention_of(call, ops.append_heads(call))
        wanted = attend_reference(in_float32(attention))
        assert (ops.attend(attention).float() - wanted).abs().max() <= 2.0**-10 * wanted.abs().max()


@pytest.mark.gpu
def test_a_graph_replays_for_every_position():
    call = make_append((8, 8, 128), [4095, 100], torch.float16, False, "cuda")
    q = ops.append_heads(call)
    attention = attention_of(call, q)
    ops.attend(attention)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend(attention)
    for positions in ([0, 1], [17, 4000], [2048, 2047]):
        call.positions.copy_(torch.tensor(positions))
        graph.replay()
        wanted = attend_reference(in_float32(attention))
        assert (out.float() - wanted).abs().max() <= 2.0**-10 * wanted.abs().max()
