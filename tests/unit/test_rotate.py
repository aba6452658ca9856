"""quant/algos/rotate.py and calibrate/heads.py: a rotation leaves attention alone, and only attention is rotated."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.calibrate.discover import Probe, Structure, Workbench
from lowbit.calibrate.heads import find_heads
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.structure import Prober
from lowbit.errors import RecipeError
from lowbit.models.skeleton import Block, open_skeleton
from lowbit.models.source import open_source
from lowbit.models.walk import Walk
from lowbit.quant.algos.rotate import rotation, turned_inputs, turned_outputs
from lowbit.quant.numerics import fake_quantize
from lowbit.quant.scheme import make_scheme
from tests.builders import calibration, make_model, save


@pytest.mark.parametrize("size", [1, 2, 5, 16, 80, 96, 112, 128])
def test_a_rotation_is_orthogonal_and_the_same_every_time(size):
    matrix = rotation(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(matrix, rotation(size))


@pytest.mark.parametrize("size", [2, 16, 128])
def test_powers_of_two_mix_all_channels_equally(size):
    assert (rotation(size).abs() * size**0.5 - 1).abs().max() < 1e-12


@pytest.mark.parametrize("size", [80, 96])
def test_other_sizes_mix_every_channel_into_all(size):
    assert bool((rotation(size) != 0).all())


def attention(x: Tensor, v: Tensor, bias: Tensor, o: Tensor, heads: Tensor) -> Tensor:
    """The output of grouped-query attention with these weights, for arbitrary attention scores.

    heads  (query heads, size): the values that each query head reads
    """
    values = x @ v.T + bias
    weights = torch.rand(len(heads), len(x), len(x), generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    mixed = torch.cat([weights[h] @ values[:, channels] for h, channels in enumerate(heads)], 1)
    return mixed @ o.T


@pytest.mark.parametrize("size", [16, 12, 10])
def test_attention_returns_what_it_did(size):
    """In float64: three key-value heads, each read by two query heads, their rows out of order in a wider linear."""
    torch.manual_seed(1)
    own = torch.randperm(5 * size)[: 3 * size].view(3, size)
    readers = own.repeat_interleave(2, 0)
    x, v = torch.randn(9, 20, dtype=torch.float64), torch.randn(5 * size, 20, dtype=torch.float64)
    bias, o = torch.randn(5 * size, dtype=torch.float64), torch.randn(24, 6 * size, dtype=torch.float64)
    matrix = rotation(size)
    turned = (turned_outputs(v, own, matrix), turned_outputs(bias, own, matrix), turned_inputs(o, matrix))
    wanted = attention(x, v, bias, o, readers)
    torch.testing.assert_close(attention(x, *turned, readers), wanted, rtol=1e-12, atol=1e-11)
    moved = (turned[0] != v).any(1)
    assert moved.nonzero().flatten().tolist() == sorted(own.flatten().tolist())
    assert (attention(x, v, bias, turned[2], readers) - wanted).abs().max() > 1


def test_rounding_loses_less_where_some_channels_are_loud():
    torch.manual_seed(2)
    scheme, heads, matrix = make_scheme(4, 32, True), torch.arange(64).view(2, 32), rotation(32)
    v, o = torch.randn(64, 64), torch.randn(48, 64)
    o[:, [3, 40]] *= 20
    x = torch.randn(200, 64)

    def error(first: Tensor, second: Tensor) -> float:
        rounded = (fake_quantize(w, scheme, torch.float32) for w in (first, second))
        kept, read = rounded
        return float((x @ kept.T @ read.T - x @ v.T @ o.T).square().mean())

    assert error(turned_outputs(v, heads, matrix), turned_inputs(o, matrix)) < 0.7 * error(v, o)


@pytest.fixture(scope="module")
def block(tmp_path_factory) -> tuple[Block, Probe, Structure]:
    """A block of four heads as it is in the file, how to run it, and its structure."""
    model = save(make_model("opt"), tmp_path_factory.mktemp("opt") / "model")
    skeleton = open_skeleton(open_source(str(model)))
    walk = Walk(skeleton, "cpu", torch.float32)
    prober = Prober(walk, calibration().ids, 3)
    with walk.loaded(0):
        probe, structure = prober._probes(0)[0], prober.structure(0)
        return replace(skeleton.blocks[0], module=Workbench(skeleton.blocks[0]).module), probe, structure


def test_heads_are_found_as_large_as_they_are(block):
    block, probe, structure = block
    (heads,) = find_heads(Workbench(block), structure.folds, probe)
    assert heads.consumer == "model.decoder.layers.0.self_attn.out_proj"
    assert torch.equal(heads.channels, torch.arange(64).view(4, 16))


def test_values_gated_on_their_way_are_not_rotated(block):
    """Channel by channel on the way from values to output, as some families gate their heads."""
    block, probe, structure = block
    bench = Workbench(block)
    gate = torch.rand(64) + 0.5
    bench.module.self_attn.out_proj.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    assert find_heads(bench, structure.folds, probe) == []


def test_wrong_heads_change_what_the_block_computes(block):
    """Two heads as one, or channels in another order; what is taken is proved on the block itself."""
    block, probe, structure = block
    bench = Workbench(block)
    (heads,) = find_heads(bench, structure.folds, probe)
    wanted = probe.run(bench.module)
    for channels in (heads.channels.view(2, 32), heads.channels.flip(1)):
        restore = bench.keep(heads.fold)
        bench.turn(replace(heads, channels=channels))
        assert (probe.run(bench.module) - wanted).norm() > 0.01 * wanted.norm()
        restore()
    assert torch.equal(probe.run(bench.module), wanted)


def test_rotate_comes_first():
    with pytest.raises(RecipeError, match="rotate mixes the channels that other transforms scale: put it first"):
        complete_recipe({"transforms": ("awq", "rotate")})
    assert complete_recipe({"transforms": ("rotate", "awq")}).transforms == ("rotate", "awq")
