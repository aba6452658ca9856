"""Detection of code in task files: lm-evaluation-harness would run Python from several kinds of entries.

Files are parsed as trees of YAML nodes, without constructing objects. Files of the installed harness are trusted, but
only with their own data: some of their functions evaluate text of the data set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lowbit.errors import CheckpointError, UsageError
from lowbit.export.files import read_bytes

YAML = (".yaml", ".yml")
STANDARD = "tag:yaml.org,2002:"
PLAIN_TAGS = frozenset(
    STANDARD + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
)
NUMBERS = (STANDARD + "int", STANDARD + "float")
MOST_BYTES = 1_000_000  # of a file; the harness's largest has a tenth
MOST_NODES = (
    100_000  # of a file, an alias counted as the nodes it stands for: copies of a file are made without aliases
)
LONGEST_NUMBER = 1000  # characters; the time to read YAML's numbers grows with their square
TABLES = ("json", "csv", "text", "parquet", "arrow")  # the readers of `datasets` that read plain data
# Settings of a data set that neither write elsewhere, nor start processes, nor name a reader's internals.
SETTINGS = frozenset(
    ("data_files", "data_dir", "split", "revision", "streaming", "trust_remote_code", "field", "columns", "sample_by")
) | {"sep", "delimiter", "column_names", "names", "header", "quotechar", "encoding", "keep_linebreaks"}
DATA = frozenset(("dataset_path", "dataset_name", "dataset_kwargs"))
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Harness:
    """The facts about the installed harness that decide on a file.

    metrics  names of its metrics; it would load any other name as a script
    readers  names of all readers of `datasets`
    """

    metrics: frozenset[str]
    readers: frozenset[str]


def require_data_alone(paths: Sequence[Path], harness: Harness) -> None:
    """Raise UsageError if a task file, or a file it includes, would run code. `paths` are YAML files and directories.

    An included file is examined also if it is the harness's own, since it would work on the including file's data.
    """
    for path in _with_included(paths):
        for key, node in _nodes(path):
            if reason := _reason_against(key, node, harness):
                raise UsageError(f"{path}: {reason}; pass --allow-code if you trust this file and run it")


def require_own_data(paths: Sequence[Path], theirs: frozenset[str]) -> None:
    """Raise UsageError if a group of tasks gives other data to a task of the harness, whose names are `theirs`.

    A group's settings reach the groups that it names, so those of all files count together.
    """
    found: dict[str, set[str]] = {}
    for path in _expanded(paths):
        pairs = [(key, text) for file in _with_included([path]) for key, text in _pairs(file)]
        if any(key == "group" for key, _ in pairs):
            for key, text in pairs:
                found.setdefault(key, set()).add(text)
    names = sorted(found.get("task", set()) & theirs)
    if names and DATA & found.keys():
        raise UsageError(
            f"a group gives the harness's task {names[0]!r} other data, which its code may evaluate; pass --allow-code "
            "if you trust these files and run them"
        )


def _expanded(paths: Sequence[Path]) -> list[Path]:
    return [file for path in paths for file in (_files_in(path) if path.is_dir() else [path])]


def _with_included(paths: Sequence[Path]) -> Iterator[Path]:
    """Every file of `paths`, of directories among them, and every file that one of them includes, once."""
    waiting, seen = _expanded(paths), set()
    while waiting:
        path = waiting.pop().resolve()
        if path not in seen and path.exists() and not path.is_dir():
            seen.add(path)
            yield path
            waiting += [path.parent / text for key, text in _pairs(path) if key == "include"]


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Every key of the file with each scalar value right below it."""
    yield from ((key, text) for key, node in _nodes(path) for text in _texts(node) or [""])


def _files_in(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.suffix in YAML)


def _nodes(path: Path) -> Iterator[tuple[str, yaml.Node]]:
    """Every node of the file, with the key of its parent mapping."""
    try:
        root = yaml.compose(read_bytes(path, MOST_BYTES), Loader=Loader)
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: no YAML that can be read ({' '.join(str(error).split())[:200]})") from error
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    if root is not None and _size(root) > MOST_NODES:
        raise UsageError(f"{path}: more than {MOST_NODES} values, or an alias inside itself; write fewer")
    yield from _below("", root) if root is not None else ()


def _below(key: str, node: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    """A node and every node below it, each with the key of its parent mapping. An alias is a node in its place."""
    waiting = [(key, node)]
    while waiting:
        key, node = waiting.pop()
        yield key, node
        if isinstance(node, yaml.MappingNode):
            waiting += [pair for name, value in node.value for pair in (("", name), (str(name.value), value))]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(key, value) for value in node.value]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _size(root: yaml.Node) -> int:
    """The number of nodes below `root` if every alias were written out; more than MOST_NODES for one inside itself."""
    sizes: dict[int, int] = {}
    waiting = [(root, False)]
    while waiting:
        node, is_done = waiting.pop()
        children = _children(node)
        if is_done:
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
        elif id(node) not in sizes:
            sizes[id(node)] = MOST_NODES + 1  # until it is done: for an alias inside itself
            waiting += [(node, True), *((child, False) for child in children)]
    return sizes[id(root)]


def _keys(node: yaml.Node) -> list[str]:
    return [str(name.value) for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []


def _reason_against(key: str, node: yaml.Node, harness: Harness) -> str | None:
    """The reason why a node would run code, or None."""
    texts = _texts(node)
    if node.tag not in PLAIN_TAGS:
        return f"it has {' '.join([node.tag.replace(STANDARD, '!!'), *texts[:1]])}, which is code"
    if node.tag in NUMBERS and len(texts[0]) > LONGEST_NUMBER:
        return f"it has a number of {len(texts[0])} characters"
    if key in ("class", "use_prompt", "custom_dataset"):
        return f"it has {key}: {', '.join(texts)}, which is code"
    if key == "unsafe_code":
        return "it has unsafe_code, which says whether answers are run as code"
    if key == "metric" and (unknown := [name for name in texts if name not in harness.metrics]):
        return f"its metric {unknown[0]!r} is none of the harness's, which is code"
    if key == "hf_evaluate" and texts != ["false"]:
        return "it asks for a metric from elsewhere (hf_evaluate), which is code"
    return _reason_against_data(key, node, harness)


def _reason_against_data(key: str, node: yaml.Node, harness: Harness) -> str | None:
    """The reason why a setting of the data set reaches beyond plain data, or None."""
    texts = _texts(node)
    if key == "dataset_path" and (odd := [name for name in texts if name in harness.readers and name not in TABLES]):
        return f"its data are read by {odd[0]!r}, which is none of {', '.join(TABLES)}"
    if key == "dataset_kwargs" and (odd := sorted(set(_keys(node)) - SETTINGS)):
        return f"its data set has the setting {odd[0]!r}, which may write files or start processes"
    if key in ("dataset_path", "dataset_kwargs"):
        addresses = [text for _, each in _below(key, node) for text in _texts(each) if "://" in text or "::" in text]
        return f"its data come from an address ({addresses[0]})" if addresses else None
    return None


def _texts(node: yaml.Node) -> list[str]:
    """The scalar values of a node: itself, or the items of a list."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [each.value for each in nodes if isinstance(each, yaml.ScalarNode)]
