"""Processes of their own for work on untrusted input: a limit ends the process, and with it only that work."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any


class Child:
    """A bare interpreter that runs a script. It answers one line of JSON at a time, or ends.

    It starts with the first line, and again after an end: the script's limits may end it whatever it computes.

    arguments  of the script, after the module paths as JSON
    greeting   the first line of each start, which gets no answer; empty for none
    """

    def __init__(self, script: Path, *arguments: object, greeting: Callable[[], str] = str) -> None:
        self._command, self._arguments, self._greeting = script, [str(each) for each in arguments], greeting
        self._process: subprocess.Popen[str] | None = None

    def ask(self, line: str) -> dict[str, Any] | None:
        """The answer to one line, or None if the process ended instead. One thread at a time."""
        try:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer.endswith("\n"):
            found: dict[str, Any] = json.loads(answer)
            return found
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        return None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
            greeting = self._greeting()
            if greeting and self._process.stdin is not None:
                self._process.stdin.write(greeting + "\n")
        return self._process

    def _started(self) -> subprocess.Popen[str]:
        found = json.dumps([path for path in sys.path if path])
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(self._command), found, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C must end an answer, not this process
        )


class Children:
    """A few such processes for the threads of this one: a line waits until one of them is free."""

    def __init__(self, count: int, script: Path, *arguments: object, greeting: Callable[[], str] = str) -> None:
        self._free: SimpleQueue[Child] = SimpleQueue()
        for _ in range(count):
            self._free.put(Child(script, *arguments, greeting=greeting))

    def ask(self, line: str) -> dict[str, Any] | None:
        """The answer to one line, or None if the process ended instead."""
        child = self._free.get()
        try:
            return child.ask(line)
        finally:
            self._free.put(child)
