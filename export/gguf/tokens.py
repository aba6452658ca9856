"""The tokenizer as keys of GGUF, from tokenizer.json.

llama.cpp has a tokenizer of its own for each kind: `gpt2` for byte-level BPE, whose split of a text into words it knows
by a name (`tokenizer.ggml.pre`), and `llama` for SentencePiece. A wrong name splits words elsewhere, and nothing says
so: a tokenizer whose split is none of those below is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
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
IGNORING = ("llama-bpe", "tekken")  # splits with which llama.cpp takes a word that is a token whole
SPACES_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SPACE_BEFORE = {"type": "Prepend", "prepend": SPACE}
SPACES_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
FIRST = {True: "always", False: "first"}  # Metaspace's schemes that mean a space here, with and without dialogues
HARMLESS = {"NFC"}  # of texts that are composed already, as nearly all are; llama.cpp leaves the rest
PHI = re.compile("phi-?3", re.IGNORECASE)
PHI_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}
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
    strips  True if added tokens take the spaces behind them, as in Phi 3
    """

    model: str
    pre: str
    texts: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    prefix: bool | None = None
    strips: bool = False


def token_keys(directory: Path, config: Mapping[str, Any], rows: int, name: str = "") -> dict[str, Any]:
    """The keys of the tokenizer in `directory` for a table of `rows` embeddings, and the name of the model `name`.

    llama.cpp gives the added tokens of a model with Phi 3 in its name the spaces behind them, and no other's.

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
        template = _template(directory, settings)
        table = _table(found, rows, template is not None)
        special = _special(found, settings, generation, config, table)
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
    keys["general.name"] = _named(name, table.strips)
    return keys | ({} if template is None else {"tokenizer.chat_template": template})


def _named(name: str, strips: bool) -> str:
    """`name`, changed if llama.cpp would take it for Phi 3 and the tokenizer is not, or the reverse."""
    if bool(PHI.search(name)) == strips:
        return name
    return f"Phi-3 {name}".strip() if strips else PHI.sub("Phi 3", name)


def _optional(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = parse_json(read_bytes(path), path, largest=LARGEST)
    return require_object(found, path)


def _table(found: Mapping[str, Any], rows: int, chats: bool) -> Tokens:
    """The table of a tokenizer.json. ValueError for a kind that llama.cpp has not, or has with another split.

    chats  True if the model has a chat template
    """
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
    texts, types = [f"[PAD{i}]" if f"[PAD{i}]" not in ids else f"[UNUSED{i}]" for i in range(rows)], [UNUSED] * rows
    for text, place in ids.items():
        texts[place], types[place] = text, NORMAL
    _require_plain(added.values(), any(step["type"] == "Prepend" for step in _steps(found.get("normalizer"))))
    strips = _strips(added.values())
    for token in added.values():
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    merges = [" ".join(pair) if isinstance(pair, list) else str(pair) for pair in model["merges"]]
    # a vocabulary of bytes has no use for the fallback that some converters allow it (transformers 5.17, from a GGUF)
    of_bytes = any(step["type"] == "ByteLevel" for step in _steps(found.get("pre_tokenizer")))
    if model.get("byte_fallback") and not of_bytes:
        return replace(_sentencepiece(found, texts, types, merges, chats), strips=strips)
    split = tuple(_split(found.get("pre_tokenizer")))
    if split not in SPLITS:
        raise ValueError(f"it splits texts by {' and then '.join(split) or 'nothing'}, for which llama.cpp has no name")
    _require_bytes_alone(found, SPLITS[split], {tuple(pair.split(" ", 1)): rank for rank, pair in enumerate(merges)})
    return Tokens("gpt2", SPLITS[split], texts, types, merges=merges, strips=strips)


def _require_bytes_alone(found: Mapping[str, Any], pre: str, ranks: Mapping[tuple[str, ...], int]) -> None:
    """ValueError if byte-level BPE changes texts, or takes a word that is a token whole, where llama.cpp does not.

    ranks  of merges
    """
    changes = {step["type"] for step in _steps(found.get("normalizer"))} - HARMLESS
    if changes:
        raise ValueError(f"it normalizes texts ({', '.join(sorted(changes))}), which llama.cpp does not")
    if any(step.get("add_prefix_space") for step in _steps(found.get("pre_tokenizer")) if step["type"] == "ByteLevel"):
        raise ValueError("it puts a space before a text, which llama.cpp does for SentencePiece alone")
    ignores = bool(found["model"].get("ignore_merges"))
    if ignores != (pre in IGNORING):
        other = next((text for text in found["model"]["vocab"] if not _is_merged(text, ranks)), None)
        if other is not None:
            raise ValueError(f"ignore_merges is {ignores}, llama.cpp's {pre!r} means {not ignores}: {other!r} differs")


def _is_merged(text: str, ranks: Mapping[tuple[str, ...], int]) -> bool:
    """True if merges make one token of a text."""
    parts = list(text)
    while len(parts) > 1:
        found = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            return False
        place = min(found)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return True


def _require_plain(added: Iterable[Mapping[str, Any]], prepends: bool) -> None:
    """ValueError for an added token that is found otherwise in llama.cpp: as a whole word, or after a space."""
    for token in added:
        if token.get("single_word"):
            raise ValueError(f"its token {token['content']!r} is a whole word, and llama.cpp finds it within words")
        if prepends and token.get("normalized") and not token.get("special"):
            raise ValueError(f"its token {token['content']!r} is normalized, and llama.cpp finds it as it is written")


def _strips(added: Iterable[Mapping[str, Any]]) -> bool:
    """True if added tokens take the spaces behind them as in Phi 3, which llama.cpp does by a model's name.

    ValueError for other tokens that take spaces.
    """
    taking = {token["content"] for token in added if token.get("rstrip")}
    left = next((token["content"] for token in added if token.get("lstrip")), None)
    if not taking and left is None:
        return False
    like_phi = {token["content"] for token in added} - PHI_KEEPS
    if left is not None or taking != like_phi or not {"</s>", *PHI_KEEPS} <= {token["content"] for token in added}:
        example = left or sorted(taking)[0]
        raise ValueError(f"its token {example!r} takes the spaces beside it, which llama.cpp knows of Phi 3 alone")
    return True


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


def _sentencepiece(
    found: Mapping[str, Any], texts: list[str], types: list[int], merges: Sequence[str], chats: bool
) -> Tokens:
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
    plain = {text for text, kind in zip(texts, types, strict=True) if kind == NORMAL}
    _require_every_merge(found["model"], plain, set(merges))
    return Tokens("llama", "default", texts, types, scores=scores, prefix=_has_prefix(found, plain, chats))


def _require_every_merge(model: Mapping[str, Any], plain: Set[str], merges: Set[str]) -> None:
    """ValueError if two tokens make a third one and no merge says so: llama.cpp merges all that make a token."""
    if model.get("ignore_merges"):
        raise ValueError("ignore_merges is True, which llama.cpp does not know of SentencePiece")
    for text in plain:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in plain and right in plain and f"{left} {right}" not in merges:
                raise ValueError(f"no merge makes {text!r} of {left!r} and {right!r}, and llama.cpp does")


def _has_prefix(found: Mapping[str, Any], texts: Iterable[str], chats: bool) -> bool:
    """True if SentencePiece puts a space before a text. ValueError if a text is changed or split in another way.

    llama.cpp puts one behind each special token too. Where the model has it at the beginning alone ("first"), that
    would be another dialogue: with a chat template it gets none.
    """
    normalizer, splitter = _steps(found.get("normalizer")), _steps(found.get("pre_tokenizer"))
    metaspace = [step for step in splitter if step["type"] == "Metaspace"]
    replaces = any(step == SPACES_REPLACED for step in normalizer)
    prepends = any(step == SPACE_BEFORE for step in normalizer)
    others = [step for step in normalizer if step not in (SPACES_REPLACED, SPACE_BEFORE)]
    others = [step for step in others if step["type"] not in HARMLESS]
    others += [step for step in splitter if step not in metaspace and step != SPACES_SPLIT]
    if others or not (replaces or metaspace):
        raise ValueError(f"its texts are not changed as SentencePiece does it: {str(others or 'spaces stay')[:80]}")
    joined = next((text for text in texts if SPACE in text.lstrip(SPACE)[1:] or text.startswith(2 * SPACE)), None)
    if joined is not None and any(step.get("split", True) for step in metaspace):
        raise ValueError(f"it splits texts at spaces, and llama.cpp would find {joined!r}")
    return prepends or any(step.get("prepend_scheme", "always") in ("always", FIRST[chats]) for step in metaspace)


def _steps(steps: Any) -> list[Any]:
    """The steps of a normalizer, a split or a post-processor, one after the other."""
    if steps is None:
        return []
    inner = next((steps[key] for key in ("normalizers", "pretokenizers", "processors") if key in steps), None)
    return [steps] if inner is None else [step for each in inner for step in _steps(each)]


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
    before, after = _around(found)
    for key, place in (("bos", before), ("eos", after)):
        if place is not None and special[f"{key}_token_id"] not in (None, place):
            raise ValueError(f"it puts token {place} around texts, and its {key}_token is {special[f'{key}_token_id']}")
        special[f"{key}_token_id"] = place if place is not None else special[f"{key}_token_id"]
    special["add_bos_token"] = before is not None
    special["add_eos_token"] = after is not None
    return special


def _around(found: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The numbers of the special tokens before and behind a text, by the post-processor. ValueError for several."""
    around: tuple[int | None, int | None] = None, None
    for step in _steps(found.get("post_processor")):
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise ValueError(f"its post-processor is a {step['type']}, which puts tokens that llama.cpp does not")
        if step["type"] == "TemplateProcessing":
            around = _of_template(step)
    return around


def _of_template(step: Mapping[str, Any]) -> tuple[int | None, int | None]:
    sides: tuple[list[int], list[int]] = [], []
    behind = False
    for part in step["single"]:
        if "SpecialToken" in part:
            sides[behind].extend(step["special_tokens"][part["SpecialToken"]["id"]]["ids"])
        behind = behind or "Sequence" in part
    if max(map(len, sides)) > 1:
        raise ValueError(f"it puts {sides[0]} before a text and {sides[1]} behind, and llama.cpp one token at most")
    return next(iter(sides[0]), None), next(iter(sides[1]), None)


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template, or None."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return template if isinstance(template, str) else None
