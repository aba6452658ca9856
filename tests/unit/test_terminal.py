"""Output of commands: untrusted text has no effect on a terminal, and there is one function to print it."""

import ast
import io

import click
import pytest
from rich.table import Table
from rich.text import Text

from lowbit.commands.common import Terminal, run_command, say
from lowbit.errors import CheckpointError
from tests.e2e.cli import run_quantize_inspect
from tests.house.tree import called, modules

EVIL = "\x1b]0;owned\x07[bold]\x1b[2J[/nothing] :smile: \x9b31m"


def test_a_console_prints_what_it_is_given():
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    for shown in (EVIL, Text(EVIL), table):
        out = io.StringIO()
        Terminal(file=out, force_terminal=True, width=300, highlight=False).print(shown, style="bold")
        text = out.getvalue()
        assert "\x1b]" not in text
        assert "\x1b[2J" not in text
        assert "\x9b" not in text
        assert "␛]0;owned" in text
        assert "[bold]␛[2J[/nothing] :smile:" in text
        assert "\x1b[1" in text  # its own style is still one


def test_text_is_said_visibly(capsys):
    say(EVIL + "\n\ttwo", nl=False)
    assert capsys.readouterr().out == "␛]0;owned␇[bold]␛[2J[/nothing] :smile: \ufffd31m\n\ttwo"


@pytest.mark.parametrize("kind", [CheckpointError, click.UsageError])
def test_an_error_is_one_line(kind, capsys):
    def command(standalone_mode):
        raise kind(f"{EVIL}\nError: forged")

    with pytest.raises(SystemExit):
        run_command(command)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("Error: ␛]0;owned")
    assert lines[-1].endswith("␊Error: forged")


def test_a_tensor_whose_name_cannot_be_printed_is_refused(tmp_path):
    header = b'{"a\\u001b]0;owned\\nError: forged":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "config.json").write_text("{}")
    complaint = run_quantize_inspect(tmp_path).complaint
    assert r"a tensor is called 'a\x1b]0;owned\nError: forged'" in complaint


def test_commands_print_in_no_other_way():
    """A bare click.echo is for JSON, which escapes by itself; a bare rich console is for nothing."""
    found = []
    for module in modules():
        if not module.file.startswith("commands/") or module.file == "commands/common.py":
            continue
        for call in (node for node in ast.walk(module.tree()) if isinstance(node, ast.Call)):
            bare = called(call) in ("click.echo", "click.secho", "print")
            fixed = not call.args or isinstance(call.args[0], ast.Constant) or "json.dumps" in ast.unparse(call.args[0])
            if called(call) == "Console" or (bare and not fixed):
                found.append(f"{module.file}:{call.lineno}: {ast.unparse(call)[:80]}")
    assert not found, "\n".join(found)
