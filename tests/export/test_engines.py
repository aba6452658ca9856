"""export/engines: the kernel for each layer, and the numbers of GPUs between which it can be split."""

from pathlib import Path

import pytest

from lowbit.export.dialects import FORMATS
from lowbit.export.engines.engine import EXPANDED, FAILS, RUNS, WEIGHTS, FusedLinear
from lowbit.export.engines.table import ENGINES, MACHINES, engines_for, fused_linears, reason_against_parallel
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.export.engines.verdicts import describe, verdicts_of
from lowbit.quant.scheme import parse_scheme

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
CT = "compressed-tensors"
W4 = parse_scheme("int4-g128")


@pytest.mark.parametrize(
    ("fmt", "text", "n", "k", "capability", "engine", "kernel"),
    [
        (CT, "int4-g128", 4096, 4096, 90, "vLLM", "Machete"),
        (CT, "int4-g128", 4096, 4096, 89, "vLLM", "Marlin"),
        (CT, "int4-g32", 4096, 4096, 90, "vLLM", "Marlin"),
        (CT, "int4-g128", 4100, 4096, 90, "vLLM", "Marlin"),
        (CT, "int4-g256", 4096, 4096, 80, "vLLM", "Triton W4A16"),
        (CT, "int8-g256", 4096, 4096, 80, "vLLM", None),
        (CT, "int8-channel", 4096, 4096, 120, "vLLM", "Marlin"),
        (CT, "int8-channel", 4096, 4096, None, "vLLM", None),
        (CT, "int4-channel", 4096, 4096, None, "vLLM", "CPU WNA16"),
        (CT, "int4-channel", 4100, 4096, None, "vLLM", None),
        (CT, "int8-channel-a8token", 4096, 4096, 90, "vLLM", "CUTLASS int8"),
        (CT, "int8-channel-a8token", 4096, 4096, 100, "vLLM", None),
        (CT, "int8-channel-a8tensor", 4096, 4096, None, "vLLM", "CPU int8"),
        (CT, "fp8-channel-afp8token", 4096, 4096, 90, "vLLM", "CUTLASS fp8"),
        (CT, "int3-g128", 4096, 4096, 90, "vLLM", "Humming (package humming-kernels)"),
        (CT, "int3-g128", 4096, 4096, None, "vLLM", None),
        (CT, "int3-g128", 4096, 4096, 90, "lowbit", "wna16"),
        (CT, "fp8-block", 4096, 4096, 90, "vLLM", "block fp8"),
        (CT, "fp8-block", 4096, 4096, 86, "vLLM", "Marlin block fp8"),
        (CT, "fp8-block", 4096, 4160, 90, "vLLM", None),
        (CT, "nvfp4", 4096, 4096, 100, "vLLM", "CUTLASS nvfp4"),
        (CT, "nvfp4", 4096, 4096, 90, "vLLM", "Marlin nvfp4"),
        (CT, "nvfp4-a16", 4096, 4096, 100, "vLLM", "Marlin nvfp4"),
        (CT, "mxfp4", 4096, 4096, 90, "vLLM", "Marlin mxfp4"),
        (CT, "mxfp8", 4096, 4096, 100, "vLLM", "FlashInfer mxfp8"),
        (CT, "mxfp8", 4096, 4096, 90, "vLLM", "Marlin mxfp8"),
        (CT, "nvfp4", 4096, 4096, None, "lowbit", "reference"),
        (CT, "nvfp4", 4096, 4096, 90, "lowbit", "wna16 with rounded inputs"),
        (CT, "mxfp4-a16", 4096, 4096, 90, "lowbit", "wna16"),
        (CT, "fp8-block-a16", 4096, 4096, 80, "lowbit", "wna16"),
        (CT, "fp8-channel-afp8token", 4096, 4096, 86, "vLLM", "Marlin fp8"),
        (CT, "fp8-channel", 4096, 4096, 90, "vLLM", "Marlin fp8"),
        (CT, "fp8-channel", 4096, 4096, None, "vLLM", None),
        (CT, "fp8-channel-afp8token", 4096, 4096, None, "vLLM", "CPU fp8"),
        (CT, "fp8-channel-afp8token", 4096, 4096, 90, "lowbit", "w8a8 in fp8"),
        (CT, "fp8-channel-afp8token", 4096, 4096, 89, "lowbit", "wna16 with rounded inputs"),
        (CT, "fp8-block", 4096, 4096, 90, "lowbit", "w8a8 in fp8"),
        (CT, "fp8-block", 4096, 4096, 86, "lowbit", "wna16 with rounded inputs"),
        (CT, "fp8-channel-afp8token", 4096, 4096, None, "lowbit", "reference"),
        (CT, "fp8-channel", 4096, 4096, None, "transformers", "expanded to 16 bits"),
        ("gptq", "int4-g128", 4096, 4096, 75, "vLLM", "Marlin"),
        ("gptq_v2", "uint4-g128", 4096, 4096, 90, "vLLM", None),
        ("gptq", "int4-g256", 4096, 4096, 80, "vLLM", None),
        ("awq", "uint4-g128", 4096, 4096, 90, "vLLM", "Machete"),
        ("awq", "uint4-g128", 4096, 4096, None, "vLLM", "CPU WNA16"),
        (CT, "int4-g128", 4096, 4096, 75, "lowbit", None),
        (CT, "int4-g128", 4096, 4096, 120, "lowbit", "wna16"),
        ("awq", "uint4-g128", 4096, 4096, None, "lowbit", "reference"),
        (CT, "int8-channel-a8token", 4096, 4096, 90, "lowbit", "w8a8"),
        (CT, "int8-channel-a8token", 4096, 4104, 90, "lowbit", None),
        (CT, "int4-a8", 4096, 4096, 90, "lowbit", "w4a8"),
        (CT, "int4-a8", 4096, 4096, 89, "lowbit", "wna16 with rounded inputs"),
        (CT, "int4-a8", 4096, 4096, None, "lowbit", "reference"),
        (CT, "int4-a8", 4096, 4096, 90, "vLLM", None),
        (CT, "int4-afp8", 4096, 4096, 90, "lowbit", "wna16 with rounded inputs"),
        (CT, "int4-afp8", 4096, 4096, 90, "vLLM", "CUTLASS W4A8"),
        (CT, "int4-afp8", 4096, 4096, 89, "vLLM", None),
        (CT, "int4-channel", 4096, 48, 90, "lowbit", None),
        (CT, "int4-g128", 4096, 4096, None, "transformers", "expanded to 16 bits"),
        (CT, "uint4-g128", 4096, 4096, None, "transformers", None),
        ("gptq", "uint4-g128", 4096, 4096, None, "transformers", "gptqmodel"),
    ],
)
def test_which_kernel_takes_a_layer(fmt, text, n, k, capability, engine, kernel):
    chosen, reasons = ENGINES[engine].choose(FusedLinear(FORMATS[fmt], parse_scheme(text), n, k), capability)
    assert chosen == kernel
    assert all(reasons.values())
    if kernel is None:
        assert set(reasons) == {each.name for each in ENGINES[engine].kernels}


@pytest.mark.parametrize(
    ("text", "engine", "capability", "verdict"),
    [
        ("nvfp4", "vLLM", 100, RUNS),
        ("nvfp4", "vLLM", 90, WEIGHTS),
        ("nvfp4-a16", "vLLM", 90, RUNS),
        ("nvfp4", "vLLM", None, FAILS),
        ("nvfp4", "SGLang", 75, FAILS),
        ("nvfp4", "SGLang", 80, WEIGHTS),
        ("nvfp4", "lowbit", 90, WEIGHTS),
        ("int3-g128", "lowbit", 90, RUNS),
        ("mxfp4", "vLLM", 100, WEIGHTS),
        ("mxfp4-a16", "vLLM", 100, RUNS),
        ("mxfp8", "vLLM", 90, WEIGHTS),
        ("mxfp8", "SGLang", 90, FAILS),
        ("fp8", "vLLM", 89, RUNS),
        ("fp8", "vLLM", 86, WEIGHTS),
        ("fp8-static", "SGLang", 90, RUNS),
        ("fp8-block", "SGLang", 86, FAILS),
        ("int8-a8", "vLLM", 100, FAILS),
        ("int8-a8-static", "SGLang", 90, FAILS),
        ("int3-g128", "vLLM", 75, RUNS),
        ("int3-g128", "SGLang", 90, FAILS),
        ("int4-g128", "transformers", 90, EXPANDED),
    ],
)
def test_a_file_runs_runs_weights_alone_or_fails(text, engine, capability, verdict):
    layer = FusedLinear(FORMATS[CT], parse_scheme(text), 4096, 4096)
    assert ENGINES[engine].verdict(layer, capability) == verdict


def test_a_file_is_as_good_as_its_worst_layer_and_a_refused_family_fails():
    mixed = [FusedLinear(FORMATS[CT], parse_scheme(text), 4096, 4096) for text in ("nvfp4", "int8-a8", "fp8")]
    found = verdicts_of(mixed, refused={"transformers"})
    assert found["vLLM"]["Hopper, sm_90"] == WEIGHTS
    assert describe(found["vLLM"]) == "weights alone on sm_75 to sm_90; fails on sm_100 to sm_120, CPU"
    assert describe(found["transformers"]) == "fails everywhere"


def test_every_machine_has_a_place_in_the_table():
    assert set(MACHINES.values()) == {75, 80, 86, 89, 90, 100, 120, None}


def test_rules_are_those_of_the_versions_that_we_test_with():
    """A new version pin requires the rules to be checked again."""
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    for package in ("transformers", "compressed-tensors"):
        minor = ".".join(pins[package].split(".")[:2])
        assert minor in TRANSFORMERS.version, package


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_some_kernel_of_transformers_takes_a_format_s_usual_scheme(fmt):
    usual = (W4, *map(parse_scheme, ("uint4-g128", "fp8-block", "nvfp4", "int4-g32")))
    scheme = next(each for each in usual if fmt.reason_against(each) is None)
    kernel, _ = TRANSFORMERS.choose(FusedLinear(fmt, scheme, 4096, 4096), None)
    assert (kernel is None) == (fmt.name in ("modelopt", "gguf"))


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-g32", "q4_k", "q6_k", "mxfp4-a16", "nvfp4-a16"])
def test_engines_of_safetensors_read_no_gguf(scheme):
    verdicts = verdicts_of([FusedLinear(FORMATS["gguf"], parse_scheme(scheme), 4096, 4096)])
    assert [name for name, found in verdicts.items() if set(found.values()) != {FAILS}] == ["llama.cpp", "lowbit"]
    assert set(verdicts["llama.cpp"].values()) == {RUNS}
    assert [engine.name for engine in engines_for(FORMATS["gguf"])] == ["llama.cpp", "lowbit"]


@pytest.mark.parametrize("fmt", [name for name in FORMATS if name != "gguf"])
def test_llama_cpp_opens_no_safetensors(fmt):
    engine, layer = ENGINES["llama.cpp"], FusedLinear(FORMATS[fmt], W4, 4096, 4096)
    kernel, reasons = engine.choose(layer, 90)
    assert kernel is None
    assert reasons == {each.name: "it opens *.gguf alone" for each in engine.kernels}
    assert "llama.cpp" not in [engine.name for engine in engines_for(FORMATS[fmt])]


def test_what_is_fused_is_one_layer():
    shapes = {"m.q_proj": (64, 32), "m.k_proj": (16, 32), "m.o_proj": (32, 64), "m.experts.0.w1": (8, 32)}
    layers = fused_linears(FORMATS[CT], dict.fromkeys(shapes, W4), shapes)
    assert [(layer.n, layer.k) for layer in layers.values()] == [(80, 32), (32, 64), (8, 32)]


@pytest.mark.parametrize(
    ("size", "text", "heads", "reason"),
    [
        (2, "int4-g128", (32, 8), None),
        (16, "int4-g128", (32, 8), None),
        (4, "int4-g128", (6, 6), "6 query heads and 6 of"),
        (8, "int4-g128", (32, 3), "32 query heads and 3 of"),
        (8, "int4-g256", None, None),
        (16, "int4-g256", None, "m.down_proj: 2048 inputs in parts of 128, in groups of g256"),
        (16, "int8-channel", None, None),
        (16, "fp8-block", None, None),
        (32, "fp8-block", None, "in parts of 64, in "),
    ],
)
def test_between_how_many_gpus(size, text, heads, reason):
    schemes = dict.fromkeys(("m.down_proj", "m.up_proj"), parse_scheme(text))
    found = reason_against_parallel(size, schemes, {"m.down_proj": (512, 2048), "m.up_proj": (2048, 512)}, heads)
    assert found is None if reason is None else reason in found
