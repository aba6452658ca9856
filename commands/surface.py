"""Help, completion and option errors of the commands, without importing torch.

The options of a command are defined with the tables that they choose from, which import torch and take seconds. So the
visible part of each command, its surface, is stored as JSON when it is first imported, in the package (a wheel has it)
or in the cache directory. It is valid while the sources are unchanged. Without it the commands themselves answer, more
slowly.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from lowbit import __version__
from lowbit.commands.parts import SETTINGS, ByPart, Named
from lowbit.models.cache import cache_dir

PACKAGE = Path(__file__).parents[1]
NAME = "surface.json"
SOURCES = (
    *("commands/*.py", "calibrate/methods.py", "calibrate/mixtures.py", "calibrate/rounding.py"),
    *("calibrate/transforms.py", "export/dialects.py", "export/engines/steps.py", "lowbit/__init__.py"),
    "lowbit/api/drafting.py",
    *("evaluation/after.py", "evaluation/backend.py", "evaluation/generate.py", "engine/shapes.py"),
    *("quant/scheme.py", "quant/numbers.py", "quant/recipe.py"),
)


def surface_of(command: click.Command) -> dict[str, Any]:
    """Everything about a command that help, completion and parsing need, as JSON values."""
    found: dict[str, Any] = {
        "name": command.name,
        "help": command.help,
        "epilog": command.epilog,
        "params": [_param(param) for param in command.params],
    }
    if isinstance(command, click.Group):
        found["commands"] = {name: surface_of(inner) for name, inner in command.commands.items()}
    return found


def _param(param: click.Parameter) -> dict[str, Any]:
    """A parameter. `kind` names its type as far as values can be checked without the tables."""
    found: dict[str, Any] = {
        "names": [*param.opts, *(f"/{name}" for name in param.secondary_opts)],
        "required": param.required,
        "nargs": param.nargs,
        "metavar": param.metavar,
        "kind": _kind(param.type),
    }
    if isinstance(param, click.Option):
        switch = param.is_flag and not param.secondary_opts  # its default says nothing
        told = isinstance(param.default, str | int | float | bool | list | tuple) and not switch
        found |= {
            "dest": param.name,
            "flag": param.is_flag,
            "multiple": param.multiple,
            "help": param.help,
            "show": bool(param.show_default),
            "default": param.default if told else None,
            "version": param.is_eager and "--version" in param.opts,
            "part": getattr(param, "part", None),
        }
        if not param.is_flag and found["metavar"] is None and found["kind"] == "text":
            found["metavar"] = param.type.name.upper()
    return found


def _kind(type_: click.ParamType) -> Any:
    if isinstance(type_, click.Choice):
        return {"choices": list(type_.choices)}
    if isinstance(type_, click.IntRange):
        return {"least": type_.min, "most": type_.max}
    return {"INTEGER": "integer", "FLOAT": "float", "BOOLEAN": "boolean"}.get(type_.name.upper(), "text")


def command_of(surface: Mapping[str, Any]) -> click.Command:
    """A command that looks like the one of `surface` and does nothing."""
    params = [_param_of(each) for each in surface["params"]]
    plain = {"help": surface["help"], "epilog": surface["epilog"], "params": params, "context_settings": dict(SETTINGS)}
    if "commands" in surface:
        inner = {name: command_of(each) for name, each in surface["commands"].items()}
        return Named(surface["name"], commands=inner, **plain)
    return ByPart(surface["name"], **plain)


def _param_of(found: Mapping[str, Any]) -> click.Parameter:
    kind = _type_of(found["kind"])
    if "flag" not in found:
        [name] = found["names"]
        return click.Argument(
            [name], required=found["required"], nargs=found["nargs"], metavar=found["metavar"], type=kind
        )
    if found["version"]:
        return click.version_option(__version__, prog_name="lowbit")(click.Command(None)).params[0]
    on = [name for name in found["names"] if not name.startswith("/")]
    off = [name.removeprefix("/") for name in found["names"] if name.startswith("/")]
    flags = {"is_flag": True} if found["flag"] else {"type": kind, "nargs": found["nargs"]}
    option = click.Option(
        [f"{on[0]}/{off[0]}", *on[1:], found["dest"]] if off else [*on, found["dest"]],
        required=found["required"],
        multiple=found["multiple"],
        help=found["help"],
        metavar=found["metavar"],
        show_default=found["show"],
        **({} if found["default"] is None else {"default": found["default"]}),
        **flags,
    )
    vars(option)["part"] = found["part"]
    return option


def _type_of(kind: Any) -> click.ParamType:
    if isinstance(kind, dict):
        return click.Choice(kind["choices"]) if "choices" in kind else click.IntRange(kind["least"], kind["most"])
    types: dict[str, click.ParamType] = {"integer": click.INT, "float": click.FLOAT, "boolean": click.BOOL}
    return types.get(kind, click.STRING)


@cache
def key() -> str:
    """A hash of the sources of all surfaces."""
    digest = hashlib.sha256(f"{__version__} {version('click')}".encode())
    for pattern in SOURCES:
        for path in sorted(PACKAGE.glob(pattern)) or sorted(PACKAGE.parent.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read(name: str) -> click.Command | None:
    """The command `name` from its stored surface; None if there is none for these sources."""
    for path in (PACKAGE / "commands" / NAME, cache_dir() / NAME):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == key():
                return command_of(found["commands"][name])
        except (OSError, ValueError, KeyError, TypeError):  # none, or for other sources
            continue
    return None


def write(commands: Mapping[str, tuple[str, str, str]], path: Path | None = None) -> Path:
    """Store the surface of every command in `path`, or in the cache directory."""
    found = {
        name: surface_of(getattr(importlib.import_module(f"lowbit.commands.{module}"), attribute))
        for name, (module, attribute, _) in commands.items()
    }
    path = path or cache_dir() / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    fresh.write_text(json.dumps({"key": key(), "commands": found}), encoding="utf-8")
    fresh.replace(path)
    return path
