"""Every public thing says what it is, and nothing grows past what one can read at once."""

import ast
from collections.abc import Iterator

import pytest

from tests.house.tree import Function, Module, functions, modules

MOST_LINES = 60  # of code, the docstring not counted
MOST_PARAMETERS = 8  # self not counted
# Environment variables are read here and in setup.py alone.
READS_ENVIRONMENT = {"models/cache.py", "models/demo.py"}


def undocumented(module: Module) -> Iterator[str]:
    tree = module.tree()
    if not ast.get_docstring(tree) and module.path.stat().st_size:
        yield f"{module.file}:1: the module has no docstring"
    for node in tree.body:
        public = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield f"{module.file}:{node.lineno}: {node.name} has no docstring"


def too_big(module: Module) -> Iterator[str]:
    for function in functions(module.tree()):
        where = f"{module.file}:{function.lineno}: {function.name}"
        if (lines := lines_of(function)) > MOST_LINES:
            yield f"{where} has {lines} lines"
        flat = is_command(function) or is_public_api(module, function)
        if not flat and (count := parameters(function)) > MOST_PARAMETERS:
            yield f"{where} has {count} parameters"


def lines_of(function: Function) -> int:
    """Lines from `def` to the end, the docstring left out."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return total
    doc = function.body[0]
    return total - ((doc.end_lineno or doc.lineno) - doc.lineno + 1)


def parameters(function: Function) -> int:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(function: Function) -> bool:
    """True if click calls it: its parameters are then the command line's options."""
    return any("click." in ast.unparse(decorator) for decorator in function.decorator_list)


def is_public_api(module: Module, function: Function) -> bool:
    """True if `function` is offered to programs: its keywords are then options, as a command's are."""
    return module.name.startswith("lowbit.api.") and bool(function.args.kwonlyargs)


def reads_environment(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree()):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            yield f"{module.file}:{node.lineno}: reads the environment"


@pytest.mark.parametrize("rule", [undocumented, too_big])
def test_every_module_keeps(rule) -> None:
    found = [offence for module in modules() for offence in rule(module)]
    assert not found, "\n".join(found)


def test_the_environment_is_read_in_one_place() -> None:
    readers = [module for module in modules() if module.file not in READS_ENVIRONMENT]
    found = [offence for module in readers for offence in reads_environment(module)]
    assert not found, "\n".join(found)
