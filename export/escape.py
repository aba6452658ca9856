"""Text that somebody else wrote, shown: on a terminal, in Markdown, in HTML. One function for each.

A checkpoint's names, its tokens and what a model writes may hold escape sequences, line breaks, marks that turn the
reading direction, and markup. Each is shown as something that can be seen, and does nothing.
"""

import re
from typing import Any

from jinja2 import Environment

HIDDEN = "\ufffd"
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # as in "Trojan Source"
# One visible character for each that is not: their pictures for the control characters, HIDDEN for the others.
UNSEEN = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
UNSEEN |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0x2028, 0x2029, 0xFEFF], HIDDEN)
UNSEEN |= {ord(mark): HIDDEN for mark in DIRECTIONS}
BREAKS = {ord("\n"): "\u240a", ord("\t"): "\u2409"}

# What Markdown reads as markup inside a line; an underscore and a colon where they are some.
MARKUP = re.compile(r"[\\`*\[\]<>|&~!$#]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.|@")


class Written(str):
    """Markdown that is finished: not to be escaped once more."""

    __slots__ = ()


def visible(text: str) -> str:
    """`text` for a terminal or a page, character for character; its line breaks and tabs stay."""
    return text.translate(UNSEEN)


def one_line(text: str) -> str:
    """`text` on one line of a terminal, its line breaks visible."""
    return visible(text).translate(BREAKS)


def markdown(value: Any) -> Any:
    """`value` as it stands within a line or a cell of Markdown; what is Written stays."""
    if isinstance(value, Written):
        return value
    return Written(MARKUP.sub(r"\\\g<0>", one_line(str(value)).replace("\u240a", " ")))


def code(text: Any, in_table: bool = False) -> Written:
    """`text` as code within a line of Markdown; of a table's row where `in_table`, which splits even code at a bar."""
    shown = one_line(str(text)).replace("|", "\\|" if in_table else "|")
    fence = "`" * (_longest_run(shown) + 1)
    pad = " " if fence != "`" or not shown.strip() else ""
    return Written(f"{fence}{pad}{shown or ' '}{pad}{fence}")


def code_block(text: str, language: str = "") -> Written:
    """`text` as a block of code in Markdown, behind a fence that it cannot close."""
    shown = visible(text)
    fence = "`" * max(_longest_run(shown) + 1, 3)
    return Written(f"{fence}{language}\n{shown.rstrip()}\n{fence}")


def markdown_environment(**settings: Any) -> Environment:
    """A Jinja environment for Markdown: every value is escaped. `code` and `code_block` are filters."""
    environment = Environment(finalize=markdown, autoescape=False, **settings)
    environment.filters |= {"code": code, "code_block": code_block}
    return environment


def html_environment(**settings: Any) -> Environment:
    """A Jinja environment for HTML: every value is escaped, and shown as `visible` shows it."""
    return Environment(finalize=_visible_unless_markup, autoescape=True, **settings)


def _visible_unless_markup(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
