"""A model as transformers sees it: configuration, tokenizer, processor."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import Checkpoint, open_checkpoint
from lowbit.export.limits import limited
from lowbit.export.plain import read_json, write_json
from lowbit.export.sharded import CONFIG_NAME
from lowbit.export.untrusted import untrusted
from lowbit.models.files import Files, model_directory, refuse_negative_epsilon, refuse_scaled_float8
from lowbit.models.tokenids import require_small_ids
from lowbit.models.tokenizer import transformers_tokenizer

PROCESSOR_LIMITS = (4 << 30, 60.0)  # bytes and seconds, to load a processor or for one sample
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
MOST_PLACES = 1 << 16  # tokens of an image; large ones have thousands
# Keys by which transformers loads kernels from a hub, or reads another configuration file instead.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
FETCHING = frozenset(form for key in IMPLEMENTATIONS for form in (key, f"_{key}", f"_{key}_internal"))
FETCHING |= {"configuration_files"}


@dataclass(frozen=True)
class Source(Files):
    """A located model: its files, and transformers' configuration."""

    config: PretrainedConfig

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. CheckpointError without a usable one."""
        return transformers_tokenizer(self.checkpoint, self.config, self.trust_remote_code)

    def processor(self) -> "transformers.ProcessorMixin":
        """The model's processor of texts and images. CheckpointError if there is none."""
        what = "no processor that transformers can load, and images need one (text alone does not: --text-column)"
        limits = limited(f"{self.directory}: its processor", *PROCESSOR_LIMITS)
        with untrusted(self.directory, what), limits, self.checkpoint.companions() as companions:
            require_small_ids(companions)
            require_small_counts(companions)
            # found on use: processors import torchvision, and with it torch's compiler, which takes seconds
            found = transformers.AutoProcessor.from_pretrained(companions, trust_remote_code=self.trust_remote_code)
            if not isinstance(found, transformers.ProcessorMixin) or not hasattr(found, "image_processor"):
                raise TypeError(
                    f"{type(found).__name__} takes no images: preprocessor_config.json is missing or another's"
                )
        return found

    @property
    def sees(self) -> bool:
        """True if the model's class takes images. For a type with several classes, the configuration's `architectures`
        decides."""
        kind, classes = self.config.model_type, self.config.architectures or []
        wrapper = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
        return wrapper is not None and (kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or wrapper in classes)

    @property
    def vocabulary(self) -> int:
        """Outputs of the model's head, from config.json."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """Positions that the model supports, from config.json; None if unknown."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def of_layers(self, name: str) -> list[int]:
        """A number of the text part's configuration, for each layer, since some families' layers differ; empty if the
        configuration has none."""
        config = self.config.get_text_config()
        layers = getattr(config, "num_hidden_layers", 1)
        if name in (getattr(config, "per_layer_attributes", None) or ()):
            return [getattr(config.per_layer_config[index], name) for index in range(layers)]
        value = getattr(config, name, None)
        return [value] * layers if isinstance(value, int) else []

    def require_known(self, ids: Tensor) -> None:
        """CheckpointError if a token id is outside the model's vocabulary."""
        wrong = ids[(ids < 0) | (ids >= self.vocabulary)]
        if len(wrong):
            raise CheckpointError(
                f"token {int(wrong[0])} is none of the model's {self.vocabulary}: the tokenizer in {self.directory} is "
                "larger than the model; put the model's own there"
            )


def open_source(
    name: str, trust_remote_code: bool = False, revision: str | None = None, finished: bool = True
) -> Source:
    """The model `name`: a directory, `demo`, or a hub id (downloaded into the hub's cache).

    finished  False for a directory that is written but not sealed yet

    Remote code runs only if `trust_remote_code` is True. CheckpointError if there is no such model, if its files are
    damaged, or if it is not a decoder language model.
    """
    directory = model_directory(name, trust_remote_code, revision)
    checkpoint = open_checkpoint(directory, finished)
    refuse_remote_code(checkpoint, trust_remote_code)
    refuse_negative_epsilon(checkpoint.head, checkpoint.config)
    config = _config(checkpoint, trust_remote_code)
    refuse_encoder(directory, config)
    refuse_scaled_float8(checkpoint)
    return Source(name, checkpoint, trust_remote_code, config)


def refuse_remote_code(checkpoint: Checkpoint, trusted: bool) -> None:
    """Raise CheckpointError if the model needs its own code to run, and the user did not allow that."""
    if checkpoint.config.get("auto_map") and not is_native(checkpoint) and not trusted:
        files = ", ".join(sorted(path.name for path in checkpoint.directory.glob("*.py"))) or "not in the directory"
        raise CheckpointError(
            f"{checkpoint.directory}: the model brings Python code of its own ({files}). Read it, and pass "
            "--trust-remote-code if you want it run"
        )


def is_native(checkpoint: Checkpoint) -> bool:
    """True if transformers has classes for the model, so that code from its repository is not needed."""
    return checkpoint.config.get("model_type") in CONFIG_MAPPING_NAMES


def _config(checkpoint: Checkpoint, trust_remote_code: bool) -> PretrainedConfig:
    """transformers' view of the validated configuration. It never rereads the file, except for trusted remote code.

    Without trust, keys are removed by which transformers would fetch code or another configuration.
    """
    plain = checkpoint.config if trust_remote_code else _without(checkpoint.config, FETCHING | {"auto_map"})
    kind = checkpoint.config.get("model_type")
    what = f"transformers cannot read this configuration (model_type {str(kind)[:40]!r})"
    with untrusted(checkpoint.directory, what):
        if trust_remote_code and "auto_map" in plain:  # its code is next to the file
            config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=True)
        else:
            with tempfile.TemporaryDirectory() as directory:
                write_json(Path(directory, CONFIG_NAME), plain)
                config = AutoConfig.from_pretrained(directory)
        config._name_or_path = str(checkpoint.directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    classes = config.architectures
    if not (classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))):
        raise CheckpointError(f"{checkpoint.directory}: architectures is {classes!r}; a list of names is expected")
    return config


def _without(value: Any, keys: frozenset[str]) -> Any:
    """A JSON value without `keys` in its objects, at any depth."""
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return [_without(inner, keys) for inner in value] if isinstance(value, list) else value


def require_small_counts(directory: Path) -> None:
    """CheckpointError if a processor would put more than MOST_PLACES tokens in the place of an image.

    Texts of gigabytes end the tokenizers library, and this process with it.
    """
    for path in (directory / name for name in PROCESSOR_FILES if (directory / name).exists()):
        for key, value in read_json(path).items():
            counts = isinstance(value, int) and not any(part in key for part in ("_id", "size", "edge", "pixels"))
            if counts and value > MOST_PLACES:
                raise CheckpointError(
                    f"{path}: {key} is {value}, {MOST_PLACES} at most are expected: the file is damaged"
                )


def refuse_encoder(directory: Path, config: Any) -> None:
    """Raise CheckpointError if the model does not generate text left to right."""
    kind, classes = config.model_type, config.architectures or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{directory / CONFIG_NAME}: architectures is {classes!r:.80}, not a list of names")
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    remote = bool(getattr(config, "auto_map", None))
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    decoding = any(name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for name in classes)
    if getattr(config.get_text_config(), "is_encoder_decoder", False) or config.is_encoder_decoder:
        raise CheckpointError(
            f"{directory}: {', '.join(classes) or kind} is an encoder with a decoder; those are not quantized here"
        )
    if not (causal or remote) or (masked and not decoding):
        raise CheckpointError(
            f"{directory}: {', '.join(classes) or kind} is no decoder language model; encoders are not quantized here"
        )
