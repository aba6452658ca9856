"""quant/recipe.py and the defaults of calibrate/methods.py: settings are written once and read back."""

import time
from dataclasses import fields
from pathlib import Path

import pytest

from lowbit.calibrate.methods import METHODS, complete_recipe, find_method
from lowbit.calibrate.rounding import Gptq
from lowbit.calibrate.settings import OWNERS, PARTS, rounder_of
from lowbit.errors import RecipeError, nearest
from lowbit.export.recipes import read_recipe
from lowbit.quant.recipe import Recipe


def test_toml_round_trip(tmp_path):
    recipe = Recipe(
        method="rtn",
        bits=8,
        group_size=-1,
        symmetric=False,
        ignore=("lm_head", "re:.*down_proj$"),
        dataset='odd "name".txt',
        num_samples=3,
        seqlen=7,
        seed=-1,
        max_shard_size=12,
        calibration_sha256="ab",
    )
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe().merged(read_recipe(path)) == recipe


def test_what_is_none_is_left_out_of_toml(tmp_path):
    text = Recipe().to_toml()
    assert "dataset" not in text
    assert "None" not in text
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    assert Recipe().merged(read_recipe(path)) == Recipe()


def test_merging_replaces_what_is_given_alone():
    recipe = Recipe(method="rtn", bits=8).merged({"group_size": 64, "ignore": ["a", "b"]})
    assert (recipe.method, recipe.bits, recipe.group_size, recipe.ignore) == ("rtn", 8, 64, ("a", "b"))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("group_sise", "did you mean 'group_size'"),
        ("bit", "did you mean 'bits'"),
        ("qqqq", "known: method, transforms"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, hint, tmp_path):
    with pytest.raises(RecipeError, match=f"unknown recipe key '{key}'; {hint}"):
        Recipe().merged({key: 1})
    path = tmp_path / "recipe.toml"
    path.write_text(f"{key} = 1\n")
    with pytest.raises(RecipeError, match=hint):
        complete_recipe(read_recipe(path))


@pytest.mark.parametrize("value", ["true", "false"])
def test_remote_code_is_never_allowed_by_a_file(tmp_path, value):
    path = tmp_path / "recipe.toml"
    path.write_text(f"trust_remote_code = {value}\n")
    with pytest.raises(RecipeError, match=r"trust_remote_code.*not read from a recipe.*command line"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", "4"),
        ("bits", True),
        ("bits", 4.0),
        ("symmetric", 1),
        ("ignore", "lm_head"),
        ("ignore", [1]),
        ("method", 8),
        ("dataset", ["builtin"]),
        ("seed", "x"),
        ("schemes", {1: "int4-g32"}),
        ("target_bits", 10**400),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    with pytest.raises(RecipeError, match=f"recipe key '{key}' is .*expected"):
        Recipe().merged({key: value})


def test_a_file_that_is_missing_or_no_toml(tmp_path):
    path = tmp_path / "recipe.toml"
    with pytest.raises(RecipeError, match="no such recipe"):
        read_recipe(path)
    path.write_text("bits 4")
    with pytest.raises(RecipeError, match="not TOML"):
        read_recipe(path)
    path.write_bytes(b"method = '\xff'")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        read_recipe(path)
    for text in ("seed = " + "9" * 5000, "ignore = " + "[" * 20000):
        path.write_text(text)
        with pytest.raises(RecipeError, match="not TOML"):
            read_recipe(path)
    with pytest.raises(RecipeError, match="a directory, where a file is expected"):
        read_recipe(tmp_path)
    with pytest.raises(RecipeError, match="a device, where a file is expected"):
        read_recipe(Path("/dev/zero"))


@pytest.mark.parametrize(
    "text",
    [
        ".".join(["a"] * 400_000) + " = 1",
        "[" + ".".join(["a"] * 400_000) + "]",
        " . ".join(['"a b"'] * 100_000) + " = 1",
        "x = {" + "\t.\t".join(["'a'"] * 100_000) + " = 1}",
        "x" * (1 << 20) + " = 1",
    ],
)
def test_a_name_of_many_parts_takes_no_time(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    begun = time.process_time()
    with pytest.raises(RecipeError, match=r"recipe\.toml: "):
        read_recipe(path)
    assert time.process_time() - begun < 2


def test_nearest_gives_all_where_nothing_is_near():
    assert nearest("awk", ["awq", "rtn"]) == "did you mean 'awq'?"
    assert nearest("zzzz", ["awq", "rtn"]) == "known: awq, rtn"


def test_a_scheme_is_written_by_its_name_alone_and_another_may_replace_it(tmp_path):
    recipe, path = complete_recipe({"method": "rtn", "scheme": "fp8"}), tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    values = read_recipe(path)
    assert values["scheme"] == "fp8"
    assert not values.keys() & {"bits", "group_size", "symmetric", "activations"}
    assert complete_recipe(values) == recipe
    other = complete_recipe(values | {"scheme": "uint4-g64"})
    assert (other.bits, other.group_size, other.symmetric, other.activations) == (4, 64, False, "none")
    with pytest.raises(RecipeError, match="scheme fp8 has bits 8, not 4: say one of the two"):
        complete_recipe(values | {"bits": 4})


def test_defaults_of_every_method():
    for name in METHODS:
        recipe = complete_recipe({"method": name})
        assert recipe.method == name
        assert recipe.symmetric
        needs_data = name not in ("int8", "fp8", "rtn")
        assert (recipe.dataset is not None) == needs_data
        assert (recipe.num_samples > 0) == (recipe.seqlen > 0) == needs_data
    assert str(complete_recipe({"method": "int8"}).default_scheme) == "int8"
    assert str(complete_recipe({"method": "awq"}).default_scheme) == "int4-g128"
    assert str(complete_recipe({"method": "rtn"}).default_scheme) == "int4-g128"
    assert complete_recipe({}).method == "awq"


def test_given_values_win_over_a_methods_defaults():
    recipe = complete_recipe({"method": "awq", "bits": 8, "group_size": 32, "num_samples": 5, "symmetric": False})
    assert (recipe.bits, recipe.group_size, recipe.num_samples, recipe.symmetric) == (8, 32, 5, False)


def test_a_method_without_calibration_forgets_the_data():
    recipe = complete_recipe({"method": "rtn", "dataset": "x.txt", "num_samples": 5, "seqlen": 9, "text_column": "t"})
    assert (recipe.dataset, recipe.num_samples, recipe.seqlen, recipe.text_column) == (None, 0, 0, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "awk"}, "unknown method 'awk'; did you mean 'awq'"),
        ({"method": "int8", "bits": 4}, "method int8 is 8 bits"),
        ({"method": "int8", "group_size": 128}, "for int8-g128 use --method rtn"),
        ({"method": "int8", "symmetric": False}, "method int8 has weights of int8; for uint8-channel use --method rtn"),
        ({"method": "rtn", "bits": 9}, "no 9-bit type"),
        ({"method": "awq", "group_size": 48}, "group size 48"),
        ({"method": "awq", "num_samples": 0}, "0 samples of 512 tokens"),
        ({"method": "awq", "num_samples": -1}, "-1 samples"),
        ({"method": "awq", "seqlen": 1}, "128 samples of 1 tokens"),
        ({"method": "rtn", "dtype": "int8"}, "dtype 'int8'; known: auto"),
        ({"method": "rtn", "distill_steps": -1}, "distill_steps is -1: steps cannot be negative"),
        ({"transforms": ("awq", "rotate")}, "rotate mixes the channels that other transforms scale: put it first"),
        ({"transforms": ("awk",)}, "unknown transform 'awk'; did you mean 'awq'"),
        ({"rounder": "gptqq"}, "unknown rounder 'gptqq'; did you mean 'gptq'"),
        ({"alpha": 1.5}, "alpha is 1.5: a migration strength lies between 0 and 1"),
        ({"damping": 0}, "damping is 0.0: damping must be above 0"),
        ({"damping": float("inf")}, "damping is inf: damping must be above 0, and finite"),
        ({"damping": float("nan")}, "damping is nan: damping must be above 0, and finite"),
        ({"damping": 10**400}, "recipe key 'damping' is 10{400}; expected float"),
        ({"gptq": {1: 2}}, "gptq has no setting 1; known: damping"),
        ({"max_shard_size": 0}, "max_shard_size is 0: at least 1 byte is needed"),
        ({"damping": "0.1"}, "recipe key 'damping' is '0.1'; expected float"),
        ({"iters": True}, "recipe key 'iters' is True; expected int"),
        ({"gptq": {"dampening": 0.1}}, "gptq has no setting 'dampening'; did you mean 'damping'"),
        ({"gptq": 0.1}, "recipe key 'gptq' is 0.1; expected a table of settings"),
        ({"settings": 3}, "recipe key 'settings' is 3; expected a table of settings"),
        ({"settings": {"gptq": []}}, "recipe key 'gptq' is .*; expected a table of settings"),
        ({"settings": {"gptqq": {}}}, "settings of an unknown part 'gptqq'; did you mean 'gptq'"),
        ({"alpha": float("nan")}, "alpha is nan: a migration strength lies between 0 and 1"),
        ({"gptqq": {"damping": 0.1}}, "unknown recipe key 'gptqq'; did you mean 'gptq'"),
        ({"dampin": 0.1}, "unknown recipe key 'dampin'; did you mean 'damping'"),
    ],
)
def test_recipes_that_cannot_be_followed(values, message):
    with pytest.raises(RecipeError, match=message):
        complete_recipe(values)


def test_a_method_is_found_by_name():
    assert find_method("int8").only_bits == 8


@pytest.mark.parametrize(
    "values", [{"damping": 0.02}, {"gptq": {"damping": 0.02}}, {"settings": {"gptq": {"damping": 0.02}}}]
)
def test_a_setting_is_said_by_its_name_or_in_its_parts_table(values, tmp_path):
    recipe = complete_recipe({"method": "gptq", **values})
    assert recipe.settings == {"gptq": {"damping": 0.02}}
    assert rounder_of(recipe) == Gptq(damping=0.02)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert "[gptq]\ndamping = 0.02" in path.read_text()
    assert complete_recipe(read_recipe(path)) == recipe


def test_a_recipe_has_the_settings_of_its_parts_and_of_no_other():
    old = {"method": "awq", "damping": 0.01, "iters": 200}  # as recipes were written before parts had tables
    assert complete_recipe(old).settings == {}
    assert complete_recipe({"method": "best"}).settings == {"signround": {"first": "rtn", "iters": 20}}
    assert complete_recipe({"method": "best", "iters": 3}).settings == {"signround": {"first": "rtn", "iters": 3}}
    assert complete_recipe({"method": "smoothquant", "alpha": 1}).settings == {"smooth": {"alpha": 1.0}}


def test_a_setting_belongs_to_one_part():
    names = [name for part in PARTS.values() for name in part.settings()]
    assert sorted(names) == sorted(OWNERS)
    assert not set(names) & {*PARTS, *(each.name for each in fields(Recipe))}
