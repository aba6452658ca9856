"""quant/numbers.py and quant/scheme.py: valid and invalid schemes."""

import pytest

from lowbit.quant.numbers import FP8, INT4, INT8, NUMBERS, UINT4, UINT8, float_of, integer_of
from lowbit.quant.scheme import (
    INPUTS,
    NAMED,
    PerChannel,
    PerGroup,
    Scheme,
    Side,
    make_scheme,
    parse_scheme,
    scheme_names,
)


@pytest.mark.parametrize(
    ("number", "low", "high", "bias"),
    [(INT4, -8, 7, 8), (INT8, -128, 127, 128), (UINT4, 0, 15, 0), (UINT8, 0, 255, 0), (FP8, -448, 448, 448)],
)
def test_a_number_knows_its_limits(number, low, high, bias):
    assert (number.low, number.high, number.bias) == (low, high, bias)
    assert NUMBERS[number.name] is number
    assert (integer_of(number.bits, number.signed) if number.is_integer else float_of(number.bits)) is number


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_a_width_that_no_engine_loads_is_refused(bits):
    with pytest.raises(ValueError, match=f"no {bits}-bit type.* 2 to 8"):
        make_scheme(bits, 128, True)


@pytest.mark.parametrize("size", [0, -2, 1, 31, 33, 48, 100])
def test_a_group_size_that_no_engine_takes_is_refused(size):
    with pytest.raises(ValueError, match=f"group size {size}.*multiples of 32"):
        make_scheme(4, size, True)


@pytest.mark.parametrize(
    ("text", "bits", "group_size", "symmetric"),
    [
        ("int4-g128", 4, 128, True),
        ("uint4-g64", 4, 64, False),
        ("int4-channel", 4, -1, True),
        ("int8", 8, -1, True),
        ("uint8-g32", 8, 32, False),
    ],
)
def test_text_form(text, bits, group_size, symmetric):
    scheme = make_scheme(bits, group_size, symmetric)
    assert str(scheme) == text
    assert parse_scheme(text) == scheme
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (bits, group_size, symmetric)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int4",
        "int4-",
        "int4-128",
        "int4-164",
        "int9-g128",
        "int4-gx",
        "int4-channels",
        "int4-g-1",
        "int8-channel-a4token",
    ],
)
def test_text_that_is_no_scheme(text):
    with pytest.raises(ValueError, match="no scheme"):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("int4", "int4-"), ("fp9", "fp8"), ("int8-a4", "int8-a8"), ("uint4-g", "uint4-g"), ("???", "")]
)
def test_an_error_names_the_nearest_schemes(text, meant):
    with pytest.raises(ValueError, match=f"no scheme; did you mean '{meant}|known: int8, int8-a8"):
        parse_scheme(text)
    assert all(str(parse_scheme(name)) == name for name in scheme_names())


def test_text_form_keeps_the_rules_of_groups():
    with pytest.raises(ValueError, match="multiples of 32"):
        parse_scheme("int4-g48")


@pytest.mark.parametrize("ending", INPUTS)
def test_quantized_inputs_go_with_channels_of_the_same_number_alone(ending):
    inputs = INPUTS[ending]
    scheme = Scheme(Side(inputs.number, PerChannel()), inputs)
    assert parse_scheme(str(scheme)) == scheme == parse_scheme(f"{inputs.number.name}-channel-{ending}")
    assert str(scheme) in NAMED
    assert scheme.static_inputs == ending.endswith("tensor")
    with pytest.raises(ValueError, match="weights of the same number, one scale per channel"):
        Scheme(Side(NUMBERS["int5"], PerChannel()), inputs)
    with pytest.raises(ValueError, match=r"weights of the same number, one scale per channel|fp8 per g64 is no scheme"):
        Scheme(Side(inputs.number, PerGroup(64)), inputs)


def test_inputs_of_eight_bits_by_token_go_with_int4_too():
    assert parse_scheme("int4-a8") == parse_scheme("int4-g128-a8token")
    assert str(parse_scheme("int4-g128-afp8token")) == "int4-afp8"
    scheme = parse_scheme("int4-channel-a8token")
    assert (str(scheme), scheme.bits, scheme.group_size) == ("int4-channel-a8token", 4, -1)
    assert str(parse_scheme("int4-a8").with_group_size(64)) == "int4-g64-a8token"
    for text in ("int4-g128-a8tensor", "uint4-g128-a8token", "int3-g128-a8token"):
        with pytest.raises(ValueError, match="by token with int4"):
            parse_scheme(text)


def test_a_short_name_stands_for_a_whole_scheme():
    scheme = parse_scheme("fp8")
    assert str(parse_scheme("fp8-channel-afp8token")) == "fp8"
    assert (scheme.number, scheme.group_size, scheme.symmetric) == (FP8, -1, True)


def test_zeros_come_and_go_with_integers_alone():
    assert str(parse_scheme("int4-g64").with_zeros(True)) == "uint4-g64"
    assert str(parse_scheme("uint4-g64").with_zeros(False)) == "int4-g64"
    for text in ("fp8-a16", "int8-a8"):
        assert str(parse_scheme(text).with_zeros(True)) == text


def test_groups_of_a_row():
    assert make_scheme(4, 32, True).groups(96) == 3
    assert make_scheme(4, -1, True).groups(97) == 1
    with pytest.raises(ValueError, match="100 inputs do not divide into groups of 32"):
        make_scheme(4, 32, True).groups(100)


def test_stored_bits_count_scales_and_zeros():
    assert make_scheme(4, 128, True).bits_per_weight(1024) == 4 + 16 / 128
    assert make_scheme(4, 64, False).bits_per_weight(1024) == 4 + (16 + 4) / 64
    assert make_scheme(8, -1, True).bits_per_weight(512) == 8 + 16 / 512


@pytest.mark.parametrize(
    ("k", "wanted", "size"),
    [
        (1536, 128, 128),
        (576, 128, 64),
        (96, 128, 32),
        (80, 128, -1),
        (4096, -1, -1),
        (4096, 256, 256),
        (384, 256, 128),
        (64, 64, 64),
        (96, 64, 32),
        (32, 32, 32),
        (48, 32, -1),
    ],
)
def test_a_group_size_that_does_not_divide_falls_back(k, wanted, size):
    assert make_scheme(4, wanted, True).fitting([(8, k)]) == make_scheme(4, size, True)


def test_what_fits_all_of_a_set_is_taken():
    assert str(parse_scheme("int4-g128").fitting([(8, 256), (8, 192)])) == "int4-g64"
    assert str(parse_scheme("fp8-block").fitting([(128, 256), (64, 256)])) == "fp8"
    assert str(parse_scheme("fp8-block-a16").fitting([(128, 192)])) == "fp8-a16"
    assert str(parse_scheme("fp8-block").fitting([(128, 256)])) == "fp8-block"
    assert parse_scheme("nvfp4").fitting([(8, 24)]) is None
    assert parse_scheme("mxfp8").fitting([(8, 48)]) is None
