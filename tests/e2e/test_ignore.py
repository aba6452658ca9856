"""--ignore: the linears that it excludes, and messages about patterns that match nothing."""

import json
from pathlib import Path

import pytest

from tests.builders import save_family
from tests.e2e.cli import run_quantize

RTN = ["--method", "rtn", "--group-size", 32, "--eval-windows", 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve blocks, so that some numbers have two digits."""
    return save_family("llama", tmp_path_factory.mktemp("twelve") / "llama", num_hidden_layers=12)


def left(model: Path, output: Path, *flags: str) -> set[str]:
    """The linears that quantizing with `flags` leaves."""
    done = run_quantize(model, *RTN, *flags, "-o", output)
    assert done.code == 0, done.err
    return set(json.loads((output / "config.json").read_text())["quantization_config"]["ignore"])


def down(*layers: int) -> set[str]:
    return {f"model.layers.{layer}.mlp.down_proj" for layer in layers}


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        (["--ignore", "model.layers.0.mlp.down_proj"], (0,)),
        (["--ignore", r"re:layers\.[0-3]{1,2}\.mlp\.down_proj"], (0, 1, 2, 3, 10, 11)),
        (["--ignore", r"0.mlp.down_proj,re:\.1{2,2}\.mlp\.down_proj,re:\.(2|3)\.mlp\.down"], (0, 2, 3, 11)),
        (["--ignore", "lm_head"], ()),
    ],
)
def test_the_head_is_left_and_what_is_named(model, tmp_path, flags, layers):
    assert left(model, tmp_path / "out", *flags) == down(*layers) | {"lm_head"}


def test_a_recipe_that_names_one_keeps_the_head(model, tmp_path):
    (tmp_path / "recipe.toml").write_text('ignore = ["model.layers.0.mlp.down_proj"]\n')
    assert left(model, tmp_path / "out", "--recipe", tmp_path / "recipe.toml") == down(0) | {"lm_head"}


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("model.layers.0", r"to match them write re:^model\.layers\.0\."),
        ("model.layers.0.*", r"wildcards do not work, regular expressions do: re:^model\.layers\.0\..*$"),
        ("LlamaMLP", "known: down_proj, gate_proj, up_proj, k_proj, o_proj, q_proj, v_proj"),
        ("dwn_proj", "did you mean 'down_proj'?"),
        ("model.layers.0.mlp.dwn_proj", "did you mean 'model.layers.0.mlp.down_proj'?"),
        ("re:^nothing$", "matches no linear of this model"),
        (r"re:layers\.12\.", "matches no linear of this model"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(model, tmp_path, pattern, told):
    line = run_quantize(model, *RTN, "--ignore", pattern, "-o", tmp_path / "out").complaint
    assert f"ignore: {pattern!r}" in line
    assert told in line


def test_what_the_pattern_advised_stands_for(model, tmp_path):
    found = left(model, tmp_path / "out", "--ignore", r"re:^model\.layers\.0\.")
    assert len(found) == 8
    assert all(name == "lm_head" or name.startswith("model.layers.0.") for name in found)


@pytest.mark.parametrize(
    ("given", "key"),
    [(["--ignore", "re:*foo"], "ignore"), (["--recipe", "recipe.toml"], "schemes")],
)
def test_no_regular_expression_is_one_line(model, tmp_path, monkeypatch, given, key):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text('[schemes]\n"re:*x" = "int8-channel"\n')
    line = run_quantize(model, *RTN, *given, "-o", tmp_path / "out").complaint
    assert f"{key}: 're:*" in line
    assert "is no regular expression (nothing to repeat" in line
