"""Kernel timing: CUDA-graph replays over rotating copies of the weight, with a memory floor from the same process."""

import argparse
import ctypes
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROTATED_BYTES = 256 << 20  # copies of the weight that a graph cycles through: over four times an H100's 50 MB of L2
CALLS = 20  # at least, in a graph
READ_CEILING_BYTES = 2 << 30


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 10th and 90th percentile over replays of a graph of many calls."""

    us: float
    us_p10: float
    us_p90: float


def copies_for(nbytes: int) -> int:
    return max(2, min(64, math.ceil(ROTATED_BYTES / nbytes)))


def time_calls(calls: Sequence[Callable[[], object]], target_ms: float = 10.0, calls_in_graph: int = CALLS) -> Timing:
    """Time of one call. `calls` use different copies of the weight; a graph has at least that many, in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # that still makes the inputs
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    count = max(calls_in_graph, len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    elapsed = replay_ms(graph, 2)
    replays = max(9, min(31, int(target_ms / max(elapsed[0], 1e-3))))
    times = sorted(ms * 1e3 / count for ms in replay_ms(graph, replays))
    return Timing(*(round(times[int(q * (len(times) - 1))], 3) for q in (0.5, 0.1, 0.9)))


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


class Floor:
    """A read-only kernel: the time of a shape's bytes in the same kind of graph."""

    def __init__(self) -> None:
        self.times: dict[int, Timing] = {}
        source = Path(__file__).with_name("read_floor.cu")
        self.directory = tempfile.TemporaryDirectory()
        library = Path(self.directory.name) / "read_floor.so"
        command = ["nvcc", "-O3", "-arch=native", "-shared", "-Xcompiler", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library))
        self.sink = torch.zeros(4, dtype=torch.int32, device="cuda")
        self.time(1 << 28)  # the first graphs run on a cold clock
        self.times.clear()

    def read(self, data: torch.Tensor, nbytes: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        data_pointer, sink = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(self.sink.data_ptr())
        if error := self.library.read_floor(data_pointer, ctypes.c_int64(nbytes), sink, ctypes.c_void_p(stream)):
            raise RuntimeError(f"read_floor: CUDA error {error}")

    def time(self, nbytes: int) -> Timing:
        """The time to read `nbytes`, rounded up to 16."""
        nbytes = (nbytes + 15) // 16 * 16
        if nbytes not in self.times:
            sizes = [nbytes] * copies_for(nbytes)
            buffers = [torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda") for size in sizes]
            self.times[nbytes] = time_calls([lambda data=data: self.read(data, nbytes) for data in buffers])
        return self.times[nbytes]

    def read_ceiling_gbs(self) -> float:
        """The rate of one long read, GB/s."""
        return round(READ_CEILING_BYTES / self.time(READ_CEILING_BYTES).us / 1e3, 1)


def arguments(description: str | None, results: Path) -> argparse.Namespace:
    """The command line of a benchmark without choices: `commit`, and `output` for the rows."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path, default=results)
    return parser.parse_args()


def run_facts(commit: str) -> dict[str, str]:
    """Facts about the machine and the code, for every row."""
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[0]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": smi,
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
