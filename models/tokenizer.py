"""A model's tokenizer."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lowbit.export.checkpoint import Checkpoint
from lowbit.export.files import read_bytes
from lowbit.export.plain import parse_json, require_object
from lowbit.export.untrusted import untrusted
from lowbit.models.tokenids import LARGEST, require_small_ids

SETTINGS = "tokenizer_config.json"


def load_tokenizer(
    checkpoint: Checkpoint, config: PretrainedConfig | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. CheckpointError without a usable one.

    config  transformers' configuration of the model, which has a say in the tokenizer's class; made if it is needed
    """
    unusable = untrusted(checkpoint.directory, "no tokenizer that transformers can load")
    with unusable, checkpoint.companions() as companions:
        require_small_ids(companions)
        if config is None:
            config = config_for(checkpoint, companions)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            companions, config=config, trust_remote_code=trust_remote_code
        )
        tokenizer.decode(tokenizer("A text.").input_ids)  # a broken tokenizer often fails only in use
    return tokenizer


def config_for(checkpoint: Checkpoint, companions: Path) -> PretrainedConfig:
    """The configuration by which transformers chooses a tokenizer's class.

    Files that name their class, as most do, need not the model's own, which takes over a second to import.
    """
    path, kind = companions / SETTINGS, checkpoint.config.get("model_type")
    settings = require_object(parse_json(read_bytes(path), path, LARGEST), path) if path.exists() else {}
    if settings.get("tokenizer_class") is None or "auto_map" in settings:
        return AutoConfig.for_model(kind)
    config = PretrainedConfig(model_type=kind)
    config._name_or_path = str(checkpoint.directory)
    return config
