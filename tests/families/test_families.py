"""The table of families: it says what its rows say, enough of them work, and a few are tried again here."""

import json
import sys

import pytest
import torch

from tests.families import vllm
from tests.families.table import COLUMNS, METHODS, PAGE, ROWS, TOLD, WORKS, page_of, row_of, share, works
from tests.families.vllm import MOST_USED, cell_of, fault

KINDS = ("llama", "gpt2", "gemma3_text", "mamba2", "qwen3_moe", "gpt_oss", "llama4_text", "llava", "qwen3_5")


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    return json.loads(ROWS.read_text())


def test_the_page_says_what_the_rows_say(rows):
    assert PAGE.read_text(encoding="utf-8") == page_of(rows)


def test_nearly_all_families_work(rows):
    tried = {kind: row for kind, row in rows.items() if "none" not in row}
    assert len(tried) > 200
    assert share("int8", tried) >= 0.95
    for column in ("blocks", *METHODS):
        assert share(column, tried) >= 0.9, column


def test_no_cell_is_a_traceback(rows):
    cells = [cell for row in rows.values() for cell in row.values()]
    assert all("\n" not in cell and "Traceback" not in cell and len(cell) < 100 for cell in cells)
    assert all(set(row) | {"vllm"} == set(COLUMNS) for row in rows.values() if "none" not in row)
    assert {kind for kind, row in rows.items() if "vllm" in row} == set(MOST_USED)


def test_what_does_not_load_in_transformers_is_told_before_the_work(rows):
    cells = {kind: row["transformers"] for kind, row in rows.items() if works(row, "int8")}
    assert not {kind for kind, cell in cells.items() if not cell.startswith((WORKS, TOLD))}


def test_no_model_is_another_one_in_vllm(rows):
    """A difference that the unquantized model does not have is a fault of ours."""
    cells = {kind: rows[kind]["vllm"] for kind in MOST_USED}
    assert not {kind: cell for kind, cell in cells.items() if "differs" in cell and "unquantized" not in cell}


@pytest.mark.parametrize(
    ("reasons", "dense", "cell"),
    [
        ([None, None], None, "works"),
        (["no kernel", None], None, "gptq alone; int8: no kernel"),
        (["no kernel", "differs by 1"], None, "none: int8: no kernel; gptq: differs by 1"),
        ([None, "no kernel"], "no kernel", "none: unquantized too: no kernel"),
    ],
)
def test_a_cell_of_vllm_says_what_works_and_why_the_rest_does_not(reasons, dense, cell):
    assert cell_of(reasons, dense) == cell


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"rows": [[-1.0, -2.01, -3.0]]}, None),
        ({"rows": [[-3.0, -2.0, -1.0]]}, "differs by 1"),
        ({"error": "NotImplementedError: No MoE backend"}, "no kernel: No MoE backend"),
        ({"error": "ValueError: Failed to find a kernel that can"}, "no kernel: Failed to find a kernel"),
        ({"error": "AssertionError: "}, "AssertionError"),
        ({"error": "RuntimeError: /a/b/c is broken"}, "RuntimeError: c is broken"),
    ],
)
def test_an_answer_is_right_or_has_a_reason(answer, reason):
    assert fault(answer, torch.tensor([[-1.0, -2.0, -3.0]])) == reason


DYING = """
import json, sys
*names, _, _, _, out = sys.argv[1:]
for name in names:
    if name == "b":
        sys.exit(139)
    print(json.dumps({"checkpoint": name, "rows": [[-1.0]]}), file=open(out, "a"))
"""


def test_a_checkpoint_that_ends_vllm_is_told_and_the_others_are_read(tmp_path, monkeypatch):
    tmp_path.joinpath("peers").mkdir()
    tmp_path.joinpath("peers", "read_many.py").write_text(DYING)
    monkeypatch.setattr(vllm, "HERE", tmp_path)
    found = vllm.answers_of(sys.executable, tmp_path, ["a", "b", "c"])
    assert {name: answer.get("rows") for name, answer in found.items()} == {"a": [[-1.0]], "b": None, "c": [[-1.0]]}
    assert fault(found["b"], torch.zeros(1)) == "SystemError: vLLM's process ended"


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_still_works(rows, tmp_path, kind):
    found = row_of(kind, tmp_path)
    assert all(found[column] == WORKS for column in ("blocks", *METHODS))
    assert {c: found[c] for c in ("transformers", "engine")} == {c: rows[kind][c] for c in ("transformers", "engine")}
