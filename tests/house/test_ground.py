"""The ground floor is cheap to stand on: importing it starts no GPU and loads no toolkit."""

import subprocess
import sys

from tests.house.tree import ROOT, imports, modules

GROUND = [module for module in modules() if module.name.startswith("lowbit.quant")]
MAY_NEED = {"torch", "tomli_w"}

PROBE = """
import importlib, sys, torch
for name in {names}:
    importlib.import_module(name)
print("cuda" if torch.cuda.is_initialized() else "", *sorted({{"transformers", "datasets"}} & set(sys.modules)))
"""


def test_importing_all_of_quant_touches_no_gpu_and_no_toolkit() -> None:
    names = [module.name for module in GROUND if not module.name.endswith("__main__")]
    probe = [sys.executable, "-c", PROBE.format(names=names)]
    found = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert not found.stdout.strip(), f"import quant brought in: {found.stdout.strip()}"


SECONDS = ("transformers.processing_utils", "transformers.image_utils", "torchvision", "torch._dynamo", "sympy")


def test_importing_the_engine_leaves_out_what_takes_seconds() -> None:
    code = f"import sys, lowbit.engine; print(*sorted({set(SECONDS)!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not found.stdout.strip(), f"import lowbit.engine brought in: {found.stdout.strip()}"


def test_quant_needs_torch_alone() -> None:
    known = sys.stdlib_module_names | {"lowbit"} | MAY_NEED
    found = [
        f"{module.file}:{each.line}: {each.target}"
        for module in GROUND
        for each in imports(module.tree(), frozenset())
        if each.target.split(".")[0] not in known
    ]
    assert not found, "\n".join(found)
