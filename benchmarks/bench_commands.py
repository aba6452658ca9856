"""Response time of commands that need no model: help, version, a misspelt option, shell completion.

    python -m benchmarks.bench_commands [--commit HASH] [--output benchmarks/results/commands.jsonl]

Each is a separate process, with its surface in the cache; one row each: the median, the fastest and the
slowest of ten.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import arguments, write_rows

PROGRAM = "import sys; sys.argv = ['lowbit', *sys.argv[1:]]; from lowbit.commands.lowbit import main; main()"
ASKED = {
    "lowbit --help": ["--help"],
    "lowbit --version": ["--version"],
    "lowbit quantize --help": ["quantize", "--help"],
    "lowbit eval perplexity --help": ["eval", "perplexity", "--help"],
    "a misspelt option": ["quantize", "demo", "--metod", "awq"],
    "completion": [],
}
COMPLETION = {"_LOWBIT_COMPLETE": "bash_complete", "COMP_WORDS": "lowbit quantize --m", "COMP_CWORD": "2"}


def main() -> None:
    args = arguments(__doc__, Path("benchmarks/results/commands.jsonl"))
    load = round(os.getloadavg()[0], 1)  # of a minute, before our own
    rows = []
    for what, words in ASKED.items():
        seconds_of(words)  # the first keeps the surface
        found = [round(seconds_of(words), 3) for _ in range(10)]
        median = round(statistics.median(found), 3)
        rows.append({"command": what, "median_s": median, "least_s": min(found), "most_s": max(found)})
        print(rows[-1])
    machine = {"gpu": None, "cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    about = machine | {"load": load, "commit": args.commit, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    write_rows(args.output, [row | about for row in rows])


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def seconds_of(words: list[str]) -> float:
    """Wall time of `lowbit WORDS`, or of a completion for none."""
    begun = time.monotonic()
    environment = os.environ | ({} if words else COMPLETION)
    subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, check=False, env=environment)
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
