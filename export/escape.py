"""Escaping of untrusted text for terminals, Markdown and HTML, with one function for each.

Names in a checkpoint, tokens and generated text may contain escape sequences, line breaks, bidirectional marks and
markup. All of these are shown as visible characters without effect.
"""

import re
from typing import Any

from jinja2 import Environment

HIDDEN = "\ufffd"
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # as in "Trojan Source"
# A visible character for each invisible one: control pictures for control characters, HIDDEN for others.
UNSEEN = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
UNSEEN |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0x2028, 0x2029, 0xFEFF], HIDDEN)
UNSEEN |= {ord(mark): HIDDEN for mark in DIRECTIONS}
BREAKS = {ord("\n"): "\u240a", ord("\t"): "\u2409"}

# Characters that Markdown treats as markup inside a line; underscore and colon only in positions where they are.
MARKUP = re.compile(r"[\\`*\[\]<>|&~!$#]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.|@")


class Written(str):
    """Finished Markdown that is not escaped again."""

    __slots__ = ()


def visible(text: str) -> str:
    """`text` for a terminal or a page, with invisible characters replaced one by one. Line breaks and tabs stay."""
    return text.translate(UNSEEN)


def one_line(text: str) -> str:
    """`text` on one line of a terminal, with visible line breaks."""
    return visible(text).translate(BREAKS)


def markdown(value: Any) -> Any:
    """`value` escaped for a line or cell of Markdown. A Written stays unchanged."""
    if isinstance(value, Written):
        return value
    return Written(MARKUP.sub(r"\\\g<0>", one_line(str(value)).replace("\u240a", " ")))


def code(text: Any, in_table: bool = False) -> Written:
    """`text` as inline code in Markdown. In a table row (`in_table`) bars are escaped, since they split even code."""
    shown = one_line(str(text)).replace("|", "\\|" if in_table else "|")
    fence = "`" * (_longest_run(shown) + 1)
    pad = " " if fence != "`" or not shown.strip() else ""
    return Written(f"{fence}{pad}{shown or ' '}{pad}{fence}")


def code_block(text: str, language: str = "") -> Written:
    """`text` as a code block in Markdown, with a fence longer than any in the text."""
    shown = visible(text)
    fence = "`" * max(_longest_run(shown) + 1, 3)
    return Written(f"{fence}{language}\n{shown.rstrip()}\n{fence}")


def markdown_environment(**settings: Any) -> Environment:
    """A Jinja environment for Markdown that escapes every value. `code` and `code_block` are filters."""
    environment = Environment(finalize=markdown, autoescape=False, **settings)
    environment.filters |= {"code": code, "code_block": code_block}
    return environment


def html_environment(**settings: Any) -> Environment:
    """A Jinja environment for HTML that escapes every value after `visible`."""
    return Environment(finalize=_visible_unless_markup, autoescape=True, **settings)


def _visible_unless_markup(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
