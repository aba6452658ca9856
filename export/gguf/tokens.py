"""The tokenizer as keys of GGUF, from tokenizer.json.

llama.cpp has a tokenizer of its own for each kind: `gpt2` for byte-level BPE, whose split of a text into words it knows
by a name (`tokenizer.ggml.pre`), and `llama` for SentencePiece. A wrong name splits words elsewhere, and nothing says
so: a tokenizer whose split is none of those below is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.files import read_bytes, read_text
from lowbit.export.gguf.hyper import UNFIT
from lowbit.export.plain import parse_json, read_json, require_object

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
LARGEST_SCORE = 0.0
MOST_ROWS = 1 << 22  # embeddings; the largest vocabularies take 2^18
LARGEST = 1 << 128  # transformers writes 10^30 for "no limit"
SPACE = "\u2581"  # SentencePiece's
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CASED[0]}*{CASED[1]}+|[^\r\n\p{{L}}\p{{N}}]?{CASED[0]}+{CASED[1]}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Splits into words, as `_split` tells them: llama.cpp's name for each.
SPLITS: dict[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (CONTRACTIONS + "{1,3}" + REST,): "llama-bpe",
    (CONTRACTIONS + REST,): "qwen2",
    (TEKKEN,): "tekken",
}


@dataclass(frozen=True)
class Tokens:
    """A tokenizer's table.

    model   llama.cpp's kind of tokenizer
    pre     its name of the split into words
    texts   of all tokens
    types   of all tokens
    scores  of all tokens, the highest merged first; None for byte-level BPE
    merges  pairs in the order of merging; None for SentencePiece
    prefix  True if a space is put before a text; None if that has no meaning
    """

    model: str
    pre: str
    texts: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    prefix: bool | None = None


def token_keys(directory: Path, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The keys of the tokenizer in `directory` for a table of `rows` embeddings.

    CheckpointError if there is no tokenizer.json, or if llama.cpp would split texts otherwise.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{path}: missing, and a GGUF holds its tokenizer: save it with transformers' AutoTokenizer once"
        )
    found, settings = read_json(path), _optional(directory / "tokenizer_config.json")
    generation = _optional(directory / "generation_config.json")
    try:
        table = _table(found, rows)
        special, template = _special(found, settings, generation, config, table), _template(directory, settings)
    except CheckpointError:
        raise
    except UNFIT as error:
        raise CheckpointError(f"{path}: no tokenizer that llama.cpp has ({error})") from error
    ggml: dict[str, Any] = {
        "model": table.model,
        "pre": table.pre,
        "tokens": table.texts,
        "token_type": table.types,
        "scores": table.scores,
        "merges": table.merges,
        "add_space_prefix": table.prefix,
    }
    keys = {f"tokenizer.ggml.{key}": value for key, value in (ggml | special).items() if value is not None}
    return keys | ({} if template is None else {"tokenizer.chat_template": template})


def _optional(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = parse_json(read_bytes(path), path, largest=LARGEST)
    return require_object(found, path)


def _table(found: Mapping[str, Any], rows: int) -> Tokens:
    """The table of a tokenizer.json. ValueError for a kind that llama.cpp has not, or has with another split."""
    if rows > MOST_ROWS:
        raise ValueError(f"the embeddings have {rows} rows; {MOST_ROWS} at most are written")
    model = found["model"]
    if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(f"a model of type {model.get('type')!r}; BPE is what is written")
    ids = dict(model["vocab"])
    added = {token["content"]: token for token in found.get("added_tokens") or ()}
    ids |= {text: token["id"] for text, token in added.items()}
    size = max(ids.values()) + 1
    if size > rows or min(ids.values()) < 0:
        raise ValueError(f"it has tokens up to {size - 1}, and the embeddings have {rows} rows")
    texts, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, place in ids.items():
        texts[place], types[place] = text, NORMAL
    for token in added.values():
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    merges = [" ".join(pair) if isinstance(pair, list) else str(pair) for pair in model["merges"]]
    # a vocabulary of bytes has no use for the fallback that some converters allow it (transformers 5.17, from a GGUF)
    of_bytes = any(step["type"] == "ByteLevel" for step in _steps(found.get("pre_tokenizer")))
    if model.get("byte_fallback") and not of_bytes:
        return _sentencepiece(found, texts, types, merges)
    split = tuple(_split(found.get("pre_tokenizer")))
    if split not in SPLITS:
        raise ValueError(f"it splits texts by {' and then '.join(split) or 'nothing'}, for which llama.cpp has no name")
    return Tokens("gpt2", SPLITS[split], texts, types, merges=merges)


def _split(steps: Any) -> list[str]:
    """The steps of a split into words: patterns, `digits` one by one, and `words` of GPT-2."""
    if steps is None:
        return []
    match steps["type"]:
        case "Sequence":
            return [step for each in steps["pretokenizers"] for step in _split(each)]
        case "ByteLevel":
            return ["words"] if steps.get("use_regex", True) else []
        case "Digits":
            return ["digits" if steps.get("individual_digits") else "numbers"]
        case "Split" if "Regex" in steps["pattern"] and steps.get("behavior") == "Isolated" and not steps.get("invert"):
            return [str(steps["pattern"]["Regex"])]
    return [str(steps)[:80]]


def _sentencepiece(found: Mapping[str, Any], texts: list[str], types: list[int], merges: Sequence[str]) -> Tokens:
    """The table of a SentencePiece tokenizer: a token's score is the place of the first merge that makes it."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault(pair.replace(" ", ""), rank)
    scores = [LARGEST_SCORE - first[text] if text in first else LARGEST_SCORE for text in texts]
    for place, text in enumerate(texts):
        if types[place] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[place] = BYTE
    unknown = found["model"].get("unk_token")
    if unknown in texts:
        types[texts.index(unknown)] = UNKNOWN
    return Tokens("llama", "default", texts, types, scores=scores, prefix=_has_prefix(found))


def _has_prefix(found: Mapping[str, Any]) -> bool:
    """True if SentencePiece puts a space before a text. ValueError if spaces are replaced in a way it does not know."""
    normalizer, splitter = _steps(found.get("normalizer")), _steps(found.get("pre_tokenizer"))
    replaces = any(
        step["type"] == "Replace" and step["content"] == SPACE and step["pattern"] == {"String": " "}
        for step in normalizer
    )
    metaspace = [step for step in splitter if step["type"] == "Metaspace"]
    if not replaces and not metaspace:
        raise ValueError("its spaces do not become SentencePiece's")
    prepends = any(step["type"] == "Prepend" and step["prepend"] == SPACE for step in normalizer)
    return prepends or any(step.get("prepend_scheme", "always") != "never" for step in metaspace)


def _steps(steps: Any) -> list[Any]:
    if steps is None:
        return []
    return list(steps.get("normalizers") or steps.get("pretokenizers") or [steps])


def _special(
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    table: Tokens,
) -> dict[str, int | bool | None]:
    """The numbers of the special tokens, and if one begins or ends every text."""
    numbers = {text: place for place, text in enumerate(table.texts) if table.types[place] != UNUSED}
    special: dict[str, int | bool | None] = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        place = numbers.get(str(text)) if text is not None else None
        for source in (generation, config):
            value = source.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            place = value if place is None and isinstance(value, int) and 0 <= value < len(table.texts) else place
        special[f"{key}_token_id"] = place
    begins, ends = _ends(found, numbers)
    special["add_bos_token"] = bool(settings["add_bos_token"]) if "add_bos_token" in settings else begins
    special["add_eos_token"] = ends
    if begins and special["bos_token_id"] is None:
        special["add_bos_token"] = False
    return special


def _ends(found: Mapping[str, Any], numbers: Mapping[str, int]) -> tuple[bool, bool]:
    """True for a text that a special token begins, and for one that a special token ends, by the post-processor."""
    steps = found.get("post_processor") or {}
    for step in steps.get("processors") or [steps]:
        if step.get("type") == "TemplateProcessing":
            single = step["single"]
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
    return False, False


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template, or None."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return template if isinstance(template, str) else None
