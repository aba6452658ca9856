"""The common frame of all commands' help; nothing here imports torch."""

from collections.abc import Callable
from typing import Any

import click

from lowbit import __version__
from lowbit.errors import nearest

SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 110,
}
FIRST = "Options that people set first"
LAST = "About"  # the part of options that have none

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Parts = dict[str, tuple[Decorator, ...]]


class ByPart(click.Command):
    """A command whose help shows its options under the parts that they name, in order; without parts, as one list."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "part", None) or LAST, []).append(record)
        about = sections.pop(LAST, [])
        for part, records in (sections | {LAST: about}).items():
            with formatter.section(part):
                formatter.write_dl(records)


class Named(click.Group):
    """A group that answers a name that it does not have with the nearest one, or with all of them."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchOption:
            raise
        except click.UsageError as error:
            raise click.UsageError(
                f"no command {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}", ctx
            ) from error


def frame(*examples: str) -> dict[str, Any]:
    """Settings of a command: its options by part, and its examples at the end of its help."""
    return {"cls": ByPart, "context_settings": SETTINGS, "epilog": epilog(*examples)}


def epilog(*examples: str) -> str:
    """The end of a help text: each example on a line of its own."""
    return "\n".join(("\b", "Examples:", *(f"  {example}" for example in examples)))


def by_part(parts: Parts) -> Decorator:
    """A decorator that adds the options of all parts to a command, and --version."""
    whole: Parts = {**parts, LAST: (*parts.get(LAST, ()), click.version_option(__version__, prog_name="lowbit"))}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for part, options in reversed(whole.items()):
            for option in reversed(options):
                command = option(command)
                command.__click_params__[-1].part = part  # type: ignore[attr-defined]
        return command

    return decorate


def flag(*names: str, text: str, **more: Any) -> Decorator:
    """A switch that is off by default."""
    return click.option(*names, is_flag=True, help=text, **more)


def value(*names: str, default: Any, text: str, **more: Any) -> Decorator:
    """An option whose help shows its default."""
    return click.option(*names, default=default, show_default=True, help=text, **more)
