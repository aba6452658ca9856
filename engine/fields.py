"""Fields of a configuration: those that a family's reader uses, those without effect on logits, and the rest.

Every field of the rest must have its default value. Otherwise the model computes something unknown to the engine.
"""

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

# Fields without effect on a decoder's logits: training, generation, labels, other heads, images, records.
NEUTRAL = frozenset(
    (
        *("architectures", "dtype", "transformers_version", "return_dict", "output_hidden_states", "use_cache"),
        *("is_encoder_decoder", "is_decoder", "chunk_size_feed_forward", "pretraining_tp", "initializer_range"),
        *("attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        *("text_config", "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index"),
        *("image_token_index", "reorder_and_upcast_attn"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise"),
    )
)
# Fields that transformers' classes translate into fields used by the readers: layer_types, rope_parameters.
RESOLVED = frozenset(
    {"num_hidden_layers", "use_sliding_window", "max_window_layers", "original_max_position_embeddings"}
)
# Fields that no class declares but transformers obeys, with the only supported value.
UNDECLARED = {"is_causal": True}


class NotComputed(ValueError):
    """A configuration with something that the engine does not compute."""


class Fields:
    """A configuration that records which of its fields were read."""

    def __init__(self, config: Any) -> None:
        """NotComputed if layers have individual sizes."""
        if getattr(config, "is_heterogeneous", False):
            raise NotComputed("per_layer_config gives layers individual sizes; the engine needs equal ones")
        self._config, self._read = config, set[str]()
        self._text: Fields | None = None

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._config, name)

    def declared(self, name: str, default: Any = None) -> Any:
        """A field; `default` if the configuration's class has no such field, even if config.json has it."""
        names = {field.name for field in fields(self._config)} if is_dataclass(self._config) else vars(self._config)
        return getattr(self, name) if name in names else default

    def get_text_config(self) -> "Fields":
        """The fields of a vision model's text part, or of the model itself."""
        text = self._config.get_text_config()
        if text is self._config:
            return self
        self._text = self._text or Fields(text)
        return self._text

    def refuse_unread(self) -> None:
        """NotComputed if an unread field differs from its default."""
        for name, default in self._assumed().items():
            value = getattr(self._config, name, default)
            if value != default and (value or default):  # None and False are equivalent
                raise NotComputed(f"{name} is {value!r}; the engine computes only {default!r}")
        if self._text is not None:
            self._text.refuse_unread()

    def _assumed(self) -> dict[str, Any]:
        """The fields that must have their default value, with these values."""
        known = NEUTRAL | RESOLVED | self._read
        declared = fields(self._config) if is_dataclass(self._config) else ()
        defaults = {field.name: field.default for field in declared if field.name not in known}
        return UNDECLARED | {name: None if default is MISSING else default for name, default in defaults.items()}
