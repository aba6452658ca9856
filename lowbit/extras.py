"""Packages that an installation may lack, and the extra of lowbit that brings each, from the installed metadata.

An installation without extras is for other programs: it has what `lowbit.integrations` needs beside them.
"""

import re
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from lowbit.errors import UsageError

DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # by the name of the import, where the two differ
REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*;.*extra == ["']([\w-]+)["']""")


def missing(what: str, error: ModuleNotFoundError) -> UsageError:
    """The error for `what`, which needs a package that is not installed. Raises `error` again for a module of ours."""
    module = (error.name or "").partition(".")[0]
    if module in ("", "lowbit"):
        raise error
    package = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    extra = extra_with(package)
    wanted = f"'lowbit[{extra}]'" if extra else package
    return UsageError(f"{what} needs the package {package}, which is not installed: pip install {wanted}")


def is_there(module: str) -> bool:
    """True if the module can be imported."""
    return find_spec(module) is not None


def extra_with(package: str) -> str | None:
    """The first extra that brings `package`; None if there is none, or if lowbit itself is not installed."""
    try:
        lines = requires("lowbit") or []
    except PackageNotFoundError:
        return None
    found = (REQUIREMENT.match(line) for line in lines)
    return next((match[2] for match in found if match and _plain(match[1]) == _plain(package)), None)


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
