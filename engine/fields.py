"""Fields of a configuration: those that a family's reader uses, and the rest.

Every field of the rest must have its default value. Otherwise the model computes something unknown to the engine.
"""

from dataclasses import fields
from typing import Any

# Fields that a configuration's `resolve` turns into those that readers use: layer_types, rope_parameters,
# per_layer_config.
RESOLVED = frozenset(
    (
        *("model_type", "num_hidden_layers", "use_sliding_window", "max_window_layers", "sliding_window_pattern"),
        *("original_max_position_embeddings", "rope_scaling", "rope_theta", "partial_rotary_factor"),
        *("rope_local_base_freq", "text_config", "global_head_dim", "num_global_key_value_heads"),
    )
)


class NotComputed(ValueError):
    """A configuration with something that the engine does not compute."""


class Fields:
    """A configuration that records which of its fields were read."""

    def __init__(self, config: Any) -> None:
        self._config, self._read = config, set[str]()
        self._text: Fields | None = None

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._config, name)

    def declared(self, name: str, default: Any = None) -> Any:
        """A field; `default` if the configuration's class has no such field, even if config.json has it."""
        return getattr(self, name) if name in {field.name for field in fields(self._config)} else default

    def get_text_config(self) -> "Fields":
        """The fields of a vision model's text part, or of the model itself."""
        if self._text is None:
            text = self._config.get_text_config()
            self._text = self if text is self._config else Fields(text)
        return self._text

    def refuse_unread(self) -> None:
        """NotComputed if an unread field differs from its default."""
        for field in fields(self._config):
            value, known = getattr(self._config, field.name), field.name in RESOLVED | self._read
            if not known and value != field.default and (value or field.default):  # None and False are equivalent
                raise NotComputed(f"{field.name} is {value!r}; the engine computes only {field.default!r}")
        if self._text is not None and self._text is not self:
            self._text.refuse_unread()
