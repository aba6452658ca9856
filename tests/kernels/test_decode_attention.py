"""append_heads and decode_attention: the reference against torch's own attention, the kernels against the reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import decode_attention, ops
from lowbit.quant.kernels.decode_attention import (
    MANY_ROWS,
    MAX_SPLITS,
    PLAIN_BYTES,
    SHORT,
    VECTOR_DIMS,
    AppendCall,
    AttentionCall,
    NewCall,
    append_reference,
    attend_reference,
    choose_columns,
    choose_cut,
    choose_splits,
    fits_vectors,
    most_bytes,
    reads_long,
)
from lowbit.quant.kernels.kv_cache import (
    CACHE_NUMBERS,
    FP8_CACHE,
    INT4_CACHE,
    SAME,
    CacheNumber,
    KVCache,
    empty_cache,
    hadamard,
    loaded,
    reason_against_width,
    store,
)
from tests.kernels.make import opcheck

CONTEXT = 96
# heads, kv_heads, head_dim: multi-head, grouped (by 4, by 7, by 16), and widths that fill no lane count
SHAPES = [(4, 4, 128), (8, 2, 64), (14, 2, 64), (32, 2, 128), (4, 1, 256), (3, 3, 80), (2, 2, 16)]
SHAPES += [(16, 2, 512), (20, 2, 512), (1, 1, 512)]


def make_cache(slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str, device: str) -> KVCache:
    """A cache of zeros; fp8 with a scale of its own for each head."""
    scales = tuple(torch.rand(kv_heads, device=device) * 0.02 + 0.002 for _ in range(2))
    like = torch.empty(0, dtype=dtype, device=device)
    return empty_cache(CACHE_NUMBERS[cache], (slots, kv_heads, head_dim), like, (scales[0], scales[1]))


def make_append(shape, positions: list[int], dtype: torch.dtype, cache: str, device: str = "cpu") -> AppendCall:
    """Random heads for one token of each of several sequences; the rest of the cache is random too."""
    heads, kv_heads, head_dim = shape
    m, context = len(positions), max(*positions, CONTEXT) + 1
    kv = make_cache(m * context, kv_heads, head_dim, dtype, cache, device)
    for codes, scales in ((kv.k, kv.k_scales), (kv.v, kv.v_scales)):
        rows = torch.randn(len(codes), kv_heads, head_dim, device=device)
        store(codes, scales, torch.arange(len(codes), device=device), rows)
    where = torch.tensor(positions, device=device)
    angles = torch.rand(context, head_dim // 2) * 6
    qkv = torch.randn(m, (heads + 2 * kv_heads) * head_dim).to(device, dtype)
    slots = where + torch.arange(m, device=device) * context
    q_norm, k_norm = (torch.rand(head_dim).to(device, dtype) + 0.5 for _ in range(2))
    return AppendCall(qkv, where, slots, angles.cos().to(device), angles.sin().to(device), kv, q_norm, k_norm, 1e-6)


def attention_of(call: AppendCall, q: Tensor, **settings) -> AttentionCall:
    return AttentionCall(
        q, call.cache, call.slots - call.positions, call.positions, call.cache.head_dim**-0.5, **settings
    )


def test_a_sink_takes_its_share_of_every_softmax():
    call = make_append((4, 2, 16), [0, 11, 40], torch.float32, cache="same")
    q, sinks = ops.append_heads(call), torch.tensor([-1.0, 0.0, 2.0, -torch.inf])
    out, plain = (ops.attend(attention_of(call, q, sinks=each)).unflatten(1, (4, -1)) for each in (sinks, None))
    k = call.cache.k[call.slots[0]].repeat_interleave(2, 0)
    score = (q[0].view(4, 16) * k).sum(-1) / 4  # the first row sees one position
    torch.testing.assert_close(out[0], plain[0] * torch.sigmoid(score - sinks).unsqueeze(1))
    torch.testing.assert_close(out[:, 3], plain[:, 3])


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_torchs(shape, window):
    call = make_append(shape, [0, 11, 40], torch.float32, cache="same")
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
    call = make_append((2, 1, 16), [30], torch.float32, cache="same")
    q = 8 * ops.append_heads(call)
    out = ops.attend(attention_of(call, q, softcap=3.0))
    scores = q.view(2, 16) @ call.cache.k[:31, 0].T / 4
    wanted = (3 * torch.tanh(scores / 3)).softmax(-1) @ call.cache.v[:31, 0]
    torch.testing.assert_close(out.view(2, 16), wanted, atol=1e-5, rtol=1e-5)


def test_heads_are_normed_turned_and_stored():
    call = make_append((2, 1, 16), [7], torch.float32, cache="same")
    q = ops.append_heads(call).view(2, 16)
    heads = call.qkv.view(4, 16)
    normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-6)
    turn = torch.complex(call.cosines[7], call.sines[7])
    for got, wanted in ((q, normed[:2] * call.q_norm), (call.cache.k[7], normed[2:3] * call.k_norm)):
        turned = torch.complex(wanted[:, :8], wanted[:, 8:]) * turn
        torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1))
    assert torch.equal(call.cache.v[7], heads[3:])
    ops.append_heads(replace(call, v_normed=True))
    torch.testing.assert_close(call.cache.v[7], normed[3:])


@pytest.mark.parametrize("cache", CACHE_NUMBERS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [2, MANY_ROWS + 1])
def test_heads_of_q_alone_change_no_cache(rows, device, cache):
    call = make_append((4, 2, 64), list(range(rows)), torch.float16, cache, device)
    kept = copied(call).cache
    q = ops.append_heads(copied(call))
    alone = replace(call, qkv=call.qkv[:, : 4 * 64].contiguous(), cache=call.cache.without_heads)
    assert torch.equal(ops.append_heads(alone), q)
    for part, same in zip(vars(call.cache).values(), vars(kept).values(), strict=True):
        assert part is same is None or torch.equal(*(each.flatten().view(torch.uint8) for each in (part, same)))


def test_int8_keeps_a_head_to_half_a_step_of_its_own_scale():
    call = make_append((2, 2, 32), [7, 9], torch.float32, cache="int8")
    plain = replace(call, cache=make_cache(len(call.cache.k), 2, 32, torch.float32, "same", "cpu"))
    ops.append_heads(call)
    ops.append_heads(plain)
    for codes, scales, exact in (
        (call.cache.k, call.cache.k_scales, plain.cache.k),
        (call.cache.v, call.cache.v_scales, plain.cache.v),
    ):
        error = (loaded(codes, scales) - exact)[call.slots].abs()
        assert (error <= scales[call.slots].unsqueeze(-1) * 0.5001).all()
        assert (codes[call.slots].abs().amax(-1) == 127).all()


@pytest.mark.parametrize("cache", ["int8", "fp8", "int4"])
def test_a_zero_head_is_stored_as_zeros(cache):
    call = make_append((1, 1, 64), [3], torch.float16, cache)
    call.qkv.zero_()
    ops.append_heads(call)
    for codes, scales in ((call.cache.k, call.cache.k_scales), (call.cache.v, call.cache.v_scales)):
        assert not loaded(codes, scales, call.slots).any()
        assert (scales != 0).all()


def test_int4_turns_keys_with_their_queries_and_keeps_a_head_to_a_step():
    call = make_append((2, 2, 64), [7, 9], torch.float32, "int4")
    call.qkv[:, 200] = 30  # an outlier of a key
    plain = replace(call, cache=make_cache(len(call.cache.k), 2, 64, torch.float32, "same", "cpu"))
    q, exact = ops.append_heads(call), ops.append_heads(plain)
    turn = hadamard(64, torch.device("cpu"))
    torch.testing.assert_close(turn @ turn, torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(q.view(2, 2, 64), exact.view(2, 2, 64) @ turn)
    keys = loaded(call.cache.k, call.cache.k_scales, call.slots)
    for found, wanted, scales in (
        (keys, plain.cache.k[call.slots] @ turn, call.cache.k_scales),
        (loaded(call.cache.v, call.cache.v_scales, call.slots), plain.cache.v[call.slots], call.cache.v_scales),
    ):
        sides = scales[call.slots].abs().unsqueeze(-1)
        largest = wanted.gather(-1, wanted.abs().argmax(-1, keepdim=True))
        torch.testing.assert_close(sides.squeeze(-1), (largest.abs() / 8).squeeze(-1))
        beyond = wanted * largest.sign() < -7.5 * sides  # opposite to the largest, as large: there is no code 8
        assert ((found - wanted).abs() <= torch.where(beyond, 1.0001, 0.5001) * sides).all()


def test_fp8_is_rounded_by_its_heads_scales_and_clamped():
    call = make_append((2, 2, 64), [7, 9], torch.float32, "fp8")
    plain = replace(call, cache=make_cache(len(call.cache.k), 2, 64, torch.float32, "same", "cpu"))
    call.cache.v_scales[1] = 1e-4
    ops.append_heads(call)
    ops.append_heads(plain)
    v = plain.cache.v[call.slots] / call.cache.v_scales.unsqueeze(-1)
    wanted = v.clamp(-448, 448).to(torch.float8_e4m3fn).float() * call.cache.v_scales.unsqueeze(-1)
    assert torch.equal(loaded(call.cache.v, call.cache.v_scales, call.slots), wanted)
    assert (v.abs() > 448).any()


@pytest.mark.parametrize(
    ("number", "head_dim", "fits"),
    [
        *((INT4_CACHE, 80, False), (INT4_CACHE, 32, False), (INT4_CACHE, 256, True), (INT4_CACHE, 512, False)),
        *((FP8_CACHE, 80, True), (SAME, 8, True), (SAME, 512, True)),
    ],
)
def test_a_width_that_cannot_be_turned_is_named(number: CacheNumber, head_dim: int, fits: bool):
    assert (reason_against_width(number, head_dim) is None) == fits
    assert number.head_nbytes(256, torch.float16) == {"same": 512, "fp8": 256, "int4": 130}[number.name]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_rows_are_no_work(device):
    call = make_append((2, 1, 16), [3], torch.float16, "same", device)
    call = replace(call, qkv=call.qkv[:0], positions=call.positions[:0], slots=call.slots[:0])
    q = ops.append_heads(call)
    assert ops.attend(attention_of(call, q)).shape == q.shape == (0, 32)


@pytest.mark.parametrize("part", [0, 1, 2])  # the head of q, of k, of v
@pytest.mark.parametrize("cache", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_cache_hides_what_is_no_number(device, dtype, cache, part):
    call = make_append((1, 1, 64), [3, 40], dtype, cache, device)
    call.qkv[1, 64 * part : 64 * part + 64] = torch.nan
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
    call = make_append((2, 2, 16), [7, 9], torch.float32, cache="same")
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
        ({"cache": make_cache(200, 2, 16, torch.float16, "int8", "cpu")}, "k_scales is torch.float16"),
    ],
)
def test_attention_refuses_what_does_not_fit(change, message):
    call = make_append((2, 2, 16), [7, 9], torch.float32, cache="int8")
    with pytest.raises(ValueError, match=message):
        ops.attend(replace(attention_of(call, torch.zeros(2, 32)), **change))


def new_call_of(call: AppendCall, **settings) -> NewCall:
    """The append of `call` and the attention to it, in one call."""
    return NewCall(call, call.slots - call.positions, call.positions, call.cache.head_dim**-0.5, **settings)


def copied(call: AppendCall) -> AppendCall:
    """The same call with a cache of its own."""
    return replace(call, cache=KVCache(*(None if part is None else part.clone() for part in vars(call.cache).values())))


@pytest.mark.parametrize("cache", CACHE_NUMBERS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(4, 4, 128), (8, 2, 64), (32, 2, 128), (4, 1, 256), (8, 1, 512)])
def test_one_call_appends_and_attends_as_two_do(shape, device, cache):
    if reason := reason_against_width(CACHE_NUMBERS[cache], shape[2]):
        pytest.skip(reason)
    for positions, window in (([0], 0), ([16, 15, 64, 63, 0], 0), ([2047, 130], 0), ([1000, 3], 64)):
        call = make_append(shape, positions, torch.float16, cache, device)
        call = replace(call, v_normed=shape[2] >= 256)
        apart = copied(call)
        wanted = ops.attend(attention_of(apart, ops.append_heads(apart), window=window))
        assert torch.equal(ops.attend_new(new_call_of(call, window=window)), wanted)
        for part, same in zip(vars(call.cache).values(), vars(apart.cache).values(), strict=True):
            assert part is same is None or torch.equal(*(each.flatten().view(torch.uint8) for each in (part, same)))


def other_order(cache: KVCache) -> KVCache:
    """The same cache with slots and heads the other way round in memory."""
    parts = (
        part if part is None or part.ndim == 1 else part.transpose(0, 1).contiguous().transpose(0, 1)
        for part in vars(cache).values()
    )
    return KVCache(*(part.contiguous() if cache.apart and part is not None else part for part in parts))


@pytest.mark.parametrize("cache", CACHE_NUMBERS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_slots_and_heads_may_stand_in_either_order(device, cache):
    for shape, positions in (((8, 2, 64), [63, 0, 1500]), ((4, 4, 128), [1200, 15])):
        call = make_append(shape, positions, torch.float16, cache, device)
        other = replace(call, cache=other_order(call.cache))
        assert call.cache.apart == (cache == "int4") != other.cache.apart
        assert torch.equal(ops.attend_new(new_call_of(other)), ops.attend_new(new_call_of(call)))
        for part, same in zip(vars(other.cache).values(), vars(call.cache).values(), strict=True):
            assert part is same is None or torch.equal(part.float().nan_to_num(), same.float().nan_to_num())
        q = ops.append_heads(call)
        assert torch.equal(ops.append_heads(other), q)
        assert torch.equal(ops.attend(attention_of(other, q)), ops.attend(attention_of(call, q)))


def test_a_cache_in_two_orders_is_refused():
    call = make_append((4, 4, 128), [7, 9], torch.float16, "int4")
    mixed = replace(call.cache, v=call.cache.v.contiguous())
    with pytest.raises(ValueError, match="v has the shape"):
        ops.append_heads(replace(call, cache=mixed))


def test_heads_that_do_not_fit_are_refused_before_they_are_appended():
    call = make_append((2, 2, 16), [7, 9], torch.float32, cache="same")
    before = call.cache.k.clone()
    with pytest.raises(ValueError, match="starts has the shape"):
        ops.attend_new(replace(new_call_of(call), starts=torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="k_norm has the shape"):
        ops.attend_new(new_call_of(replace(call, k_norm=torch.zeros(8))))
    assert torch.equal(call.cache.k, before)


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
        call = make_append(shape, [5] * m, torch.float16, cache="same")
        q = torch.zeros(m, shape[0] * shape[2], dtype=torch.float16)
        splits = [choose_splits(attention_of(call, q, longest=most), processors) for most in (0, 4096, SHORT)]
        assert splits == [long, long, short]
        assert choose_splits(attention_of(call, q, window=128), processors) == short
        if processors:  # rows of one sequence are split as a single one
            together, alone = (attention_of(call, rows, longest=4096, adjacent=len(rows)) for rows in (q, q[:1]))
            assert choose_splits(together, processors) == choose_splits(alone, processors)


@pytest.mark.parametrize(
    ("shape", "rows", "longest", "cache", "cut"),
    [
        ((32, 32, 128), 8, 2176, "int8", (1, 8)),
        ((32, 32, 128), 4, 0, "fp8", (2, 8)),
        ((32, 32, 128), 16, 2176, "fp8", (2, 8)),
        ((32, 32, 128), 1, 2176, "int4", (6, 8)),
        ((32, 32, 128), 1, 32768, "int4", (7, 8)),
        ((32, 8, 128), 8, 2176, "fp8", (2, 16)),
        ((32, 8, 64), 1, 32768, "int4", (8, 16)),
        ((32, 8, 64), 1, 2176, "int4", (8, 8)),
        ((32, 32, 128), 1, SHORT, "int8", (4, 4)),
        ((4, 1, 256), 1, 2176, "int8", (8, 4)),
        ((32, 32, 128), 1, 2176, "same", (8, 4)),
    ],
)
def test_long_quantized_caches_get_more_warps(shape, rows, longest, cache, cut):
    call = make_append(shape, [5] * rows, torch.float16, cache)
    attention = attention_of(call, torch.zeros(rows, shape[0] * shape[2], dtype=torch.float16), longest=longest)
    assert choose_cut(attention, 132, True) == cut
    assert choose_cut(attention, 132, False) == (choose_splits(attention, 132), 4)


@pytest.mark.parametrize(
    ("shape", "rows", "longest", "cache", "columns"),
    [
        ((32, 4, 128), 1, SHORT, "same", 2),
        ((64, 8, 64), 1, SHORT, "same", 4),
        ((32, 8, 128), 1, SHORT, "int8", 2),
        ((32, 2, 128), 1, SHORT, "fp8", 2),
        ((32, 4, 128), 8, SHORT, "same", 8),
        ((32, 4, 128), 1, 2176, "same", 8),
        ((32, 4, 128), 1, SHORT, "int4", 2),
    ],
)
def test_short_sequences_alone_have_few_heads_a_block(shape, rows, longest, cache, columns):
    call = make_append(shape, [5] * rows, torch.float16, cache)
    attention = attention_of(call, torch.zeros(rows, shape[0] * shape[2], dtype=torch.float16), longest=longest)
    assert choose_columns(attention, choose_splits(attention, 132), 132) == columns


def test_the_bytes_of_a_cache_are_those_of_its_longest_sequence():
    call = make_append((32, 32, 128), [5] * 8, torch.float16, cache="same")
    q = torch.zeros(8, 4096, dtype=torch.float16)
    assert most_bytes(attention_of(call, q, longest=2176)) == 8 * 2176 * 32 * 128 * 2 * 2 > PLAIN_BYTES
    assert most_bytes(attention_of(call, q, longest=2176, window=512)) == 8 * 512 * 32 * 128 * 2 * 2 < PLAIN_BYTES
    assert most_bytes(attention_of(call, q)) == 0


def test_short_sequences_are_long_reads_between_rings_alone():
    call = make_append((32, 32, 128), [5] * 8, torch.float16, cache="same")
    short = attention_of(call, torch.zeros(8, 4096, dtype=torch.float16), longest=SHORT)
    assert most_bytes(short) > PLAIN_BYTES
    assert not reads_long(short)
    assert reads_long(replace(short, by_rings=True))
    assert reads_long(replace(short, longest=SHORT + 1))
    assert not reads_long(replace(short, longest=1, by_rings=True))


def test_operators_pass_opcheck():
    call = make_append((2, 2, 16), [7, 9], torch.float32, cache="int8")
    opcheck(ops.append_heads, replace(call, k_norm=None))
    attention = AttentionCall(
        torch.randn(2, 32), call.cache, call.slots - call.positions, call.positions, 0.25, 4, 0.0, 64
    )
    opcheck(ops.attend, attention)
    opcheck(ops.attend_new, new_call_of(replace(call, q_norm=None), window=4))


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHE_NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compute_the_reference(shape, dtype, cache):
    if reason := reason_against_width(CACHE_NUMBERS[cache], shape[2]):
        pytest.skip(reason)
    for positions, settings in (
        ([0], {}),
        ([5, 0, 95, 63, 64], {}),
        ([2047, 130], {}),
        ([1000, 3], {"window": 64}),
        ([700], {"softcap": 5.0}),
        (list(range(16)), {}),
    ):
        call = replace(make_append(shape, positions, dtype, cache, "cuda"), v_normed=shape[2] >= 256)
        parts = (None if part is None else part.clone() for part in vars(call.cache).values())
        reference = replace(call, cache=KVCache(*parts))
        q = ops.append_heads(call)
        wide = replace(reference, qkv=reference.qkv.float()) if cache == "same" else reference
        check_append(call, q, wide, dtype)
        attention = attention_of(call, q, **settings)
        got = ops.attend(attention)
        wanted = attend_reference(in_float32(attention))
        slack = 2.0**-10 if dtype == torch.float16 else 2.0**-7
        assert (got.float() - wanted).abs().max() <= slack * wanted.abs().max()
        again = ops.attend(attention)
        assert torch.equal(got, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 1, 64)])
def test_many_rows_append_as_few_do(shape, norms, dtype):
    call = make_append(shape, list(range(MANY_ROWS + 1)), dtype, "same", "cuda")
    assert fits_vectors(call) == (shape[2] in VECTOR_DIMS)
    call = replace(call, v_normed=shape[2] >= 256) if norms else replace(call, q_norm=None, k_norm=None)
    reference = replace(call, qkv=call.qkv.float(), cache=KVCache(call.cache.k.clone(), call.cache.v.clone()))
    check_append(call, ops.append_heads(call), reference, dtype)


def test_heads_at_odd_addresses_are_appended_one_by_one():
    call = make_append((2, 2, 64), [3, 4], torch.float16, "same")
    assert fits_vectors(call)
    shifted = torch.empty(call.qkv.numel() + 1, dtype=torch.float16)[1:].view_as(call.qkv)
    assert not fits_vectors(replace(call, qkv=shifted))


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHE_NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_adjacent_rows_share_the_reads_of_their_sequence(shape, cache):
    if reason := reason_against_width(CACHE_NUMBERS[cache], shape[2]):
        pytest.skip(reason)
    for positions, adjacent in (([0, 1, 2], 3), ([700, 701, 702, 703, 63, 64, 65, 66], 4), (range(2040, 2048), 8)):
        call = make_append(shape, list(positions), torch.float16, cache, "cuda")
        starts = (call.slots - call.positions)[::adjacent].repeat_interleave(adjacent)
        call = replace(call, slots=starts + call.positions)
        attention = replace(attention_of(call, ops.append_heads(call)), adjacent=adjacent)
        wanted = attend_reference(in_float32(attention))
        assert (ops.attend(attention).float() - wanted).abs().max() <= 2.0**-10 * wanted.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHE_NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 4, 128), (8, 2, 64), (32, 4, 128), (4, 1, 256)])
@pytest.mark.parametrize("longest", [SHORT, 4096])
def test_no_bit_depends_on_the_heads_of_a_block_nor_on_rows_beside(longest, shape, dtype, cache, monkeypatch):
    """One row after another with each number of heads a block, and rows of one sequence together."""
    if reason := reason_against_width(CACHE_NUMBERS[cache], shape[2]):
        pytest.skip(reason)
    call = make_append(shape, list(range(505, 513)), dtype, cache, "cuda")
    call = replace(call, slots=call.positions.clone())
    q = ops.append_heads(call)
    wanted = None
    for columns in (8, 4, 2, 1):
        monkeypatch.setattr(decode_attention, "choose_columns", lambda *_, count=columns: count)
        together = replace(attention_of(call, q, longest=longest), adjacent=8)
        alone = [rows_of(together, slice(row, row + 1)) for row in range(8)]
        wanted = ops.attend(together) if wanted is None else wanted
        assert torch.equal(ops.attend(together), wanted)
        assert torch.equal(torch.cat([ops.attend(each) for each in alone]), wanted)


def rows_of(call: AttentionCall, rows: slice) -> AttentionCall:
    """Some rows of an attention, each with its own reads."""
    parts = {name: getattr(call, name)[rows] for name in ("q", "starts", "positions")}
    return replace(call, **parts, adjacent=1)


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
    found, wanted = call.cache, reference.cache
    for codes, scales, others, sides in (
        (found.k, found.k_scales, wanted.k, wanted.k_scales),
        (found.v, found.v_scales, wanted.v, wanted.v_scales),
    ):
        off = (loaded(codes, scales) - loaded(others, sides)).abs()
        step = 2.0**-3 if codes.dtype == FP8_CACHE.storage else 1.01 * sides.float().abs().unsqueeze(-1)
        most = loaded(others, sides).abs() * step + 1e-5 if codes.dtype == FP8_CACHE.storage else step
        assert (off <= most).all()
        assert (off > 0).float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHE_NUMBERS)
@pytest.mark.parametrize("splits", range(1, MAX_SPLITS + 1))
@pytest.mark.parametrize("warps", [4, 8, 16])
def test_every_cut_computes_the_reference(splits, warps, cache, monkeypatch):
    if warps > 4 and cache == "same":
        pytest.skip("a cache in halves has 4 warps")
    monkeypatch.setattr(decode_attention, "choose_cut", lambda call, processors, fast: (splits, warps))
    for shape in ((4, 4, 128), (32, 2, 128), (8, 1, 64), (4, 1, 256), (16, 2, 512))[: 5 if warps == 4 else 3]:
        if reason_against_width(CACHE_NUMBERS[cache], shape[2]):
            continue
        call = make_append(shape, [700, 5, 63, 2047], torch.float16, cache, "cuda")
        attention = attention_of(call, ops.append_heads(call))
        wanted = attend_reference(in_float32(attention))
        assert (ops.attend(attention).float() - wanted).abs().max() <= 2.0**-10 * wanted.abs().max()


@pytest.mark.gpu
def test_a_graph_replays_for_every_position():
    call = make_append((8, 8, 128), [4095, 100], torch.float16, "same", "cuda")
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
