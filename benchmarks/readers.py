"""Other programs read a checkpoint, each in its own environment, by benchmarks/peers/read_checkpoint.py."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
READ_CHECKPOINT = HERE / "peers" / "read_checkpoint.py"
LONGEST_ERROR = 100
ENTRY_POINTS = "[vllm.general_plugins]\nlowbit = lowbit.integrations.vllm:register\n"


class ReaderError(Exception):
    """The error output of a reader that failed."""

    @property
    def last_words(self) -> str:
        """The last exception of a traceback, shortened to one line."""
        output = str(self)
        errors = re.findall(
            r"^(?:\(.*?\) *|\[rank\d+\]: *)?(?:ERROR .*?\] )?((?:\w+\.)*\w*(?:Error|Exception|Warning)\b: .+)$",
            output,
            re.M,
        )
        known = [error for error in errors if "initialization failed" not in error]  # vLLM's processes repeat the news
        told = re.findall(
            r"^ +Value error, (.+?)(?: \[type=.*)?$", output, re.M
        )  # pydantic's reason is a line further on
        line = (told or known or errors or output.strip().splitlines() or ["no output"])[-1].strip()
        line = re.sub(r"/\S*/", "", line)
        return line if len(line) <= LONGEST_ERROR else line[: LONGEST_ERROR - 3] + "..."


def read_by(
    python: str, kind: str, directory: str | Path, windows: list[list[int]], *flags: str, **environment: str
) -> list[list[float]]:
    """Log-probabilities of the tokens of `windows`. ReaderError with all output if the reader fails.

    python       the reader's own
    kind, flags  its name for read_checkpoint.py, and further options
    environment  set for the reader
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "windows.json", Path(scratch) / "out.json"
        given.write_text(json.dumps(windows))
        command = [python, str(READ_CHECKPOINT), kind, str(directory), "--windows", str(given), "--out", str(found)]
        command += flags
        if kind.endswith("-lowbit"):
            environment["PYTHONPATH"] = path_of_ours(Path(scratch))
        settings = os.environ | environment
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings, cwd=scratch)
        if done.returncode or not found.exists():
            raise ReaderError(done.stdout + done.stderr)
        return json.loads(found.read_text())


def path_of_ours(scratch: Path) -> str:
    """A path for another Python with this checkout and its entry point for vLLM."""
    info = scratch / "lowbit-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lowbit\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (scratch / "lowbit").symlink_to(HERE.parent / "lowbit")
    return str(scratch)
