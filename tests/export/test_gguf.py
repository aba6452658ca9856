"""The format gguf: gguf's own reader finds what llama.cpp needs, and ours gives every tensor back."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import quants

import lowbit
from lowbit.errors import CheckpointError, RecipeError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.export.gguf.families import FAMILIES, family_of, linears_at, place_of
from lowbit.export.gguf.file import header_bytes, read_header
from lowbit.export.gguf.hyper import hyper_keys, rope_tensors
from lowbit.export.gguf.mixtures import MIXTURES, Shape
from lowbit.export.gguf.tokens import CONTROL, SPACE, UNUSED, token_keys
from tests.builders import CHAT_TEMPLATE, changed_config, make_config, save_family

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
GEMMA = WIDE | {"query_pre_attn_scalar": 16}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE,
    "qwen3": WIDE,
    "gemma2": GEMMA,
    "gemma3": GEMMA | {"num_hidden_layers": 6},
    "phi3": WIDE,
    "gpt2": {"n_embd": 256},
    "mixtral": WIDE,
    "qwen2_moe": WIDE | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3_moe": WIDE | {"moe_intermediate_size": 256, "norm_topk_prob": True},
}


def written(family: str, place: Path, scheme: str = "q4_k_m", **changes: Any) -> tuple[Path, Path]:
    """A tiny model of `family`, and its GGUF."""
    model = save_family(family, place / family, torch.float16, **CHANGES[family] | changes)
    output = place / f"{family}-gguf"
    lowbit.quantize(model, output, method="rtn", scheme=scheme, format="gguf", device="cpu", eval_windows=0)
    return model, output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return written("llama", tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("family", CHANGES)
def test_their_reader_finds_every_tensor_by_its_name(family: str, tmp_path: Path) -> None:
    model, output = written(family, tmp_path, "q4_0")
    found = gguf.GGUFReader(output / "model.gguf")
    arch = family_of(json.loads((model / "config.json").read_text())).arch
    assert found.fields["general.architecture"].contents() == arch
    theirs = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 8)
    names = {tensor.name for tensor in found.tensors}
    for name in LogicalTensors(open_checkpoint(model)).names:
        place = place_of(family_of({"model_type": open_checkpoint(model).config["model_type"]}), name)
        assert place is not None
        stem = name.rpartition(".")[0]
        merged = stem.replace(f".experts.{place.expert}.", ".experts.") if place.expert is not None else stem
        merged = merged.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward") if (
            "block_sparse_moe.experts" in merged
        ) else merged  # fmt: skip
        assert theirs.get_name(merged) == place.name.rpartition(".")[0], name
        assert place.name in names
    assert names >= {"token_embd.weight", "output_norm.weight", "blk.1.ffn_norm.weight"}


@pytest.mark.parametrize("scheme", ["q2_k", "q3_k_l", "q5_k_m", "q5_1", "q8_0", "mxfp4", "nvfp4", "int4-g32"])
def test_every_mixture_is_written_and_read_back(scheme: str, tmp_path: Path) -> None:
    model, output = written("llama", tmp_path, scheme)
    logical = LogicalTensors(open_checkpoint(output))
    reader = gguf.GGUFReader(output / "model.gguf")
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for linear in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj", "model.embed_tokens"):
        tensor = by_name[place_of(family_of(logical.checkpoint.config), f"{linear}.weight").name]
        theirs = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
        if "nvfp4" in scheme and linear in logical.schemes and str(logical.schemes[linear]) == "nvfp4-a16":
            theirs = theirs * float(by_name[tensor.name.replace(".weight", ".scale")].data[0])
        if linear in logical.schemes:
            assert torch.equal(theirs, logical.exact(f"{linear}.weight")), linear
    assert reader.fields["general.file_type"].contents() == (MIXTURES[scheme].kind if scheme in MIXTURES else 2)
    dense = LogicalTensors(open_checkpoint(model))
    for name in dense.names:
        if not logical.is_quantized(name):
            assert torch.equal(logical.read(name).float(), dense.read(name).float()), name


def test_rows_of_queries_and_keys_are_in_their_order(llama: tuple[Path, Path]) -> None:
    logical = LogicalTensors(open_checkpoint(llama[1]))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(llama[1] / "model.gguf").tensors}
    for part, heads in (("q", 4), ("k", 2)):
        ours = logical.exact(f"model.layers.0.self_attn.{part}_proj.weight")
        tensor = tensors[f"blk.0.attn_{part}.weight"]
        theirs = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
        rows = torch.arange(heads * 16).view(heads, 2, 8).transpose(1, 2).flatten()
        assert torch.equal(theirs, ours[rows])
        assert not torch.equal(theirs, ours)


def test_the_file_says_what_it_is_and_where_it_comes_from(llama: tuple[Path, Path]) -> None:
    keys = read_header(llama[1] / "model.gguf").keys
    fields = gguf.GGUFReader(llama[1] / "model.gguf").fields
    assert {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")} == keys
    assert keys["general.file_type"] == 15
    assert keys["general.quantization_version"] == 2
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.dimension_count"] == 16
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.bos_token_id"] == 256
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert len(keys["tokenizer.ggml.tokens"]) == 260
    assert keys["tokenizer.ggml.token_type"][256:] == [CONTROL] * 3 + [UNUSED]
    assert 'scheme = "q4_k_m"' in keys["lowbit.recipe"]
    assert keys["lowbit.version"] == lowbit.__version__


def test_a_calibrated_file_names_its_text_and_its_loss(tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model", torch.float16, **WIDE)
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog. " * 200)
    lowbit.quantize(
        model, tmp_path / "out", method="gptq", scheme="q2_k", format="gguf", device="cpu", eval_windows=0,
        dataset=str(tmp_path / "text.txt"), num_samples=4, seqlen=64,
    )  # fmt: skip
    keys = read_header(tmp_path / "out" / "model.gguf").keys
    assert len(keys["lowbit.calibration_sha256"]) == 64
    assert 0 < keys["lowbit.block_loss"] < 1
    schemes = LogicalTensors(open_checkpoint(tmp_path / "out")).schemes
    assert {name.rpartition(".")[2]: str(scheme) for name, scheme in schemes.items() if ".0." in name} == {
        **dict.fromkeys(("q_proj", "k_proj", "gate_proj", "up_proj"), "q2_k"),
        "v_proj": "q3_k",
        "down_proj": "q3_k",
        "o_proj": "int4-g32",  # 64 inputs
    }


def test_a_row_that_its_type_cannot_hold_is_in_the_plan(llama: tuple[Path, Path]) -> None:
    report = json.loads((llama[1] / "quantization_report.json").read_text())
    rows = report["blocks"][0]["linears"]
    row = rows["model.layers.0.self_attn.o_proj"]
    assert row["scheme"] == "int5-g32"
    assert "64 inputs do not divide into super-blocks of 256" in json.dumps(row)


def test_limits_of_engines_that_open_no_gguf_go_unsaid(llama: tuple[Path, Path]) -> None:
    report = json.loads((llama[1] / "quantization_report.json").read_text())
    assert report["embeddings"] == "q4_k"
    assert report["caveats"] == {}


def test_rows_that_no_blocks_divide_stay_in_16_bits_or_are_refused(tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model", torch.float16, hidden_size=256, intermediate_size=80)
    with pytest.raises(CheckpointError, match="80 inputs do not divide into groups of 32"):
        lowbit.quantize(model, tmp_path / "out", method="rtn", scheme="q4_0", format="gguf", device="cpu")


def test_the_head_of_tied_embeddings_is_one_tensor(tmp_path: Path) -> None:
    _, output = written("llama", tmp_path, "q4_k_m", tie_word_embeddings=True)
    names = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(output / "model.gguf").tensors}
    assert names["token_embd.weight"] == "Q6_K"
    assert "output.weight" not in names
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is True


def test_untied_ones_are_two(llama: tuple[Path, Path]) -> None:
    names = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(llama[1] / "model.gguf").tensors}
    assert (names["token_embd.weight"], names["output.weight"]) == ("Q4_K", "Q6_K")


def test_a_spoilt_file_is_noticed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(llama[1], tmp_path / "copy")
    raw = bytearray((copy / "model.gguf").read_bytes())
    (copy / "model.gguf").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="it is truncated"):
        open_checkpoint(copy)
    changed_config(copy, lambda config: config.update(model_type="qwen3"))
    (copy / "model.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match="of the architecture 'llama', and config"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "relu"}, "its activation is relu; llama.cpp computes silu for llama"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "embedding is 'dynamic'"),
        ({"model_type": "opt"}, "no GGUF is written of the model type 'opt'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(change: dict, reason: str) -> None:
    config = make_config("llama").to_dict() | change
    with pytest.raises(CheckpointError, match=reason):
        hyper_keys(config, family_of(config))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}


def test_a_factor_of_yarn_is_beside_the_usual_one() -> None:
    usual = 0.1 * math.log(4) + 1
    for settings, factor in (
        ({}, None),
        ({"attention_factor": 1.5}, 1.5 / usual),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(4) + 1) / usual / usual),
    ):
        config = make_config("llama", rope_parameters=YARN | settings)
        found = hyper_keys(config.to_dict(), family_of({"model_type": "llama"})).get("llama.rope.scaling.attn_factor")
        assert found == (None if factor is None else pytest.approx(factor))
        rotary = __import__("transformers").models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        assert rotary.attention_scaling == pytest.approx((1.0 if found is None else found) * usual)


def test_sliding_windows_that_llama_cpp_does_not_know_are_said() -> None:
    caveat = FORMATS["gguf"].caveat_of_model
    known = {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768}
    assert "to the last 4096" in (caveat(known) or "")
    assert caveat(known | {"sliding_window": None}) is None
    assert caveat(known | {"max_position_embeddings": 4096}) is None


def test_other_settings_are_refused_by_family() -> None:
    for family, change, reason in (
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "have no experts"),
        ("gemma2", {"query_pre_attn_scalar": 224, "head_dim": 16}, "query_pre_attn_scalar is 224"),
        ("gemma3", {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled in a way"),
        ("qwen2", {"head_dim": 8}, "its heads are 4 of 8, llama.cpp has 64 in all"),
        ("qwen3", {"attention_bias": True}, "its attention has biases"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "its head is tied to the embeddings"),
        ("gemma2", {"tie_word_embeddings": False, "query_pre_attn_scalar": 16}, "its head is not tied"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast of its rotary embedding is 16"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotates a part of each"),
        ("llama", {"head_dim": 1 << 20}, "1048576 inputs of a head"),
        ("llama", {"rope_parameters": {"rope_theta": 1e300}}, "which is no float32"),
        ("llama", {"max_position_embeddings": 1 << 40}, "fit"),
        ("gemma3", {"num_hidden_layers": 1 << 60}, "blocks; 0 to 16384 are read"),
    ):
        config = make_config(family).to_dict() | change
        with pytest.raises(CheckpointError, match=reason):
            hyper_keys(config, family_of(config))


def test_factors_of_a_stretched_embedding_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 256, "rope_theta": 10000.0}
    config = make_config("llama", head_dim=64, rope_parameters=rope)
    rotary = __import__("transformers").models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = rope_tensors(config.to_dict(), family_of({"model_type": "llama"}))["rope_freqs.weight"]
    torch.testing.assert_close(plain / factors, rotary.inv_freq)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0


def test_names_lead_back_to_transformers() -> None:
    for family in FAMILIES:
        for leaf in family.inside:
            name = f"{family.blocks}.3.{leaf.replace('*', '5')}.weight"
            place = place_of(family, name)
            assert place is not None
            assert place.layer == 3
            assert name.removesuffix(".weight") in linears_at(family, place.name, 8)
    assert linears_at(FAMILIES[0], "blk.0.what.weight", 0) == []


def tokenizer(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]} | changes.pop("model", {})
    return {"model": model, "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel"}} | changes


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def in_turn(*steps: dict) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("steps", "pre"),
    [
        ({"type": "ByteLevel"}, "gpt-2"),
        (in_turn({"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}), "smollm"),
        (in_turn(SPLIT | {"pattern": {"Regex": LLAMA3}}, BYTES), "llama-bpe"),
        (in_turn(SPLIT | {"pattern": {"Regex": LLAMA3.replace("{1,3}", "")}}, BYTES), "qwen2"),
        (in_turn(SPLIT | {"pattern": {"Regex": r"\s"}}, BYTES), None),
        (in_turn({"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}), None),
        (None, None),
    ],
)
def test_the_split_into_words_has_their_name_or_is_refused(steps: Any, pre: str | None, tmp_path: Path) -> None:
    found = tokenizer(pre_tokenizer=steps, model={"ignore_merges": pre == "llama-bpe"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    if pre is None:
        with pytest.raises(CheckpointError, match="it splits texts by"):
            token_keys(tmp_path, {}, 4)
    else:
        keys = token_keys(tmp_path, {}, 4)
        assert keys["tokenizer.ggml.pre"] == pre
        assert keys["tokenizer.ggml.tokens"] == ["a", "b", "ab", "[PAD3]"]
        assert keys["tokenizer.ggml.merges"] == ["a b"]


def test_a_vocabulary_of_bytes_may_allow_a_fallback(tmp_path: Path) -> None:
    plain = tokenizer(pre_tokenizer={"type": "ByteLevel"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    keys = token_keys(tmp_path, {}, 4)
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain | {"model": plain["model"] | {"byte_fallback": True}}))
    assert token_keys(tmp_path, {}, 4) == keys


def test_sentencepiece_has_scores_in_the_order_of_merging(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0x0A>": 1, SPACE: 2, "a": 3, SPACE + "a": 4, "aa": 5}
    model = {"vocab": vocabulary, "merges": [[SPACE, "a"], ["a", "a"]], "byte_fallback": True, "unk_token": "<unk>"}
    steps = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    normal = {"type": "Sequence", "normalizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer(model=model, normalizer=normal, pre_tokenizer=None)))
    keys = token_keys(tmp_path, {}, 6)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.token_type"] == [2, 6, 1, 1, 1, 1]
    assert keys["tokenizer.ggml.scores"][4:] == [0.0, -1.0]
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    with pytest.raises(CheckpointError, match="tokens up to 5, and the embeddings have 4 rows"):
        token_keys(tmp_path, {}, 4)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="a GGUF holds its tokenizer"):
        token_keys(tmp_path, {}, 6)


def test_mixtures_are_theirs() -> None:
    shape = Shape(layers=32, grouped=4)
    medium = [MIXTURES["q4_k_m"].scheme_of("ffn_down", layer, shape) for layer in range(32)]
    assert [layer for layer, scheme in enumerate(medium) if scheme == "q6_k"] == [
        0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31,
    ]  # fmt: skip
    assert MIXTURES["q2_k"].scheme_of("attn_v", 0, shape) == "q4_k"
    assert MIXTURES["q2_k"].scheme_of("attn_v", 0, Shape(32, 1)) == "q3_k"
    assert [MIXTURES["q2_k_s"].scheme_of("ffn_down", layer, shape) for layer in (3, 4)] == ["q4_k", "q2_k"]
    assert [MIXTURES["q2_k_s"].scheme_of("attn_v", 0, Shape(32, group)) for group in (4, 3)] == ["q4_k", "q2_k"]
    assert MIXTURES["q4_k_s"].scheme_of("attn_v", 3, shape) == "q5_k"
    assert MIXTURES["q3_k_m"].scheme_of("ffn_down", 1, shape) == "q5_k"
    assert MIXTURES["q4_k_m"].scheme_of("attn_k", 1, Shape(32, 4, experts=8)) == "int8-g32"
    raised = {name: MIXTURES[name].scheme_of("attn_output", 1, Shape(32, 4, experts=8)) for name in MIXTURES}
    assert (raised["q4_k_m"], raised["q2_k"], raised["q2_k_s"], raised["q3_k_l"]) == ("q5_k", "q5_k", "q2_k", "q3_k")
    with pytest.raises(RecipeError, match="is no scheme"):
        lowbit.quantize("nowhere", "out", scheme="q4_k_xl", format="gguf")


def test_a_header_is_theirs_byte_for_byte(tmp_path: Path) -> None:
    keys = {"general.architecture": "llama", "a.text": "é", "a.number": 7, "a.float": 0.5, "a.yes": True}
    keys |= {"a.texts": ["x", "yz"], "a.floats": [1.0, 2.0]}
    writer = gguf.GGUFWriter(tmp_path / "theirs", "llama")
    for name, value in list(keys.items())[1:]:
        {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
         list: writer.add_array}[type(value)](name, value)  # fmt: skip
    writer.add_tensor("t", torch.arange(6, dtype=torch.float32).view(2, 3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = header_bytes(keys, {"t": ((2, 3), 0)})
    assert (tmp_path / "theirs").read_bytes()[: len(ours)] == ours
