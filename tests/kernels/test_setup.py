"""setup.py with and without a compiler."""

import runpy
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> dict:
    """setup.py's names, without a build."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("LOWBIT_CUDA_SAMPLE", raising=False)
    return runpy.run_path(str(SETUP))


def test_architectures_become_flags(setup_module: dict) -> None:
    assert setup_module["architecture_flags"](["90a", "90+PTX"]) == [
        "-gencode",
        "arch=compute_90a,code=sm_90a",
        "-gencode",
        "arch=compute_90,code=compute_90",
    ]


def test_no_compiler_means_a_pure_python_install(setup_module: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("LOWBIT_CUDA", raising=False)
    if setup_module["find_nvcc"]() is None:
        assert setup_module["extensions"]() == []
    monkeypatch.setenv("LOWBIT_CUDA", "0")
    assert setup_module["extensions"]() == []
    monkeypatch.setenv("LOWBIT_CUDA", "1")
    assert [extension.name for extension in setup_module["extensions"]()] == ["lowbit.quant._C"]


def test_a_failed_command_names_itself_and_its_output(setup_module: dict) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such header')"]
    with pytest.raises(RuntimeError, match="no such header"):
        setup_module["BuildCuda"].call(None, command)


def test_a_source_is_compiled_once_for_each_value_of_the_macros_that_it_names(setup_module: dict) -> None:
    units = setup_module["UNITS"]
    files = (SETUP.parent / "quant/kernels/csrc").iterdir()
    assert {unit.source for unit in units} == {path.name for path in files if path.suffix in (".cu", ".cpp")}
    assert len(set(units)) == len(units)
    assert [unit.cutlass for unit in units[:5]] == [True, True, True, True, False]
    found = {unit.source: sorted(other.defines for other in units if other.source == unit.source) for unit in units}
    halves = [("LOWBIT_T=__half",), ("LOWBIT_T=__nv_bfloat16",)]
    assert found["row_norm.cu"] == halves
    assert found["wna16_gemv.cu"] == [
        (*half, f"LOWBIT_NUMBER={number}")
        for half in halves
        for number in ("Fp4", "Fp8", "Int2", "Int3", "Int4", "Int5", "Int6", "Int7", "Int8")
    ]
    assert found["decode_attention.cu"] == [
        (*half, f"LOWBIT_CACHE={number}Cache") for half in halves for number in ("Fp8", "Int4", "Int8", "Same")
    ]
    assert found["w8a8_cutlass.cu"] == [(*half, f"LOWBIT_TILE={tile}") for half in halves for tile in (0, 1)]
    assert found["w8a8_gemm.cu"] == [("LOWBIT_CODES=__nv_fp8_e4m3",), ("LOWBIT_CODES=int8_t",)]
    assert found["gptq_block.cu"] == found["bindings.cpp"] == [()]
    hopper = {"w8a8_cutlass.cu", "w8a8_gemm.cu", "w4a8_gemm.cu", "wna16_gemm.cu", "wna16_prefill.cu", "dense_gemv.cu"}
    assert {unit.source for unit in units if unit.hopper} == hopper


def test_a_sample_has_every_value_of_every_macro_once(setup_module: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CUDA_SAMPLE", "1")
    whole, sample = setup_module["UNITS"], runpy.run_path(str(SETUP))["UNITS"]
    assert set(map(tuple, sample)) < set(map(tuple, whole))
    values = {(unit.source, define) for unit in whole for define in unit.defines}
    assert {(unit.source, define) for unit in sample for define in unit.defines} == values
    assert len([unit for unit in sample if unit.source == "wna16_gemv.cu"]) == 9


def test_cutlass_is_found_or_its_absence_explained(
    setup_module: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="where CUTLASS_PATH says: pip install nvidia-cutlass"):
        setup_module["cutlass_flags"]()
    header = tmp_path / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert str(tmp_path / "include") in setup_module["cutlass_flags"]()
    monkeypatch.delenv("CUTLASS_PATH")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="CUTLASS's headers are nowhere"):
        setup_module["cutlass_flags"]()
