"""On a GPU: captured steps agree with the CPU in float32, and are the same each time."""

import gc
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch import Tensor

from lowbit.engine.architecture import Mixture, TokenInputSizes
from lowbit.engine.cache import CacheKind
from lowbit.engine.decoder import Decoder
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.prefill import read_prompt
from lowbit.engine.sampler import Features
from lowbit.engine.sampling import Sampling
from lowbit.engine.shapes import (
    METHODS,
    codegeex_shape,
    decoder_shape,
    deepseek_shape,
    gemma_shape,
    random_weights,
    with_mixture,
)
from lowbit.engine.workspace import Workspace
from lowbit.quant.kernels.packed import dequantize_packed
from lowbit.quant.kernels.route_experts import Rule
from lowbit.quant.kernels.row_norm import GROUP
from lowbit.quant.kernels.stack import DenseStack, PackedStack
from lowbit.quant.kernels.w8a8 import in_values
from lowbit.quant.kernels.weight import Dense, Packed, W8a8
from tests.kernels.make import on_cpu

pytestmark = pytest.mark.gpu

LLAMA = decoder_shape(vocabulary=1000, hidden=512, inner=1024, heads=4, layers=3, kv_heads=2)
CODEGEEX = replace(
    codegeex_shape(), vocabulary=1000, hidden=512, inner=1024, heads=4, kv_heads=4, layers=codegeex_shape().layers[:3]
)
# all experts are chosen: among some, a last bit of half precision may choose others
MIXTURES = {
    "shared": with_mixture(LLAMA, Mixture(4, 256, Rule(4), shared=256), dense=1),
    "alone": with_mixture(LLAMA, Mixture(8, 512, Rule(8, "chosen"))),
}
DEEPSEEK = replace(
    with_mixture(replace(deepseek_shape(), layers=deepseek_shape().layers[:3]), Mixture(4, 256, Rule(4)), dense=1),
    vocabulary=1000,
    hidden=512,
    inner=1024,
    heads=4,
    kv_heads=4,
)
# Heads of 256 with windows and of 512 without, experts beside a feed-forward; and the last layers with the keys and
# values of earlier ones, and inputs of their own.
NARROW, WIDE = (replace(layer, scale=0.05) for layer in gemma_shape().layers[4:6])
GEMMA = replace(
    gemma_shape(),
    vocabulary=1000,
    hidden=512,
    inner=1024,
    heads=8,
    kv_heads=2,
    layers=tuple(
        replace(
            layer,
            window=layer.window and 20,
            kv_heads=layer.kv_heads and 1,
            mixture=Mixture(4, 256, Rule(4), beside=True),
        )
        for layer in (NARROW, WIDE, NARROW, WIDE)
    ),
)
GEMMAS = {
    "experts": GEMMA,
    "inputs": replace(
        GEMMA,
        layers=tuple(
            replace(layer, mixture=None, source=None if index < 2 else index - 2, inner=None if index < 2 else 2048)
            for index, layer in enumerate(GEMMA.layers)
        ),
        token_inputs=TokenInputSizes(64, 1000),
    ),
}
# An input's last bit may change its code by one: in int8 by 1 / 127 of the row's largest, which gave up to 0.026 on an
# H100, and in FP8 by up to 1 / 8 of itself.
TURNED_CODES = {"w4a8": 0.05, "w8a8": 0.05, "w8a8-fp8": 0.1, "fp8-block": 0.1}
CONTEXT = 300
PROMPTS = [list(range(7, 90)), [5], list(range(300, 320))]


def in_float32(value):
    """Weights on the CPU in float32, for any packing."""
    if isinstance(value, Packed):
        return Dense(dequantize_packed(on_cpu(value)))
    if isinstance(value, PackedStack):
        return DenseStack(in_float32(Packed(**vars(value.weight))).matrix.unflatten(0, (value.experts, -1)))
    if isinstance(value, W8a8) and value.in_blocks:
        return Dense(in_values(value.codes, value.scales, GROUP).float().cpu())
    if isinstance(value, W8a8):
        return Dense((value.codes.float() * value.scales.unsqueeze(1)).cpu())
    if isinstance(value, Tensor):
        return value.float().cpu()
    if isinstance(value, tuple):
        return tuple(in_float32(each) for each in value)
    if is_dataclass(value):
        return type(value)(**{field.name: in_float32(getattr(value, field.name)) for field in fields(value)})
    return value


def engines(architecture, method: str, dtype=torch.float16, cache: str = "same") -> tuple[Engine, Engine]:
    """The engine on the GPU, and one with the same weights on the CPU in float32."""
    weights = random_weights(architecture, method, torch.empty(0, dtype=dtype, device="cuda"), cache=cache)
    gpu = Engine(Decoder(architecture, weights, CONTEXT), None, Options(CONTEXT))
    exact = replace(in_float32(weights), cache=CacheKind())
    return gpu, Engine(Decoder(architecture, exact, CONTEXT), None, Options(CONTEXT))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.cpu() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_logits_of_prompts_and_of_captured_steps_are_the_cpus(method, dtype, cache):
    gpu, cpu = engines(LLAMA, method, dtype, cache)
    tolerance = 0.02 if dtype == torch.float16 else 0.08
    check(gpu, cpu, max(tolerance, TURNED_CODES.get(method, 0)))


@pytest.mark.parametrize(("cache", "tolerance"), [("fp8", 0.1), ("int4", 0.25)])  # 0.03 and 0.12 in float32
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_cache_stays_as_close_as_its_numbers(dtype, cache, tolerance):
    check(*engines(LLAMA, "w4", dtype, cache), tolerance)


@pytest.mark.parametrize("method", ["w4", "int8", "dense"])
def test_learned_positions_and_layer_norms_too(method):
    check(*engines(CODEGEEX, method), 0.02)


@pytest.mark.parametrize("method", ["w4", "int8", "dense"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_of_experts_too(mixture, method):
    check(*engines(MIXTURES[mixture], method), 0.02)


@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("method", ["w4", "dense"])
def test_latent_attention_too(method, cache):
    check(*engines(DEEPSEEK, method, cache=cache), 0.03)


@pytest.mark.parametrize("cache", ["same", "int8", "fp8"])
@pytest.mark.parametrize(("method", "dtype"), [("w4", torch.bfloat16), ("w4", torch.float16), ("dense", torch.float16)])
@pytest.mark.parametrize("shape", GEMMAS)
def test_caches_of_two_shapes_too(shape, method, dtype, cache):
    gpu, cpu = engines(GEMMAS[shape], method, dtype, cache)
    assert Workspace(gpu.spaces).runner(2, 2, CONTEXT).captures
    check(gpu, cpu, max(0.02 if dtype == torch.float16 else 0.08, 0.1 if cache == "fp8" else 0))


def test_a_captured_step_with_experts_is_the_same_each_time():
    gpu, _ = engines(with_mixture(LLAMA, Mixture(16, 256, Rule(4))), "w4")
    sampling = Sampling(max_new_tokens=40)
    first = [completion.tokens for completion in gpu.generate(PROMPTS, sampling)]
    assert all([completion.tokens for completion in gpu.generate(PROMPTS, sampling)] == first for _ in range(3))


@pytest.mark.parametrize("shape", ["alone", "shared", "experts"])
def test_a_row_of_nan_ends_and_leaves_the_others_of_its_step_alone(shape):
    """Its router's logits are NaN: a captured step goes on, and the others' experts and sums are theirs."""
    gpu, _ = engines((MIXTURES | GEMMAS)[shape], "w4")
    wanted = [each.tokens for each in gpu.generate(PROMPTS[1:], max_new_tokens=20)]
    gpu.decoder.weights.embedding[999] = torch.nan
    nan, *others = gpu.generate([[999, 7], *PROMPTS[1:]], max_new_tokens=20)
    assert len(nan.tokens) == 20
    assert [each.tokens for each in others] == wanted
    assert gpu.logits([[999, 7]]).isnan().all()


def check(gpu: Engine, cpu: Engine, tolerance: float) -> None:
    wanted = cpu.logits([PROMPTS[0]])[0]
    assert relative(gpu.logits([PROMPTS[0]])[0], wanted) < tolerance
    with torch.inference_mode():
        cache = gpu.spaces.make_cache(1, CONTEXT)
        chunks = [gpu.decoder.logits(h) for h in read_prompt(gpu.decoder, cache, 0, PROMPTS[0], chunk=32)]
        assert relative(torch.cat(chunks), wanted) < tolerance
        runner = Workspace(gpu.spaces).runner(2, 2, CONTEXT)
        starts = [runner.cache.start(b) for b in range(2)]
        for position, token in enumerate(PROMPTS[0]):
            other = PROMPTS[0][position // 2]  # the second sequence goes at half the speed
            runner.place([token, other], [position, position // 2], starts)
            runner.advance()
            assert runner.logits is not None
            assert relative(runner.logits[0], wanted[position]) < 2 * tolerance
            assert relative(runner.logits[1], wanted[position // 2]) < 2 * tolerance


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50}, {"repetition_penalty": 1.2}])
def test_a_batch_writes_what_its_requests_write_alone(settings):
    gpu, _ = engines(LLAMA, "w4")
    sampling = [Sampling(max_new_tokens=40, seed=seed, **settings) for seed in range(len(PROMPTS))]
    together = [completion.tokens for completion in gpu.generate(PROMPTS, sampling)]
    assert together == [completion.tokens for completion in gpu.generate(PROMPTS, sampling)]
    alone = [gpu.generate([prompt], each)[0].tokens for prompt, each in zip(PROMPTS, sampling, strict=True)]
    # rows of x are independent in every kernel that takes up to 8 of them
    assert together == alone


def test_a_captured_step_is_an_eager_one():
    gpu, _ = engines(LLAMA, "w4")
    captured = gpu.generate(PROMPTS, max_new_tokens=30)
    for runner in gpu.spaces.idle[0].runners.values():
        assert runner.graphs
        runner.captures = False
    assert [each.tokens for each in gpu.generate(PROMPTS, max_new_tokens=30)] == [each.tokens for each in captured]


@pytest.mark.parametrize("features", [Features(), Features(sampled=True, penalized=True), Features(masked=True)])
def test_steps_are_the_same_if_the_first_ones_are_the_warm_up(features):
    gpu, _ = engines(LLAMA, "w4")
    found = []
    for spread in (False, True):
        runner = Workspace(gpu.spaces).runner(2, 2, CONTEXT, features)
        with torch.inference_mode():
            assert runner.sampler is not None
            if features.masked:
                runner.sampler.allowed.fill_(-1)
            runner.sampler.start([gpu.request(0, prompt, Sampling()).constraints for prompt in PROMPTS[:2]])
            runner.place([5, 9], [0, 0], [runner.cache.start(b) for b in range(2)])
            if spread:
                runner.spread()
            found.append([runner.launch().wait().tokens.tolist() for _ in range(6)])
        assert len(runner.graphs) == len(runner.parts) - runner.first
        assert runner.plain == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_choices_behind_one_graph_of_the_logits_are_those_of_a_whole_graph(rows):
    """Each choice begins with plain launches behind the source's graph, and so on with a graph of its own."""
    gpu, _ = engines(LLAMA, "w4")
    space, found = Workspace(gpu.spaces), []
    kinds = [Features(), *(Features(**{name: True}) for name in ("logprobs", "penalized", "masked"))]
    kinds.append(Features(sampled=True, truncated=True, penalized=True, bad_words=1, logprobs=True, masked=True))
    with torch.inference_mode():
        for features in [*kinds, *kinds]:
            runner = space.runner(rows, 16, CONTEXT, features)
            assert runner.sampler is not None
            runner.sampler.start([gpu.request(0, [5], Sampling()).constraints] * rows)
            runner.place(range(5, 5 + rows), [0] * rows, [runner.cache.start(b) for b in range(rows)])
            runner.spread()
            found.append([chosen.tokens.tolist() for chosen in runner.steps(8)])
    sources = {runner for runner in space.runners.values() if runner.sampler is None}
    assert [runner.source for runner in space.runners.values() if runner.first] == list(sources) * 4
    assert all(tokens == found[0] for tokens in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", ["same", "int8"])
def test_captured_prompts_are_those_launched_plainly(method, cache):
    check_captured_prompts(LLAMA, method, cache)


@pytest.mark.parametrize("changes", [{"window": 20}, {"softcap": 30.0}, {"window": 20, "softcap": 30.0}])
def test_with_windows_and_bounded_scores_too(changes):
    window = changes.pop("window", None)
    layers = tuple(replace(layer, window=window) for layer in LLAMA.layers)
    check_captured_prompts(replace(LLAMA, layers=layers, **changes), "w4", "same")


def test_garbage_with_a_graph_in_it_ends_no_capture():
    """A dropped engine is a cycle of references: it is freed by whatever collection comes next."""
    dropped, gpu = (engines(LLAMA, "w4")[0] for _ in range(2))
    dropped.generate(PROMPTS, max_new_tokens=4)
    layer, garbage = gpu.decoder.layer, [dropped]
    del dropped

    def littering(*args):
        if torch.cuda.is_current_stream_capturing():
            garbage.clear()
            assert not gc.isenabled()
        return layer(*args)

    gpu.decoder.layer = littering
    assert gpu.generate(PROMPTS, max_new_tokens=4)
    assert gc.isenabled()
    assert not garbage


def check_captured_prompts(architecture, method: str, cache: str) -> None:
    """The first prompt of a length runs without a graph, the second is captured, the third replayed."""
    gpu, cpu = engines(architecture, method, cache=cache)
    prompts = [PROMPTS[0], [5], PROMPTS[2], list(range(9, 209))]
    runs = [[gpu.logits([prompt])[0] for prompt in prompts] for _ in range(3)]
    reader = gpu.spaces.idle[0].reader
    assert reader is not None
    assert sorted(reader.passes) == [8, 32, 128, 256]
    assert all(each.graph is not None for each in reader.passes.values())
    for prompt, *found in zip(prompts, *runs, strict=True):
        assert all(torch.equal(logits, found[0]) for logits in found)
        assert relative(found[0], cpu.logits([prompt])[0]) < TURNED_CODES.get(method, 0.03)


@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("given", [PROMPTS[:2], [*PROMPTS[:3], list(range(9, 120))]])
def test_captured_prompts_that_share_a_pass_are_those_read_alone(given, cache):
    gpu, _ = engines(LLAMA, "w4", cache=cache)
    reader = Workspace(gpu.spaces).roomy_reader(len(given), 256)
    with torch.inference_mode():
        runs = [reader.read_together(list(enumerate(given))) for _ in range(3)]
        [shared] = reader.shared.values()
        assert shared.graph is not None
        for at, tokens in enumerate(given):
            alone = torch.cat(list(reader.read(at, tokens)))
            assert all(torch.equal(run[at], runs[0][at]) for run in runs)
            assert relative(runs[0][at], alone[-1:].cpu()) < 0.01


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", ["w4", "w8a8", "dense"])
def test_the_last_row_of_captured_prompts(method, batch):
    """The last layer computes it alone; of a cache for one sequence nothing is gathered."""
    gpu, _ = engines(LLAMA, method)
    reader = Workspace(gpu.spaces).roomy_reader(batch, 256)
    prompts = [PROMPTS[0], [5], list(range(9, 209))]
    with torch.inference_mode():
        runs = [[[*reader.read(batch - 1, prompt, end=True)][-1] for prompt in prompts] for _ in range(3)]
        assert all(each.graph is not None for each in reader.ends.values())
        for prompt, *found in zip(prompts, *runs, strict=True):
            rows = torch.cat(list(reader.read(batch - 1, prompt)))
            assert all(torch.equal(row, found[0]) for row in found)
            assert found[0].shape == rows[-1:].shape
            assert relative(found[0], rows[-1:].cpu()) < TURNED_CODES.get(method, 0.01)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("cache", ["same", "int8", "fp8", "int4"])
@pytest.mark.parametrize("rows", [2, 5, 8])
def test_drafts_are_checked_as_rows_of_their_own_would_be(rows, cache, kv_heads):
    """A captured step whose rows share the reads of their sequence, and one step after another: the same bits."""
    gpu, _ = engines(replace(LLAMA, kv_heads=kv_heads), "w4", cache=cache)
    logits = []
    for width in (rows, 1):
        space = Workspace(gpu.spaces)
        runner, found = space.runner(width, 1, CONTEXT, adjacent=width), []
        runner.reader.last_logits([PROMPTS[0]])
        for first in range(0, rows, width):
            place = len(PROMPTS[0]) + first
            runner.place(range(5 + first, 5 + first + width), range(place, place + width), [0] * width)
            runner.advance()
            assert runner.logits is not None
            found.append(runner.logits.clone())
        logits.append(torch.cat(found))
    assert torch.equal(*logits)


@pytest.mark.parametrize("method", ["w4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_norms_shared_out_between_products_are_norms(method, dtype, rows):
    """Captured steps of both kinds over the same tokens; with deferring only the first norm is a launch."""
    gpu, _ = engines(LLAMA, method, dtype)
    logits = []
    for deferring in (True, False):
        gpu.decoder.plan(deferring)
        runner, steps = Workspace(gpu.spaces).runner(rows, rows, CONTEXT), []
        starts = [runner.cache.start(b) for b in range(rows)]
        for position, token in enumerate(PROMPTS[0][:40]):
            runner.place([(token + b) % 1000 for b in range(rows)], [position] * rows, starts)
            runner.advance()
            assert runner.logits is not None
            steps.append(runner.logits.clone())
        assert runner.graphs
        logits.append(torch.stack(steps).cpu())
    assert not torch.equal(*logits)
    assert relative(*logits) < 2 * (0.02 if dtype == torch.float16 else 0.08)  # two ways, each as far from float32


def test_lookup_accepts_drafts():
    gpu, _ = engines(LLAMA, "w4")
    prompt = [7, 8, 9, 10, 11, 12] * 8
    completion = gpu.generate([prompt], max_new_tokens=60, lookup=7)[0]
    assert len(completion.tokens) == 60
    assert completion.steps <= 60


def test_too_much_context_is_refused_with_the_numbers():
    gpu, _ = engines(LLAMA, "w4")
    with pytest.raises(ValueError, match=r"need \d+\.\d GiB for keys and values, the GPU has"):
        gpu.spaces.make_cache(64, 1 << 26)
    assert gpu.generate([[1, 2]], max_new_tokens=2)
