"""Every kind of bad input: a nonzero exit status, one clear line, and no files left behind."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, WhisperConfig, WhisperForConditionalGeneration

from lowbit import engine
from lowbit.errors import CheckpointError
from lowbit.export import tensorfile
from lowbit.export.checkpoint import write_sums
from lowbit.export.sharded import INDEX_NAME
from tests.builders import changed_config, make_tokenizer, save_family
from tests.e2e.cli import names, run_quantize, run_quantize_eval

FAST = ["--method", "int8", "--eval-windows", 0]
AWQ = ["--method", "awq", "--group-size", 32, "--num-samples", 2, "--seqlen", 16, "--eval-windows", 0]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("template") / "llama")


@pytest.fixture
def model(template, tmp_path) -> Path:
    """A separate model to damage."""
    return Path(shutil.copytree(template, tmp_path / "model"))


@pytest.fixture
def refused(tmp_path) -> Callable[..., str]:
    """Runs quantize, which must fail with one line and leave the directory of its output unchanged."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()

    def run(*args: object) -> str:
        outcome = run_quantize(*args, "-o", outputs / "out")
        kept = "finished blocks are kept: see --resume" in outcome.complaint
        assert names(outputs) == ([".out.journal"] if kept else [])
        return outcome.complaint

    return run


def edited(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def sharded(model: Path) -> dict[str, str]:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    some = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": some[:5], "model-00002-of-00002.safetensors": some[5:]}
    weight_map = {}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, model / file)
        weight_map |= dict.fromkeys(held, file)
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_no_such_model(refused):
    assert "'no/such-model' is no directory here" in refused("no/such-model", *FAST)
    assert "./gone: no such directory" in refused("./gone", *FAST)


def test_a_directory_without_a_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json: missing" in refused(tmp_path / "empty", *FAST)


def test_a_file_as_model(refused, model):
    line = refused(model / "model.safetensors", *FAST)
    assert "model.safetensors" in line
    assert "directory" in line


def test_a_pickle(refused, model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "only pickled weights (pytorch_model.bin)" in refused(model, *FAST)


@pytest.mark.parametrize("keep", [0, 7, 5000, -1])
def test_a_truncated_file(refused, model, keep):
    raw = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(raw[:keep])
    line = refused(model, *FAST)
    assert "model.safetensors" in line
    assert "truncated" in line


@pytest.mark.parametrize("method", [FAST, AWQ], ids=["int8", "awq"])
def test_a_flipped_bit(refused, model, method):
    write_sums(model)
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-1000] ^= 4
    (model / "model.safetensors").write_bytes(raw)
    line = refused(model, *method)
    assert "model.safetensors: SHA-256 is" in line


def test_an_index_that_names_a_missing_shard(refused, model):
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "'model-00002-of-00002.safetensors' is missing" in refused(model, *FAST)


def test_an_index_that_leads_outside(refused, model):
    weight_map = sharded(model)
    shutil.copy(model / "model-00002-of-00002.safetensors", model.parent / "x.safetensors")
    moved = {name: "../x.safetensors" if "00002-of" in file[6:] else file for name, file in weight_map.items()}
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": moved}))
    assert "lies outside the model directory" in refused(model, *FAST)


def test_a_weight_that_no_file_holds(refused, model):
    edited(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "'model.layers.1.mlp.up_proj.weight'" in refused(model, *FAST)


def test_a_weight_of_another_shape(refused, model):
    changed_config(model, lambda config: config.update(intermediate_size=128))
    for method in (FAST, AWQ):
        line = refused(model, *method)
        assert "mlp." in line
        assert "96" in line
        assert "128" in line
        assert "in the model of config.json" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", [FAST, AWQ], ids=["int8", "awq"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_weight_that_is_not_finite_is_named_before_the_work(refused, model, value, method, name, monkeypatch):
    monkeypatch.setattr("lowbit.api.quantizing.run", None)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3:5] = value

    edited(model, damage)
    line = refused(model, *method)
    assert f"{name}: 2 of " in line
    assert "NaN or infinite" in line


def test_values_too_large_for_the_stored_dtype_are_not_written_as_infinite(refused, model):
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][5] = 1e6

    edited(model, enlarge)
    assert "model.layers.0.input_layernorm.weight" in refused(model, *FAST, "--dtype", "float16")


def test_an_empty_dataset(refused, model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused(model, *AWQ, "--dataset", tmp_path / "empty.txt")


def test_a_dataset_that_is_too_short(refused, model, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    line = refused(model, *AWQ, "--dataset", tmp_path / "short.txt")
    assert "short.txt is too short: " in line
    assert "32 needed" in line


def test_a_dataset_file_that_is_not_there(refused, model, tmp_path):
    line = refused(model, *AWQ, "--dataset", tmp_path / "gone.txt")
    assert "gone.txt" in line
    assert "No such file" in line


def test_a_text_column_that_is_not_there(refused, model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": "x" * 99, "id": i}) + "\n" for i in range(9)))
    line = refused(model, *AWQ, "--dataset", tmp_path / "rows.jsonl", "--text-column", "prose")
    assert "rows.jsonl has no column 'prose'; its columns are: body, id" in line


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_bits_that_no_format_holds(refused, model, bits):
    assert f"no {bits}-bit type" in refused(model, "--method", "rtn", "--bits", bits)


@pytest.mark.parametrize("size", [0, -5, 1, 48, 100])
def test_group_sizes_that_no_format_holds(refused, model, size):
    assert f"group size {size}" in refused(model, "--method", "rtn", "--group-size", size)


def test_asymmetric_8_bits(refused, model):
    assert "cannot hold uint8" in refused(model, "--method", "rtn", "--bits", 8, "--asym")


def test_an_encoder(refused, tmp_path):
    config = BertConfig(
        vocab_size=260, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM is no decoder language model" in refused(tmp_path / "bert", *FAST)


def test_an_encoder_with_a_decoder(refused, tmp_path):
    """Whisper's decoder alone could be mistaken for a language model."""
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 260, "max_target_positions": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **tokens))
    model.save_pretrained(tmp_path / "whisper")
    make_tokenizer().save_pretrained(tmp_path / "whisper")
    complaint = refused(tmp_path / "whisper", *FAST)
    assert "WhisperForConditionalGeneration is an encoder with a decoder" in complaint


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_float8_weights_whose_scales_the_configuration_does_not_know(refused, model, suffix):
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name + suffix] = torch.ones(1)

    edited(model, narrow)
    complaint = refused(model, *FAST)
    assert "14 float8 weights with scales" in complaint
    assert "no quantization_config" in complaint


@pytest.mark.parametrize("value", [0, -1.0])
def test_rotary_positions_without_a_frequency(refused, model, value):
    changed_config(model, lambda config: config["rope_parameters"].update(rope_theta=value))
    assert "config.json: the rotary frequencies of model.rotary_emb are infinite or NaN; rope_theta" in refused(model)
    with pytest.raises(CheckpointError, match=f"rope_theta is {value}, and must be above 0"):
        engine.load(str(model), "cpu")


def test_a_norm_with_a_negative_epsilon(refused, model):
    changed_config(model, lambda config: config.update(rms_norm_eps=-1e-5))
    assert "config.json: rms_norm_eps is -1e-05; a norm cannot" in refused(model)


@pytest.mark.parametrize("text", ["[1]", '"text"', '{"a":' * 200 + "1" + "}" * 200, "[" * 100_000, "{"])
def test_a_generation_config_that_is_none(refused, model, text):
    (model / "generation_config.json").write_text(text)
    assert "generation_config.json: " in refused(model, *FAST)


def test_a_quantization_config_that_says_nothing(model, tmp_path):
    changed_config(model, lambda config: config.update(quantization_config={}))
    assert run_quantize(model, *FAST, "--eval-windows", 1, "-o", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"]


def test_a_quantization_config_without_a_method(refused, model):
    changed_config(model, lambda config: config.update(quantization_config={"bits": 4}))
    assert "already quantized (by a method that config.json does not name)" in refused(model, *FAST)


def test_float8_weights_without_scales_are_weights(model, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    edited(model, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    assert run_quantize(model, *FAST, "--eval-windows", 1, "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize("factor", [1e7, 1e-7])
@pytest.mark.parametrize("flags", [["--dtype", "float16"], ["--format", "gptq", "--group-size", 32]])
def test_scales_that_float16_cannot_hold(refused, model, factor, flags):
    name = "model.layers.0.self_attn.q_proj.weight"
    edited(model, lambda tensors: tensors.update({name: tensors[name].float() * factor}))
    assert "scales" in refused(model, "--method", "rtn", "--eval-windows", 0, *flags)


def test_a_group_that_float16_loses_is_no_reason_to_refuse(model, tmp_path):
    """Groups of almost only zeros occur in real models; losing them costs nothing."""

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"][3, :32] *= 1e-7

    edited(model, shrink)
    flags = ["--method", "rtn", "--format", "gptq", "--group-size", 32, "--eval-windows", 0]
    assert run_quantize(model, *flags, "-o", tmp_path / "out").code == 0


def test_a_model_that_is_quantized_already_is_an_original_and_that_is_said(model, tmp_path):
    for source, output in ((model, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        done = run_quantize(source, *FAST, "-o", output)
        assert done.code == 0, done.err
        assert ("the model is quantized itself, as int8" in done.out) == (output.name == "twice")


@pytest.mark.parametrize("kind", ["no-such-architecture", None])
def test_an_architecture_that_nobody_knows(refused, model, kind):
    changed_config(model, lambda config: config.update(model_type=kind))
    assert str(model) in refused(model, *FAST)


def test_code_of_the_models_own(refused, model, tmp_path):
    changed_config(model, lambda config: config.update(auto_map={"AutoModelForCausalLM": "evil.Model"}))
    (model / "evil.py").write_text("raise SystemExit('must never run')")
    done = run_quantize(model, *FAST, "-o", tmp_path / "native")  # a family that transformers has: no need of the code
    assert done.code == 0, done.err
    changed_config(model, lambda config: config.update(model_type="theirs"))
    line = refused(model, *FAST)
    assert "evil.py" in line
    assert "--trust-remote-code" in line


def test_no_tokenizer(refused, model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "no tokenizer" in refused(model, *AWQ)


def test_an_unknown_recipe_key_and_a_recipe_that_trusts(refused, model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("bitss = 4\n")
    assert "did you mean 'bits'" in refused(model, "--recipe", recipe)
    recipe.write_text("trust_remote_code = true\n")
    assert "'trust_remote_code' is not read from a recipe" in refused(model, "--recipe", recipe)
    assert "no such recipe" in refused(model, "--recipe", tmp_path / "gone.toml")


def test_an_unknown_method_format_dtype_or_device(refused, model):
    assert "did you mean 'awq'" in refused(model, "--method", "awqq")
    assert "compressed-tensors" in refused(model, *FAST, "--format", "compressed-tensor")
    assert "known: auto, bfloat16" in refused(model, *FAST, "--dtype", "int7")
    assert "write cpu, cuda" in refused(model, *FAST, "--device", "gpu0")


def test_an_output_that_is_not_empty(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    line = run_quantize(model, *FAST, "-o", tmp_path / "out").complaint
    assert "not empty; pass --overwrite" in line
    assert names(tmp_path / "out") == ["precious"]
    assert run_quantize(model, *FAST, "-o", tmp_path / "out", "--overwrite").code == 0
    assert "precious" not in names(tmp_path / "out")


@pytest.mark.parametrize("output", ["model", "model/../model", "."])
def test_the_model_is_not_overwritten_by_its_own_quantization(model, output):
    """Neither an output that is the model's directory nor one that contains it deletes the model."""
    outcome = run_quantize(model, *FAST, "-o", model.parent / output, "--overwrite")
    assert outcome.code != 0
    assert "Traceback" not in outcome.err
    assert (model / "model.safetensors").exists()
    assert "quantization_config" not in json.loads((model / "config.json").read_text())


def test_an_adapter(refused, tmp_path, model):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(model / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    assert "a LoRA adapter of 'org/base', not a model: merge the two first" in refused(adapter, *FAST)
    shutil.copy(model / "config.json", adapter)
    assert "a LoRA adapter of 'org/base'" in refused(adapter, *FAST)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_git_lfs_has_not_fetched(refused, model, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 216816\n"
    (model / name).write_text(pointer)
    assert f"{name}: a Git LFS pointer, not the file: run git lfs pull" in refused(model, *AWQ)


def test_a_model_whose_text_part_is_quantized_already(refused, model):
    block = {"quant_method": "compressed-tensors", "config_groups": {}}
    changed_config(model, lambda config: config.update(text_config={"quantization_config": block}))
    assert "already quantized (compressed-tensors)" in refused(model, *FAST)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1180591620717411303424])
def test_a_seed_out_of_range(refused, model, seed):
    assert f"seed {seed}: a seed lies between 0 and" in refused(model, *AWQ, "--seed", seed)


def test_an_output_that_cannot_be_made(model, monkeypatch):
    assert "Error: /proc" in run_quantize(model, *FAST, "-o", "/proc/nowhere/out").complaint
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    line = run_quantize(model, *FAST, "-o", "/proc/nowhere/out").complaint
    assert line.startswith("Error: /proc/nowhere")
    assert "No such file or directory" in line


def test_too_little_room(refused, model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    line = refused(model, *FAST)
    assert "0.00 GB free, about 0.05 GB needed" in line


@pytest.mark.parametrize("method", [FAST, AWQ], ids=["int8", "awq"])
def test_a_disk_that_fills_up_while_writing(refused, model, monkeypatch, method):
    """The device says ENOSPC in the middle of a file, as /dev/full does."""
    add = tensorfile.TensorFileWriter.add

    def full(self: tensorfile.TensorFileWriter, name: str, tensor: torch.Tensor) -> None:
        if self.nbytes > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(tensorfile.TensorFileWriter, "add", full)
    assert "the disk is full" in refused(model, *method)


@pytest.mark.parametrize(("family", "limit"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_windows_longer_than_a_table_of_positions(refused, tmp_path, family, limit):
    model = save_family(family, tmp_path / family, **{limit: 128})
    assert "windows of 129 tokens" in refused(model, *AWQ, "--seqlen", 129)
    assert run_quantize(model, "--method", "int8", "-o", tmp_path / "short").code == 0  # scored in windows that fit
    assert "has positions for 128" in run_quantize_eval("perplexity", model).complaint
    assert run_quantize(model, *AWQ, "--seqlen", 128, "-o", tmp_path / "fits").code == 0


def test_rotary_models_go_as_far_as_they_are_asked(tmp_path):
    model = save_family("llama", tmp_path / "llama", max_position_embeddings=64)
    assert run_quantize(model, *AWQ, "--seqlen", 100, "-o", tmp_path / "out").code == 0
