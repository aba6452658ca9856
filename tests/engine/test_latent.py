"""Latent attention's cache: compressed rows alone, in the activations' dtype or in int8, and quantized weights."""

from pathlib import Path

import pytest
import torch

from lowbit import engine
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.engine.cache import cache_nbytes
from lowbit.errors import UsageError
from lowbit.evaluation.backend import load_dense
from lowbit.models.source import open_source
from lowbit.quant.kernels.kv_cache import INT8_CACHE, SAME
from tests.builders import calibration, logits_of, save
from tests.engine.test_families import built, decoded, prompts


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3"])
def source(request, tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    model = built(request.param)
    return save(model, tmp_path_factory.mktemp(request.param) / "model"), model


@pytest.mark.parametrize("int8", [False, True])
def test_the_cache_holds_a_compressed_row_and_the_rotated_part(source, int8):
    directory, reference = source
    model = engine.load(directory, device="cpu", context=32, cache="int8" if int8 else "same")
    config, cache = reference.config, model.spaces.make_cache(3, 32)
    assert [tuple(cache.layers[0].k.shape), tuple(cache.layers[0].v.shape)] == [
        (96, 1, config.kv_lora_rank),
        (96, 1, config.qk_rope_head_dim),
    ]
    assert cache.nbytes == cache_nbytes(model.decoder.architecture, 3, 32, torch.float32, INT8_CACHE if int8 else SAME)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    row = width + 2 * 4 if int8 else 4 * width  # bytes of a token in a layer, two scales among them
    assert cache.nbytes == config.num_hidden_layers * 96 * row


def test_an_int8_cache_stays_close(source):
    directory, reference = source
    model = engine.load(directory, device="cpu", context=32, cache="int8")
    for prompt, got in zip(prompts(), decoded(model, prompts()), strict=True):
        wanted = logits_of(reference, torch.tensor([prompt]))[0]
        for found in (got, model.logits([prompt])[0]):  # a token near a tie may go to another expert
            assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("recipe", [{"method": "rtn", "group_size": 32}, {"scheme": "int8-a8", "method": "rtn"}])
def test_quantized_products_are_those_of_the_dequantized_model(source, tmp_path, recipe):
    directory, _ = source
    job = prepare(open_source(str(directory)), complete_recipe(recipe), "cpu")
    (output := tmp_path / "out").mkdir()
    run(job, output, calibration() if job.recipe.dataset else None, lambda report: None)
    model, dense = engine.load(output, device="cpu", context=32), load_dense(open_source(str(output)))
    for prompt, got in zip(prompts(), decoded(model, prompts()), strict=True):
        wanted = logits_of(dense, torch.tensor([prompt]))[0]
        torch.testing.assert_close(model.logits([prompt])[0], got, atol=1e-4, rtol=1e-3)
        if "scheme" not in recipe:  # the dense model does not round inputs
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


def test_other_caches_are_refused(source):
    with pytest.raises(
        UsageError, match="compressed rows of latent attention are not stored in int4; or use cache='int8'"
    ):
        engine.load(source[0], device="cpu", context=32, cache="int4")
