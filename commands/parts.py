"""The common frame of all commands' help; nothing here imports torch."""

import click

SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 110,
}
LAST = "About"  # the part of options that have none


class ByPart(click.Command):
    """A command whose help shows its options under the parts that they name, in order; without parts, as one list."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        shown = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        named = any(getattr(param, "part", None) for param in shown)
        for param in shown:
            record = param.get_help_record(ctx)
            if record is not None:
                part = getattr(param, "part", None) or LAST
                sections.setdefault(part if named else "Options", []).append(record)
        for part, records in sections.items():
            with formatter.section(part):
                formatter.write_dl(records)
