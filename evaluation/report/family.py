"""Families of similar texts: a model calibrated on one text does better on others of its family."""

import re
from collections.abc import Iterable

# A name that contains one of the words belongs to the family. Other names are families of their own.
FAMILIES = {
    "Wikipedia": ("wikitext", "wiki"),
    "Python documentation": ("builtin", "pydoc"),
    "Common Crawl": ("c4", "fineweb", "refinedweb", "oscar", "redpajama", "slimpajama", "cc100", "commoncrawl"),
    "Penn Treebank": ("ptb", "penn"),
    "The Pile": ("pile",),
    "chat": ("ultrachat", "sharegpt", "openorca", "alpaca", "dolly", "oasst", "lmsys"),
    "code": ("stack", "starcoder", "humaneval", "mbpp", "codeparrot"),
}
SPLITS = {"train", "training", "valid", "validation", "val", "test", "dev", "eval", "heldout", "held", "out", "raw"}
SUFFIX = re.compile(r"\.(?:txt|jsonl?|parquet|csv)$")


def family_of(name: str) -> str:
    """The family of a text by its name: a dataset, a file, or `builtin`."""
    stem = SUFFIX.sub("", name.lower().rpartition("/")[2].split(":")[0])
    whole = re.sub(r"[^a-z0-9]", "", name.lower())
    words = re.findall(r"[a-z]+\d*|\d+", stem)
    for family, marks in FAMILIES.items():
        if any(mark in whole if len(mark) > 4 else mark in words or mark in stem.split("-") for mark in marks):
            return family
    kept = [word for word in words if word not in SPLITS and not word.isdigit()]
    return " ".join(kept) or stem


def families_of(dataset: str | None) -> list[str]:
    """The families of a recipe's calibration dataset (sources separated by commas); empty without one."""
    return sorted({family_of(source) for source in _sources(dataset or "")})


def _sources(dataset: str) -> Iterable[str]:
    return (source.strip() for source in dataset.split(",") if source.strip())
