"""Untrusted text has no effect when shown on a terminal, in Markdown or in HTML."""

import re
from html import unescape

import pytest

from lowbit.export.escape import code, code_block, html_environment, markdown, markdown_environment, one_line, visible

EVIL = "a\x1b]0;owned\x07\x1b[2Jb\r\x9b31m\u202ec\x00\x7f\ud800\u2028"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_no_control_character_reaches_a_terminal():
    for text in (EVIL, "".join(map(chr, range(0x300))), "".join(map(chr, range(0x2000, 0x2070)))):
        assert not UNSEEN.search(visible(text))
        assert len(visible(text)) == len(text)
        visible(text).encode("utf-8")
    assert visible("a\n\tb é 中 👩‍🔬") == "a\n\tb é 中 👩‍🔬"
    assert visible(EVIL).startswith("a␛]0;owned␇␛[2Jb␍")


def test_a_name_is_one_line():
    assert one_line("a\nError: forged\tb") == "a␊Error: forged␉b"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "<script>alert(1)</script>",
            "[a](http://evil)",
            "![x](http://evil/x.png)",
            "# a",
            "a | b",
            "**a**",
            "`a`",
            "~~a~~",
        ),
        *(
            "http://evil.example",
            "www.evil.example",
            "me@evil.example",
            "_a_",
            "a\n\n# heading\n",
            "&lt;b&gt;",
            "\\[a](b)",
        ),
    ],
)
def test_markdown_shows_what_the_text_says(text):
    """The escaped text has no markup left that is not behind a backslash, and unescaped it is the text."""
    shown = markdown(text)
    assert "\n" not in shown
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", shown)
    assert not re.search(r"[`*\[\]<>|&~$#]|://|\bwww\.|@|(?<!\w)_|_(?!\w)", bare)
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown) == text.replace("\n", " ")
    assert markdown(shown) == shown


def test_plain_names_and_numbers_stay_as_they_are():
    for value in ("self_attn.q_proj", "int4-g128", "0.0123 ± 0.4", "model.layers.3", "–"):
        assert markdown(value) == value


@pytest.mark.parametrize("text", ["a", "`", "a``b", "```\n", " ", "", "|", "<b>", "a\nb"])
def test_code_is_closed_by_its_own_fence_alone(text):
    shown = code(text)
    fence = re.match("`+", shown).group()
    assert shown.endswith(fence)
    assert fence not in shown[len(fence) : -len(fence)].strip("`") or len(fence) > 1
    assert not re.search(rf"(?<!`){fence}(?!`)", shown[len(fence) : -len(fence)])
    assert "\n" not in shown
    assert "\\|" in code("a|b", in_table=True)
    block = code_block(text, "sh").split("\n")
    assert block[0] == block[-1] + "sh"
    assert not any(line.startswith(block[-1]) for line in block[1:-1])


def test_templates_escape_every_value():
    template = "{{ x }} {{ x|code }}\n{{ x|code_block('toml') }}"
    text = markdown_environment().from_string(template).render(x="<b>\n```\n# a`b\x1b")
    assert text.split("\n")[0].startswith("\\<b\\>")
    assert not UNSEEN.search(text)
    page = html_environment().from_string("<i>{{ x }}</i>{{ y|safe }}").render(x="<b>\x1b\u202e", y="<svg>")
    assert unescape(page) == "<i><b>␛\ufffd</i><svg>"
    assert "<b>" not in page
