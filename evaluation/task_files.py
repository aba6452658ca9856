"""Detection of code in task files: lm-evaluation-harness would run Python from several kinds of entries.

Files are parsed as trees of YAML nodes, without constructing objects. Files of the installed harness are trusted.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lowbit.errors import UsageError
from lowbit.export.files import read_bytes

YAML = (".yaml", ".yml")
STANDARD = "tag:yaml.org,2002:"
PLAIN_TAGS = frozenset(
    STANDARD + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
)
MOST_BYTES = 10_000_000  # of a file; the harness's largest has a hundredth
PICKLED = "pandas"  # the dataset reader that unpickles
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def require_data_alone(paths: Sequence[Path], trusted: Path, metrics: frozenset[str]) -> None:
    """Raise UsageError if a task file, or a file it includes, would run code.

    paths    YAML files, and directories of them
    trusted  the harness's own directory
    metrics  known metrics of the harness; it would load any other name as a script
    """
    waiting = [file for path in paths for file in (_files_in(path) if path.is_dir() else [path])]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or path.is_relative_to(trusted.resolve()) or not path.is_file():
            continue
        seen.add(path)
        for key, node in _nodes(path):
            if reason := _reason_against(key, node, metrics):
                raise UsageError(
                    f"{path}: {reason}, which is code; pass --allow-code if you trust this file and run it"
                )
            if key == "include":
                waiting += [path.parent / name for name in _texts(node)]


def _files_in(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.suffix in YAML)


def _nodes(path: Path) -> Iterator[tuple[str, yaml.Node]]:
    """Every node of the file, with the key of its parent mapping."""
    try:
        root = yaml.compose(read_bytes(path, MOST_BYTES), Loader=Loader)
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: no YAML that can be read ({' '.join(str(error).split())[:200]})") from error
    waiting = [("", root)] if root is not None else []
    seen: set[int] = set()
    while waiting:
        key, node = waiting.pop()
        if id(node) in seen:  # an alias: the same node in two places
            continue
        seen.add(id(node))
        yield key, node
        if isinstance(node, yaml.MappingNode):
            waiting += [pair for name, value in node.value for pair in (("", name), (str(name.value), value))]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(key, value) for value in node.value]


def _reason_against(key: str, node: yaml.Node, metrics: frozenset[str]) -> str | None:
    """The reason why a node would run code, or None."""
    if node.tag not in PLAIN_TAGS:
        return f"it has {' '.join([node.tag.replace(STANDARD, '!!'), *_texts(node)[:1]])}"
    if key in ("class", "use_prompt"):
        return f"it has {key}: {', '.join(_texts(node))}"
    if key == "metric" and (unknown := [name for name in _texts(node) if name not in metrics]):
        return f"its metric {unknown[0]!r} is none of the harness's"
    if key == "hf_evaluate" and _texts(node) != ["false"]:
        return "it asks for a metric from elsewhere (hf_evaluate)"
    if key == "dataset_path" and PICKLED in _texts(node):
        return f"its data are pickles (dataset_path: {PICKLED})"
    return None


def _texts(node: yaml.Node) -> list[str]:
    """The scalar values of a node: itself, or the items of a list."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [each.value for each in nodes if isinstance(each, yaml.ScalarNode)]
