"""lowbit/extras.py: a package that is missing is named with the extra that brings it, by commands and in Python."""

import importlib
import subprocess
import sys

import pytest

import lowbit
from lowbit import extras
from lowbit.api.shared import Note
from lowbit.errors import UsageError
from tests.builders import make_model, save
from tests.e2e.cli import run_lowbit

LINES = [
    "torch>=2.11",
    'PyYAML>=6.0; extra == "quantize"',
    'tomli_w>=1.1 ; extra == "quantize"',
    'matplotlib>=3.9; extra == "report"',
    'lowbit[quantize]; extra == "all"',
]


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> None:
    monkeypatch.setattr(extras, "requires", lambda name: LINES)


@pytest.mark.parametrize(
    ("module", "cure"),
    [
        ("yaml", "the package pyyaml, which is not installed: pip install 'lowbit[quantize]'"),
        ("tomli_w", "the package tomli-w, which is not installed: pip install 'lowbit[quantize]'"),
        ("matplotlib.figure", "the package matplotlib, which is not installed: pip install 'lowbit[report]'"),
        ("unknown", "the package unknown, which is not installed: pip install unknown"),
    ],
)
def test_the_extra_is_named(module, cure):
    error = extras.missing("lowbit.quantize", ModuleNotFoundError("none", name=module))
    assert str(error) == f"lowbit.quantize needs {cure}"


def test_a_missing_module_of_ours_is_a_fault_of_ours():
    with pytest.raises(ModuleNotFoundError):
        extras.missing("lowbit.quantize", ModuleNotFoundError("none", name="lowbit.nowhere"))


def test_commands_and_functions_say_it(monkeypatch):
    real = importlib.import_module

    def without_yaml(name: str, *more: object) -> object:
        if name in ("lowbit.commands.quantize_convert", "lowbit.api.converting"):
            raise ModuleNotFoundError("none", name="yaml")
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", without_yaml)
    monkeypatch.delitem(vars(lowbit), "convert", raising=False)
    with pytest.raises(UsageError, match=r"lowbit\.convert needs the package pyyaml"):
        _ = lowbit.convert
    told = run_lowbit("convert", "a", "b")
    assert (told.code, told.err.strip()) == (
        2,
        "Error: lowbit convert needs the package pyyaml, which is not installed: pip install 'lowbit[quantize]'",
    )


PLUGIN = """
import sys
absent = "transformers huggingface_hub datasets yaml rich matplotlib filelock typeguard tomli_w"
for name in absent.split():
    sys.modules[name] = None
import lowbit.commands.lowbit, lowbit.export.compressed_tensors
import lowbit.integrations.arriving, lowbit.quant.kernels.stack, lowbit.quant.kernels.weight
"""


def test_help_and_all_that_the_plugin_in_vllm_imports_need_no_extra():
    done = subprocess.run([sys.executable, "-c", PLUGIN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_quantizing_does_without_the_packages_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.api.quantizing.is_there", lambda module: False)
    model = save(make_model("llama"), tmp_path / "model")
    told: list[object] = []
    lowbit.quantize(model, tmp_path / "out", method="int8", eval_windows=1, progress=told.append)
    assert not (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "evaluation.jsonl").exists()
    assert [each.text for each in told if isinstance(each, Note) and "lowbit[report]" in each.text]
