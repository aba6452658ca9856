"""The modules that a start of the server, and of the engine, imports."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from lowbit.serve import run
from lowbit.serve.run import first_chat
from tests.builders import save_family
from tests.serve.conftest import serving

# Packages that take 0.1 to 5 s of processor time to import, and that no start needs: torch's compiler, its distributed
# tensors, transformers, and what these ask for if they find it installed.
HEAVY = (
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy"),
    *("transformers", "datasets", "pandas", "pyarrow", "scipy", "sklearn", "torchvision", "accelerate", "matplotlib"),
)
START = f"""
import sys
from lowbit.commands import serve
from lowbit.engine.loader import load
from lowbit.engine.sampling import Sampling
from lowbit.serve.session import Session
from lowbit.serve.run import Options, make_server
model = load(sys.argv[1], device="cpu")
with Session(model, 2) as session:
    make_server(session, Options("tiny"))
    [piece] = session.stream([0], Sampling(max_new_tokens=1))
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def test_a_start_imports_nothing_heavy(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    done = subprocess.run([sys.executable, "-c", START, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_start_says_where_its_seconds_went(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    code = "from lowbit.commands.lowbit import main; main()"
    command = [sys.executable, "-c", code, "serve", str(tmp_path), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert " serves " in server.stdout.readline()
        server.kill()
        [line] = (line for line in server.stderr if "ready after" in line)
    whole, *stages = re.findall(r"[\d.]+(?= s:|,|$)", line.partition("ready after ")[2])
    assert abs(float(whole) - sum(map(float, stages))) < 0.1
    titles = [each.rpartition(" ")[0] for each in line.rpartition(": ")[2].split(", ")]
    assert titles == ["imports", "files", "device", "weights", "tokenizer", "keys and values", "first text"]


def test_imports_are_never_collected() -> None:
    code = "import gc; from lowbit.commands.lowbit import imported; imported('serve'); "
    code += "print(gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 10_000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3


def test_the_process_that_renders_chats_runs_before_the_first_one(engine_of_tests):
    first_chat(engine_of_tests)
    running = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert any("template_child.py" in command for command in running)
    kept, engine_of_tests.tokenizer.chat_template = engine_of_tests.tokenizer.chat_template, None
    first_chat(engine_of_tests)  # a model without a template is served all the same
    engine_of_tests.tokenizer.chat_template = kept


def test_the_bytes_of_tokens_are_there_before_a_request_wants_them(engine_of_tests):
    with serving(engine_of_tests) as served:
        vocabulary = served.server.shared.vocabulary
        assert "masks" not in vars(vocabulary)
        run.prepare(served.server.shared)
        assert vars(vocabulary)["masks"] is not None


def test_answers_that_are_open_at_the_end_say_so(engine_of_tests, monkeypatch):
    monkeypatch.setattr(run, "LAST_ANSWERS", 0.3)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 100, "ignore_eos": True}
    monkeypatch.setattr(engine_of_tests.decoder, "hidden", slowed(engine_of_tests.decoder.hidden))
    with serving(engine_of_tests) as served, ThreadPoolExecutor(1) as threads:
        with served.asked("POST", "/v1/completions", body | {"stream": True}) as answer:
            assert answer.readline().startswith(b"data: ")
            whole = threads.submit(served.send, "POST", "/v1/completions", body)
            while len(served.session.batch.jobs) < 2:
                time.sleep(0.01)
            served.server.should_exit = True
            events = [json.loads(line[6:]) for line in answer.read().splitlines() if line.startswith(b"data: {")]
        status, said = whole.result()
    assert events[-1]["error"]["message"] == "the server is shutting down"
    assert len(events) < 100
    assert (status, json.loads(said)) == (503, events[-1])


def slowed(hidden):
    """Steps of 0.05 s."""
    return lambda step, cache: (time.sleep(0.05), hidden(step, cache))[1]
