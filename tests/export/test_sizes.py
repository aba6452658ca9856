"""export/sizes.py and its users: a number in config.json allocates nothing that the files could not fill."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.models import skeleton
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import open_source
from tests.builders import changed_config, save_family


def claimed(model: Path, **changes: Any) -> Path:
    changed_config(model, lambda config: config.update(changes))
    return model


@pytest.mark.parametrize(
    ("family", "key", "value", "held"),
    [
        ("llama", "num_hidden_layers", 10_000_000, "2 numbered layers or experts"),
        ("llama", "vocab_size", 10_000_000, "no dimension above 260"),
        ("llama", "hidden_size", 10_000_000, "no dimension above 260"),
        ("llama", "num_labels", 10_000_000, "no dimension above 260"),
        ("llama", "head_dim", 1 << 40, "no dimension above 260"),
        ("mixtral", "num_local_experts", 10_000_000, "no dimension above 260"),
        ("gpt2", "n_layer", 1 << 62, "2 numbered layers or experts"),
        ("gpt2", "n_embd", 1 << 62, "no dimension above 1024"),
    ],
)
def test_a_size_is_held_against_the_files_first(tmp_path, family, key, value, held):
    """Refused at once, before transformers reads it."""
    model = claimed(save_family(family, tmp_path / "model"), **{key: value})
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is {value}, and the files hold {held}"):
        open_source(str(model))
    assert time.monotonic() - begun < 2


def test_a_size_deep_inside_counts_too(tmp_path):
    model = claimed(save_family("llama", tmp_path / "model"), vision_config={"depth": 1 << 30})
    with pytest.raises(CheckpointError, match=f"depth is {1 << 30}"):
        open_checkpoint(model)


@pytest.mark.parametrize("value", [805_621, 1.5])
def test_more_than_all_channels_are_no_share(tmp_path, value):
    """A table of rotary frequencies has so many entries; it took 3 GiB."""
    rope = {"partial_rotary_factor": value, "rope_theta": 1e4, "rope_type": "default"}
    model = claimed(save_family("phi3", tmp_path / "model"), rope_parameters=rope)
    with pytest.raises(CheckpointError, match=rf"partial_rotary_factor is {value}, a share of each head's channels"):
        open_source(str(model))


def test_numbers_that_are_no_sizes_are_free(tmp_path):
    model = save_family("llama", tmp_path / "model")
    claimed(model, max_position_embeddings=10_485_760, rope_theta=500_000_000, total_parameters=7_000_000_000)
    open_skeleton(open_source(str(model)))


def test_a_product_of_sizes_is_held_against_the_files(tmp_path):
    """Each number alone is possible with these files, but not the model; it is built without memory."""
    model = claimed(save_family("llama", tmp_path / "model"), hidden_size=60_000, intermediate_size=60_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"config\.json belongs to another model"):
        open_skeleton(open_source(str(model)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_tables_are_held_against_the_files(tmp_path, monkeypatch):
    """Buffers are allocated in full, so a table much larger than the weights is refused first."""
    model = save_family("llama", tmp_path / "model")
    monkeypatch.setattr(skeleton, "MOST_BUFFERS", -(1 << 30))
    with pytest.raises(CheckpointError, match=r"and 64 bytes of tables"):
        open_skeleton(open_source(str(model)))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["org/kernel", "flash_attention_2", {"": "org/kernel"}, 7])
def test_a_kernel_on_a_hub_is_not_followed(tmp_path, monkeypatch, key, value):
    """The model is planned with transformers' own attention; no hub is asked, whatever the configuration names."""
    model = claimed(save_family("llama", tmp_path / "model"), **{key: value})
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", pytest.fail)
    found = open_skeleton(open_source(str(model)))
    assert found.model.config._attn_implementation in ("sdpa", "eager")


def test_another_configuration_is_not_followed(tmp_path):
    model = save_family("llama", tmp_path / "model", torch.bfloat16)
    (model / "config.4.0.0.json").write_text(json.dumps({"model_type": "gpt2"}))
    claimed(model, configuration_files=["config.4.0.0.json"])
    assert open_source(str(model)).config.model_type == "llama"


@pytest.mark.parametrize("value", ["LlamaForCausalLM", 5, [5], [["LlamaForCausalLM"]], {"a": 1}])
def test_architectures_are_names(tmp_path, value):
    model = claimed(save_family("llama", tmp_path / "model"), architectures=value)
    with pytest.raises(CheckpointError, match=str(model)):
        open_source(str(model))
