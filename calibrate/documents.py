"""From table rows to texts: choice of columns, and rendering of chats.

The text column is the caller's, or the first of TEXT_COLUMNS in the rows, or a question and its answer (QUESTIONS,
ANSWERS), or the only column with words. A text is a string, or a chat: turns of role and content, or of from and value.
Chats are rendered with the tokenizer's chat template and the row's `tools`. So are a question and its answer if there
is a template. Empty rows are passed over. Rows that cannot be rendered are skipped and counted in a Reading.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from lowbit.calibrate.tables import BadRow, Numbered, Row
from lowbit.errors import DatasetError, LowbitError
from lowbit.export.plain import plain_json
from lowbit.models.chat import TemplateRefusal, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Made = TypeVar("Made")

TEXT_COLUMNS = (
    *("text", "messages", "conversations", "conversation", "content", "document", "article", "code", "sentence"),
)
CHAT_COLUMNS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "question", "prompt", "query", "problem")
ANSWERS = ("output", "response", "answer", "completion", "solution")
CONTEXTS = ("input", "context")  # text that a question refers to
SYSTEMS = ("system", "system_prompt")
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
SAMPLE = 64  # rows read before columns are chosen
SAMPLE_CHARS = 1 << 24  # characters in these rows, which are in memory together
MOST_BAD = 1000  # leading bad rows before a source is given up
PROBE = "calibration"
SEPARATOR = "\n\n"  # between documents, as in the usual perplexity protocol, and between parts of one


@dataclass
class Reading:
    """Rows read and skipped so far, for one source.

    label    the source's name for people
    rows     number of rows read
    skipped  one line per skipped row: number and reason
    folded   number of chats whose system turn was merged into the first user turn, because the template rejects it
    """

    label: str
    rows: int = 0
    skipped: list[str] = field(default_factory=list)
    folded: int = 0

    def describe(self) -> str:
        """One line for the user about skipped and folded rows; empty if there are none."""
        parts = []
        if self.skipped:
            parts.append(f"{len(self.skipped)} of {self.rows} rows read skipped ({self.skipped[0]})")
        if self.folded:
            parts.append(f"{self.folded} system turns, which the chat template refuses, put into the user's")
        return f"{self.label}: {'; '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class Layout:
    """The columns that hold the text: one, or a question and an answer, with optional context and system prompt."""

    text: str | None = None
    question: str = ""
    answer: str = ""
    context: str | None = None
    system: str | None = None

    @property
    def label(self) -> str:
        """The column names, for messages."""
        return f"column {self.text!r}" if self.text else f"columns {self.question!r} and {self.answer!r}"


@dataclass(frozen=True)
class Table:
    """The rows of a source, with the text columns chosen.

    sample     the first rows
    remaining  the others, to be read once
    """

    sample: list[Numbered]
    remaining: Iterator[Numbered]
    layout: Layout


def documents(
    rows: Iterable[Numbered],
    tokenizer: "PreTrainedTokenizerBase",
    reading: Reading,
    text_column: str | None = None,
) -> Iterator[str]:
    """The texts of a source's rows, in order. `reading` counts rows read and skipped.

    DatasetError if there are no rows, no text column, or no usable row.
    """
    yield from texts(open_table(rows, reading.label, text_column), tokenizer, reading)


def open_table(rows: Iterable[Numbered], label: str, text_column: str | None = None) -> Table:
    """The rows, with the text columns chosen. DatasetError if there are no rows or no text column."""
    remaining = iter(rows)
    sample, merged = _sample(remaining)
    if not sample:
        raise DatasetError(f"{label} has no rows; pass another file or split")
    return Table(sample, remaining, choose_layout(merged, text_column, label) if merged else Layout("text"))


def texts(table: Table, tokenizer: "PreTrainedTokenizerBase", reading: Reading) -> Iterator[str]:
    """The texts of the rows, in order. DatasetError if no row is usable."""
    template = ChatTemplate(tokenizer, f"{reading.label}, {table.layout.label}", reading)

    def text_of(row: Row) -> str:
        text = row_text(row, table.layout, template)
        text.encode()  # ValueError for half of a surrogate pair
        return text

    return usable(table, reading, text_of)


def usable(table: Table, reading: Reading, make: Callable[[Row], Made | None]) -> Iterator[Made]:
    """The result of `make` for each row, without None. `reading` counts rows read and skipped.

    A row is skipped if `make` raises ValueError. DatasetError if no row is usable.
    """
    for number, row in chain(table.sample, table.remaining):
        reading.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            made = make(row)
            if made is not None:
                yield made
        except LowbitError:  # a template beyond its limits takes as long for the next row
            raise
        except ValueError as error:
            reading.skipped.append(f"row {number}: {error}")
        if len(reading.skipped) == reading.rows == MOST_BAD:
            break
    if len(reading.skipped) == reading.rows:
        raise DatasetError(
            f"{reading.label}, {table.layout.label}: none of {reading.rows} rows can be used; {reading.skipped[0]}"
        )


def _sample(rows: Iterator[Numbered]) -> tuple[list[Numbered], Row]:
    """The first rows, until one has a text, and the first text-like value of each column."""
    sample: list[Numbered] = []
    merged: Row = {}
    while len(sample) < MOST_BAD and (batch := _some(rows)):
        sample += batch
        for row in (row for _, row in batch if isinstance(row, dict)):
            merged |= {name: value for name, value in row.items() if not is_text(merged.get(name))}
        if any(map(is_text, merged.values())):
            break
    return sample, merged


def _some(rows: Iterator[Numbered]) -> list[Numbered]:
    """The next rows: at most SAMPLE, with about SAMPLE_CHARS characters in total."""
    batch: list[Numbered] = []
    size = 0
    while len(batch) < SAMPLE and size < SAMPLE_CHARS and (numbered := next(rows, None)) is not None:
        batch.append(numbered)
        row = numbered[1]
        size += sum(len(value) for value in row.values() if isinstance(value, str)) if isinstance(row, dict) else 0
    return batch


def is_text(value: Any) -> bool:
    """True if a cell may be a text or a chat."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def choose_layout(row: Row, wanted: str | None, label: str) -> Layout:
    """The text columns, judged by one row. DatasetError lists the columns if the choice is not clear."""
    columns = ", ".join(row)
    if wanted is not None:
        if wanted not in row:
            raise DatasetError(f"{label} has no column {wanted!r}; its columns are: {columns}")
        return Layout(wanted)

    def first(names: Iterable[str]) -> str | None:
        return next((name for name in names if is_text(row.get(name))), None)

    text, question, answer = first(TEXT_COLUMNS), first(QUESTIONS), first(ANSWERS)
    if text is None and question and answer:
        return Layout(None, question, answer, first(CONTEXTS), first(SYSTEMS))
    strings = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    worded = [name for name in strings if any(map(str.isalpha, row[name]))] or strings  # ids may be strings too
    if text is None and len(worded) != 1:
        raise DatasetError(f"{label}: which column is the text? Name one of: {columns}")
    return Layout(text or worded[0])


def row_text(row: Row, layout: Layout, template: "ChatTemplate") -> str:
    """The text of a row; empty if its cells are empty. BadRow if they hold neither text nor a chat."""
    if layout.text is None:
        return exchange_text(row, layout, template)
    value = cell(row, layout.text)
    return value if isinstance(value, str) else template.render(turns_of(value, "user"), row.get("tools"))


def row_turns(row: Row, layout: Layout, content: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The text of a row as turns, their contents mapped by `content`; none if its cells are empty."""
    if layout.text is not None:
        return turns_of(cell(row, layout.text), "user", content)
    return [turn | {"content": content(turn["content"])} for turn in exchange_turns(row, layout)]


def cell(row: Row, column: str) -> Any:
    """The cell in a column: a text, or a chat, which may be stored as JSON."""
    value = row.get(column)
    return _parsed(value) if isinstance(value, str) and column in CHAT_COLUMNS else value


def _parsed(text: str) -> Any:
    """The chat in `text` as JSON (tables without nested columns store chats so), or `text` itself."""
    try:
        value = plain_json(text.encode("utf-8", "surrogatepass"))
    except ValueError:
        return text
    return value if isinstance(value, list) and is_text(value) else text


def exchange_text(row: Row, layout: Layout, template: "ChatTemplate") -> str:
    """The text of a question and its answer, as a chat if there is a template. Empty if either is empty."""
    turns = exchange_turns(row, layout)
    if template.missing:
        return SEPARATOR.join(turn["content"] for turn in turns)
    return template.render(turns, row.get("tools"))


def exchange_turns(row: Row, layout: Layout) -> list[dict[str, Any]]:
    """A question and its answer as turns, none if either is empty."""
    question, answer = turns_of(row.get(layout.question), "user"), turns_of(row.get(layout.answer), "assistant")
    if not question or not answer:
        return []
    context = content_text(row.get(layout.context or ""))
    if context:
        question[-1]["content"] += SEPARATOR + context
    return turns_of(row.get(layout.system or ""), "system") + question + answer


def content_text(content: Any) -> str:
    """The text of a turn's content, which may be a list of parts. BadRow for a part that is not text."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        return "\n".join(map(_part_text, content))
    raise BadRow(f"a turn's content is {type(content).__name__}, expected text")


def turns_of(value: Any, role: str, content: Callable[[Any], Any] = content_text) -> list[dict[str, Any]]:
    """A cell as turns of role and content, mapped by `content`. A string becomes one turn of `role`. BadRow for other
    values."""
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": content(value)}]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return [standard_turn(turn, content) for turn in value]
    raise BadRow(f"holds {type(value).__name__}, neither text nor a chat; name another column")


def standard_turn(turn: dict[str, Any], content: Callable[[Any], Any] = content_text) -> dict[str, Any]:
    """One turn with role and content, converted from ShareGPT's from and value if needed. Other keys are kept."""
    for who, said in (("role", "content"), ("from", "value")):
        if isinstance(turn.get(who), str) and turn[who] and said in turn:
            rest = without_nulls({key: value for key, value in turn.items() if key not in (who, said)})
            called = turn[said] is None and rest.get("tool_calls")  # a tool call without text
            words = None if called else content(turn[said])
            return {"role": ROLES.get(turn[who], turn[who]), "content": words, **rest}
    raise BadRow(f"a turn has {', '.join(turn)}, expected role and content, or from and value")


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise BadRow(f"a turn holds a part of type {kind}, and only text is read")


def without_nulls(value: Any) -> Any:
    """`value` without keys whose value is None: tables add them to give all rows the same columns."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


class ChatTemplate:
    """A tokenizer's chat template, applied to the chats of the source `label`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", label: str, reading: Reading) -> None:
        self.tokenizer, self.label, self.reading = tokenizer, label, reading

    @property
    def missing(self) -> bool:
        """True if the tokenizer has no chat template."""
        return not self.tokenizer.chat_template

    @cached_property
    def wants_parts(self) -> bool:
        """True if the template accepts content only as a list of parts, as templates of vision models may."""
        return not self._shows(PROBE) and self._shows(as_parts(PROBE))

    def render(self, turns: list[dict[str, Any]], tools: Any = None) -> str:
        """The rendered chat; empty without turns.

        A system turn that the template rejects is merged into the following user turn. BadRow if the template rejects
        the chat anyway, DatasetError if there is no template.
        """
        if not turns:
            return ""
        self._require()
        tools = tools_of(tools)
        try:
            return self._apply(turns, tools)
        except BadRow:
            if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
                raise
        content = SEPARATOR.join(filter(None, (turn["content"] for turn in turns[:2])))
        text = self._apply([turns[1] | {"content": content}, *turns[2:]], tools)
        self.reading.folded += 1
        return text

    def render_parts(self, turns: list[dict[str, Any]], tools: Any = None) -> str:
        """The rendered chat; its contents are lists of parts."""
        self._require()
        return self._rendered(turns, tools_of(tools))

    def _require(self) -> None:
        if self.missing:
            raise DatasetError(f"{self.label}: holds chats, and this tokenizer has no chat template; pass plain text")

    def _apply(self, turns: list[dict[str, Any]], tools: list[Any] | None) -> str:
        if self.wants_parts:
            turns = [turn | {"content": as_parts(turn["content"] or "")} for turn in turns]
        return self._rendered(turns, tools)

    def _shows(self, content: Any) -> bool:
        try:
            return PROBE in self._rendered([{"role": "user", "content": content}], None)
        except BadRow:
            return False

    def _rendered(self, turns: list[dict[str, Any]], tools: list[Any] | None) -> str:
        try:
            return render_chat(self.tokenizer, turns, tools)
        except TemplateRefusal as error:
            roles = [turn["role"] for turn in turns]
            raise BadRow(f"the model's chat template refuses a chat with roles {roles}: {error.reason}") from error


def as_parts(text: str) -> list[dict[str, str]]:
    """A turn's content as a list with one text part."""
    return [{"type": "text", "text": text}]


def tools_of(value: Any) -> list[Any] | None:
    """The tools of a row, which may be JSON text; None without tools. BadRow if they are not a list of objects."""
    if isinstance(value, str) and value:
        value = plain_json(value.encode("utf-8", "surrogatepass"))
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("its tools are no list of objects")
    return [without_nulls(tool) for tool in value]
