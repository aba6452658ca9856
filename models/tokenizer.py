"""A model's tokenizer: from tokenizer.json alone if that is all that the files ask for, else by transformers.

An import of transformers reads thousands of files, and its choice of a tokenizer's class imports models and generation:
5 s of processor time with transformers 5.17 on a machine with an H200, more than the load of a 7B model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tokenizers

from lowbit.export.checkpoint import Checkpoint
from lowbit.export.files import read_bytes
from lowbit.export.plain import parse_json, require_object
from lowbit.export.untrusted import untrusted
from lowbit.models.demo import quiet_transformers
from lowbit.models.tokenids import LARGEST, require_small_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take tokenizer.json as it is
# Types of models for which transformers takes another class than the files name, or repairs what they say.
REPAIRED = ("chatglm", "mistral", "mixtral", "phi3", "phimoe", "qwen2")
ADDING = ("added_tokens.json", "special_tokens_map.json")  # older files that may add tokens
SETTING = ("auto_map", "fix_mistral_regex", "split_special_tokens")
MORE = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that an engine uses."""

    @property
    def chat_template(self) -> Any:
        """A template, several by name, or None."""

    @property
    def eos_token_id(self) -> Any:
        """The id of the end token."""

    @property
    def special_tokens_map(self) -> Any:
        """Special tokens by the names of their uses."""

    @property
    def added_tokens_decoder(self) -> Any:
        """The tokens outside the vocabulary, by their ids."""

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """The token ids of a text."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """The text of token ids."""

    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> str:
        """The template for a conversation. ValueError without one."""

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of tokens outside the vocabulary."""


@dataclass
class PlainTokenizer:
    """The tokenizer in a tokenizer.json, with the names of transformers' own.

    special_tokens_map  name in NAMED -> token
    chat_template       a template, several by name, or None
    """

    backend_tokenizer: tokenizers.Tokenizer
    special_tokens_map: Mapping[str, str]
    chat_template: str | Mapping[str, str] | None

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """The token ids of a text."""
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        """The text of token ids."""
        return str(self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template for a conversation. ValueError without one."""
        found = self.chat_template
        if isinstance(found, Mapping):
            found = found.get("tool_use" if tools is not None and "tool_use" in found else "default")
        if found is None:
            raise ValueError("the files have no default chat template. ")
        return found

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of tokens outside the vocabulary."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """The tokens outside the vocabulary, by their ids."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end token."""
        eos = self.special_tokens_map.get("eos_token")
        return None if eos is None else self.backend_tokenizer.token_to_id(eos)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint. CheckpointError without a usable one."""
    with checkpoint.companions() as companions:
        require_small_ids(companions)
        settings = settings_of(companions)
        found = None
        if takes_the_file(settings, companions, checkpoint.config.get("model_type")):
            with untrusted(companions / FILE, "no tokenizer that the tokenizers library can load"):
                found = plain_tokenizer(companions, settings)
    if found is None:
        with quiet_transformers():
            return transformers_tokenizer(checkpoint)
    return found


def settings_of(companions: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    path = companions / SETTINGS
    return require_object(parse_json(read_bytes(path), path, LARGEST), path) if path.exists() else {}


def takes_the_file(settings: Mapping[str, Any], companions: Path, kind: object) -> bool:
    """True if transformers would take tokenizer.json as it is for a model of type `kind`."""
    if settings.get("tokenizer_class") not in PLAIN or kind in REPAIRED or any(map(settings.get, SETTING)):
        return False
    if any(isinstance(settings.get(name), dict) for name in MORE):  # names of tokens that only this model has
        return False
    return (companions / FILE).exists() and not any((companions / name).exists() for name in ADDING)


def plain_tokenizer(companions: Path, settings: Mapping[str, Any]) -> PlainTokenizer | None:
    """The tokenizer in tokenizer.json; None if the settings add tokens to it or change them."""
    backend = tokenizers.Tokenizer.from_file(str(companions / FILE))
    backend.no_truncation()
    backend.no_padding()
    known = {index: form_of(token) for index, token in backend.get_added_tokens_decoder().items()}
    given = settings.get("added_tokens_decoder") or {}
    if any(known.get(int(index)) != form_of(tokenizers.AddedToken(**token)) for index, token in given.items()):
        return None
    special = {name: text_of(value) for name, value in settings.items() if name.endswith("_token") and value}
    more = [text_of(value) for name in MORE for value in settings.get(name) or ()]
    if not {content for content, *_ in known.values()} >= {*special.values(), *more} - {None}:
        return None
    named = {name: text for name in NAMED if (text := special.get(name)) is not None}
    found = PlainTokenizer(backend, named, template_of(companions, settings))
    found.decode(found.encode("A text."))  # a broken tokenizer often fails only in use
    return found


def form_of(token: tokenizers.AddedToken) -> tuple[Any, ...]:
    """The text and the flags of an added token."""
    return tuple(getattr(token, flag) for flag in FLAGS)


def text_of(value: Any) -> str | None:
    """The text of a special token in settings; None for a switch such as add_bos_token."""
    return value if isinstance(value, str) else value.get("content") if isinstance(value, dict) else None


def template_of(companions: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name. Files of their own come before the settings."""
    found = dict(templates_in(companions))
    if not found:
        given = settings.get("chat_template")
        found = {each["name"]: each["template"] for each in given} if isinstance(given, list) else {}
        if not found:
            return given
    return found["default"] if found.keys() == {"default"} else found


def templates_in(companions: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each template that has a file."""
    if (companions / TEMPLATE).exists():
        yield "default", read_bytes(companions / TEMPLATE).decode()
    for path in sorted((companions / TEMPLATES).glob("*.jinja")):
        yield path.stem, read_bytes(path).decode()


def transformers_tokenizer(
    checkpoint: Checkpoint, config: "PretrainedConfig | None" = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint as transformers loads it. CheckpointError without a usable one.

    config  transformers' configuration of the model, which has a say in the tokenizer's class; made if it is needed
    """
    from transformers import AutoTokenizer

    unusable = untrusted(checkpoint.directory, "no tokenizer that transformers can load")
    with unusable, checkpoint.companions() as companions:
        require_small_ids(companions)
        if config is None:
            config = config_for(checkpoint, settings_of(companions))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            companions, config=config, trust_remote_code=trust_remote_code
        )
        tokenizer.decode(tokenizer("A text.").input_ids)  # a broken tokenizer often fails only in use
    return tokenizer


def config_for(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> "PretrainedConfig":
    """The configuration by which transformers chooses a tokenizer's class.

    Files that name their class, as most do, need not the model's own, which takes over a second to import.
    """
    from transformers import AutoConfig, PretrainedConfig

    kind = checkpoint.config.get("model_type")
    if settings.get("tokenizer_class") is None or "auto_map" in settings:
        return AutoConfig.for_model(kind)
    config = PretrainedConfig(model_type=kind)
    config._name_or_path = str(checkpoint.directory)
    return config
