"""Type checks at the entry of public functions: an argument of a wrong type raises one line of text.

Commands parse their own options, so only calls from Python need this.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from lowbit.errors import LowbitError, UsageError

P = ParamSpec("P")
T = TypeVar("T")
SHOWN = 60  # characters of a value in a message

hints_of = cache(get_type_hints)


def typed(error: type[LowbitError] = UsageError) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator that raises `error` for an argument whose type differs from the function's annotation."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            given = signature.bind(*args, **kwargs).arguments
            hints = hints_of(function)
            for name, value in given.items():
                kind = signature.parameters[name].kind
                several = value if kind is inspect.Parameter.VAR_POSITIONAL else [value]
                if kind is not inspect.Parameter.VAR_KEYWORD and name in hints:
                    for one in several:
                        require_type(name, one, hints[name], error)
            return function(*args, **kwargs)

        return checked

    return decorate


def require_types(values: Mapping[str, Any], kind: type, error: type[LowbitError] = UsageError) -> None:
    """Raise `error` for a value whose type differs from the annotation of the field of class `kind` with its name."""
    for name, hint in hints_of(kind).items():
        require_type(name, values[name], hint, error)


def require_type(name: str, value: Any, hint: Any, error: type[ValueError] = UsageError) -> None:
    """Raise `error` if `value`, passed as `name`, is not of type `hint`."""
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        wanted = re.sub(r"\w+(?:\.\w+)*\.(\w+)", r"\1", inspect.formatannotation(hint))  # no modules
        raise error(f"{name} is {repr(value)[:SHOWN]}: {wanted} is needed") from None
