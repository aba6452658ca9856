"""The project's own source, parsed: what the tests of the house look at."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "lowbit"  # the one import name
PACKAGES = ("quant", "export", "models", "calibrate", "engine", "evaluation", "serve", "commands", "integrations")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A file of one of PACKAGES under its dotted name; a package's name stands for its __init__."""

    name: str
    path: Path

    @property
    def file(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(), self.file)


@dataclass(frozen=True)
class Import:
    """One name brought in at `line`: the module that it is, or that it comes from."""

    target: str
    line: int
    in_function: bool


@cache
def modules() -> tuple[Module, ...]:
    """Every module of lowbit itself and of PACKAGES, in the order of the floors."""
    own = sorted((*(ROOT / NAME).glob("*.py"), *(ROOT / NAME / "api").glob("*.py")))
    paths = (*own, *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))))
    return tuple(Module(dotted(path), path) for path in paths)


def dotted(path: Path) -> str:
    """The name that imports `path`: quant/algos/fold.py is lowbit.quant.algos.fold."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    parts = inside if inside[0] == NAME else (NAME, *inside)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, known: frozenset[str], in_function: bool = False) -> Iterator[Import]:
    """Every import below `tree`. `from a import b` is of a.b where that is `known` to be a module, else of a."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                member = f"{module}.{alias.name}"
                yield Import(member if member in known else module, node.lineno, in_function)
        elif isinstance(node, ast.Call) and called(node).endswith(("import_module", "__import__")):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(name.value, node.lineno, in_function)
            yield from imports(node, known, in_function)
        else:
            yield from imports(node, known, in_function or isinstance(node, Function | ast.Lambda))


def called(call: ast.Call) -> str:
    """The dotted text of what is called: importlib.import_module."""
    return ast.unparse(call.func)


def functions(tree: ast.Module) -> Iterator[Function]:
    """Every function and method in `tree`, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))
