"""`--kv-cache`: scales of keys and values from calibration, written where engines look, read back and simulated."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit import engine
from lowbit.commands.common import say_loaded
from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import load_dense, open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.cached import attending
from lowbit.models.source import open_source
from lowbit.quant.kernels.kv_cache import FP8_CACHE
from tests.builders import changed_config, logits_of, save_family
from tests.e2e.cli import run_quantize, run_quantize_convert

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
QUICK = ("--num-samples", 8, "--seqlen", 32, "--eval-windows", 0, "--dataset", "builtin")
SCHEMES = {"compressed-tensors": "int8", "modelopt": "nvfp4-a16"}


def quantized(model, output, cache="fp8", fmt="compressed-tensors", *more):
    args = ("--method", "rtn", "--scheme", SCHEMES[fmt], "--format", fmt, "--kv-cache", cache, *more)
    done = run_quantize(model, *args, *QUICK, "-o", output)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("cache") / "m")


def scales_in(directory):
    return LogicalTensors(open_checkpoint(directory)).cache_scales()


@pytest.mark.parametrize(("cache", "shapes"), [("fp8", {(1,)}), ("fp8-head", {(2, 1, 1), (4, 1, 1)})])
def test_scales_are_of_rotated_keys(model, tmp_path, cache, shapes):
    """The largest magnitude gets half of FP8's range, of keys down to a quarter; here within what other tokens
    change."""
    done = quantized(model, tmp_path / "q", cache)
    assert f"keys and values: {cache}, 2 attentions" in done.out
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    names = [f"model.layers.{i}.self_attn.{part}_scale" for i in range(2) for part in "qkv"]
    assert {name for name in tensors if name.endswith("_scale") and "weight" not in name} == set(names)
    assert {tuple(tensors[name].shape) for name in names} == shapes
    assert all(tensors[name].dtype == torch.float32 for name in names)
    declared = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    strategy = {"fp8": "tensor", "fp8-head": "attn_head"}[cache]
    assert declared == {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    seen = {}

    def see(module, query, key, value):
        seen[module.layer_idx] = [each.abs().amax((0, 2, 3)) for each in (query, key, value)]
        return key, value

    plain = load_dense(open_source(str(tmp_path / "q")))
    with attending(see):
        logits_of(plain, IDS)
    for i in range(2):
        for part, largest in zip("qkv", seen[i], strict=True):
            scale = tensors[f"model.layers.{i}.self_attn.{part}_scale"].flatten()
            other = largest if cache == "fp8-head" else largest.max()
            assert ((scale * 224 / other) > 0.6).all()
            assert ((scale * 224 / other) < (3.4 if part == "k" else 1.7)).all()


@pytest.mark.parametrize("cache", ["fp8", "fp8-head"])
def test_evaluation_rounds_keys_and_values_as_such_a_cache_does(model, tmp_path, cache):
    quantized(model, tmp_path / "q", cache)
    scales = scales_in(tmp_path / "q")

    def see(module, query, key, value):
        prefix = f"model.layers.{module.layer_idx}.self_attn"
        return tuple(
            (x / scales[f"{prefix}.{part}_scale"]).to(torch.float8_e4m3fn).float() * scales[f"{prefix}.{part}_scale"]
            for x, part in ((key, "k"), (value, "v"))
        )

    plain = load_dense(open_source(str(tmp_path / "q")))
    exact = logits_of(plain, IDS)
    with attending(see):
        wanted = logits_of(plain, IDS)
    for backend in ("transformers", "blocks"):
        found = torch.cat(list(open_backend(backend, open_source(str(tmp_path / "q")), "cpu").logits([IDS])))
        assert torch.allclose(found, wanted, atol=1e-5)
    assert 1e-3 < float((wanted - exact).norm() / exact.norm()) < 0.1
    assert torch.equal(logits_of(plain, IDS), exact)


@pytest.mark.peer
def test_transformers_loads_the_file(model, tmp_path):
    pytest.importorskip("compressed_tensors")
    quantized(model, tmp_path / "q")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ours = load_dense(open_source(str(tmp_path / "q")))
    found, wanted = logits_of(theirs, IDS), logits_of(ours, IDS)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_both_formats_name_the_scales_for_their_readers(model, tmp_path):
    quantized(model, tmp_path / "m", "fp8", "modelopt")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.k_scale"].shape == ()
    assert not any(name.endswith("q_scale") for name in tensors)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_quant_algo"] == config["quantization"]["kv_cache_quant_algo"] == "FP8"
    there = run_quantize_convert(tmp_path / "m", tmp_path / "c", "--format", "compressed-tensors")
    assert there.code == 0, there.err
    before, after = scales_in(tmp_path / "m"), scales_in(tmp_path / "c")
    assert set(before) == set(after)
    assert len(before) == 4
    assert all(torch.equal(before[name], after[name]) for name in before)
    refused = run_quantize_convert(tmp_path / "c", tmp_path / "d", "--scheme", "mxfp8", "--format", "fp8").complaint
    assert "it has scales of a key-value cache (fp8), format fp8 holds none" in refused


def test_an_original_with_scales_loses_them(model, tmp_path):
    quantized(model, tmp_path / "q")
    again = run_quantize(tmp_path / "q", "--method", "rtn", "--scheme", "int8", *QUICK, "-o", tmp_path / "r")
    assert again.code == 0, again.err
    assert scales_in(tmp_path / "r") == {}
    assert not any("k_scale" in name for name in open_checkpoint(tmp_path / "r").entries)


@pytest.mark.parametrize("cache", ["fp8", "fp8-head"])
def test_the_engine_writes_the_cache_that_the_checkpoint_declares(model, tmp_path, cache):
    quantized(model, tmp_path / "q", cache)
    ours, source = engine.load(tmp_path / "q", device="cpu"), open_source(str(tmp_path / "q"))
    wanted = torch.cat(list(open_backend("transformers", source, "cpu").logits([IDS])))
    assert ours.decoder.weights.cache.number == FP8_CACHE
    exact = engine.load(tmp_path / "q", device="cpu", cache="same").logits(IDS)
    error = (ours.logits(IDS) - wanted).norm() / wanted.norm()
    assert float(error) < 0.02 * float((exact - wanted).norm() / wanted.norm()) + 1e-6


def test_the_engine_says_that_it_leaves_scales_alone(model, tmp_path, capsys):
    quantized(model, tmp_path / "q", "fp8-head")
    for cache, said in (
        ("int8", "the checkpoint's scales for an fp8-head key-value cache are not used here\n"),
        ("auto", ""),
    ):
        weights = engine.load(tmp_path / "q", device="cpu", cache=cache).decoder.weights
        say_loaded(weights.expanded, weights.unused_cache)
        assert capsys.readouterr().err == said


def test_scales_of_other_heads_are_refused(model, tmp_path):
    quantized(model, tmp_path / "q", "fp8-head")
    path = tmp_path / "q" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.v_scale"
    save_file(tensors | {name: torch.ones(3, 1, 1)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn has 3 scales of v for 2 heads"):
        engine.load(tmp_path / "q", device="cpu")


def test_a_resumed_run_writes_the_same_scales(model, tmp_path):
    from lowbit.calibrate.data import CalibrationSet
    from lowbit.calibrate.job import prepare
    from lowbit.calibrate.methods import complete_recipe
    from lowbit.calibrate.pipeline import run
    from lowbit.calibrate.resume import Journal, key_of

    job = prepare(open_source(str(model)), complete_recipe({"method": "rtn", "bits": 8, "kv_cache": "fp8"}), "cpu")
    tokens = CalibrationSet(IDS, "random")
    outputs = []
    for name in ("a", "b"):
        journal = Journal(tmp_path / "journal", key_of(job, tokens, {}))
        journal.resume()
        assert journal.finished == 2 * len(outputs)
        (tmp_path / name).mkdir()
        run(job, tmp_path / name, tokens, lambda report: None, journal)
        outputs.append((tmp_path / name / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def changed(directory, change):
    """Change the tensors of a checkpoint without its sums."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "SHA256SUMS").unlink()


@pytest.mark.parametrize("count", [3, 1000])
def test_scales_of_another_number_of_heads_are_refused(model, tmp_path, count):
    quantized(model, tmp_path / "q")
    changed(tmp_path / "q", lambda tensors: tensors.update({"model.layers.1.self_attn.v_scale": torch.ones(count)}))
    for backend in ("transformers", "blocks"):
        with pytest.raises(ValueError, match=f"{count} scales of a cache of values with 2 heads; one, or one per head"):
            list(open_backend(backend, open_source(str(tmp_path / "q")), "cpu").logits([IDS]))


def test_a_scale_that_the_file_lacks_is_one(model, tmp_path):
    """As for engines, which round every layer's keys and values if the configuration declares the cache."""
    quantized(model, tmp_path / "ones")
    quantized(model, tmp_path / "none")
    names = [f"model.layers.{i}.self_attn.{part}_scale" for i in range(2) for part in "qkv"]
    changed(tmp_path / "ones", lambda tensors: tensors.update({name: torch.ones(1) for name in names}))
    changed(tmp_path / "none", lambda tensors: [tensors.pop(name) for name in names])
    ones, none = (
        torch.cat(list(open_backend("blocks", open_source(str(tmp_path / name)), "cpu").logits([IDS])))
        for name in ("ones", "none")
    )
    assert torch.equal(ones, none)
    assert not torch.equal(ones, logits_of(load_dense(open_source(str(tmp_path / "ones"))), IDS))


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
def test_scales_that_scale_nothing_are_refused(model, tmp_path, value):
    quantized(model, tmp_path / "q")
    changed(tmp_path / "q", lambda tensors: tensors["model.layers.1.self_attn.v_scale"].fill_(value))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_scale: \[.*\] scale no cache"):
        load_dense(open_source(str(tmp_path / "q")))


def test_another_number_of_the_cache_is_refused(model, tmp_path):
    quantized(model, tmp_path / "q")
    changed_config(tmp_path / "q", lambda config: config["quantization_config"]["kv_cache_scheme"].update(num_bits=4))
    with pytest.raises(ValueError, match="of key-value caches 8-bit floats"):
        load_dense(open_source(str(tmp_path / "q")))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--kv-cache", "int8"), "kv_cache 'int8'; known: fp8, fp8-head"),
        (("--kv-cache", "fp8-head", "--format", "modelopt", "--scheme", "nvfp4-a16"), "it takes fp8"),
        (("--kv-cache", "fp8", "--format", "gptq"), "--kv-cache fp8: it takes none; --format compressed-tensors does"),
    ],
)
def test_what_cannot_be_is_refused(model, tmp_path, args, message):
    assert message in run_quantize(model, "--method", "rtn", *args, *QUICK, "-o", tmp_path / "q").complaint
    assert not (tmp_path / "q").exists()


def test_latent_attention_is_refused(tmp_path):
    from tests.families.tiny import save_tiny

    deepseek = save_tiny("deepseek_v3", tmp_path / "m")
    refused = run_quantize(deepseek, "--method", "rtn", "--kv-cache", "fp8", *QUICK, "-o", tmp_path / "q").complaint
    assert "caches a latent vector, from which engines compute keys and values; leave out --kv-cache" in refused
