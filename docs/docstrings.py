"""Docstrings for the site: the first paragraph is prose, and tables of arguments and examples keep their form."""

from typing import Any

from griffe import Extension, Object


class Preformatted(Extension):
    """Puts everything after a docstring's first paragraph into a code block."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        first, _, rest = obj.docstring.value.partition("\n\n")
        obj.docstring.value = first + (f"\n\n```text\n{rest.strip()}\n```" if rest.strip() else "")
