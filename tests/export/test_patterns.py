"""Patterns from untrusted files: Python's syntax and meaning, with a time limit."""

import re
import time
from contextlib import suppress

import pytest

from lowbit.calibrate.plan import ignored_by
from lowbit.errors import CheckpointError, RecipeError
from lowbit.export.dialects import FORMATS
from lowbit.export.patterns import LONGEST, PatternError, Patterns

NAME = "model.layers.13.self_attn.q_proj"
USUAL = [
    r".*\.\d+\.self_attn\.q_proj$",
    r"model\.layers\.(1[0-9]|2)\..*",
    r".*(?<!k)_proj$",
    r"(?!.*lm_head).*",
    "q_proj",
]
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
SLOW = "a" * 60 + "!"


@pytest.mark.parametrize("pattern", USUAL)
def test_it_is_what_python_finds(pattern):
    for name in (NAME, NAME.replace("q_proj", "k_proj"), "lm_head"):
        assert Patterns().begins(pattern, name) == (re.match(pattern, name) is not None)
        assert Patterns().occurs(pattern, name) == (re.search(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern", [r"(a|aa)+$", r"(a+)+$", r"(a(?R)?b?)+$", r"(.*)*(.*)*(.*)*x", r"((a{1,9}){1,9}){1,9}b"]
)
def test_a_slow_pattern_ends_in_time(pattern):
    begun = time.thread_time()
    patterns = Patterns(seconds=0.2)
    with suppress(PatternError):  # some are seen to fit nowhere without a search
        assert not any(patterns.begins(pattern, SLOW) for _ in range(10))
    assert time.thread_time() - begun < 2


def test_all_patterns_of_a_file_share_its_time():
    patterns = Patterns(seconds=0.1)
    with pytest.raises(PatternError, match="takes too long"):
        all(patterns.begins(r".*\.q_proj$", NAME) for _ in range(10**6))


@pytest.mark.parametrize(
    ("pattern", "text", "message"),
    [
        ("(", "a", "is no regular expression"),
        ("(" * 900, "a", "is no regular expression"),
        ("a", "a" * 2000, "at most"),
    ],
)
def test_what_cannot_be_matched_is_an_error(pattern, text, message):
    with pytest.raises(PatternError, match=message):
        Patterns().begins(pattern, text)
    with pytest.raises(PatternError, match="at most"):
        Patterns().begins("a" * (LONGEST + 1), "a")


def test_configurations_and_recipes_are_read_so(monkeypatch):
    groups = {"group_0": {"targets": ["re:(a|aa)+$"], "weights": WEIGHTS}}
    compressed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "dynamic": {"(a|aa)+$": {}}}
    monkeypatch.setattr("lowbit.export.patterns.SECONDS", 0.1)
    for name, config in (("compressed-tensors", compressed), ("gptq", gptq)):
        with pytest.raises(CheckpointError, match=r"takes too long to match"):
            FORMATS[name].schemes_of(config, [SLOW])
    with pytest.raises(RecipeError, match=r"takes too long to match"):
        ignored_by(SLOW, ["re:(a|aa)+$"])


def test_thousands_of_names_and_targets_are_quick():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(5000)]
    groups = {str(i): {"targets": [name], "weights": WEIGHTS} for i, name in enumerate(reversed(names))}
    config = {"format": "pack-quantized", "config_groups": groups}
    begun = time.thread_time()
    assert len(FORMATS["compressed-tensors"].schemes_of(config, names)) == 5000
    assert time.thread_time() - begun < 5
