"""Plain Python values as JSON, so that two processes exchange data but no behaviour.

Other values are refused. So an object that claims to equal everything stays in the process that made it, and a subclass
of a plain type arrives as that type.
"""

from collections.abc import Callable, Iterator
from typing import Any

NESTED: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "iterator": iter,
}
FLAT: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": range,
}


def pack(value: Any) -> Any:
    """`value` as JSON. TypeError if it is not a plain value. An iterator is read to its end."""
    if value is None or isinstance(value, bool | str):
        return value
    for kind, parts in (
        (int, lambda: [hex(value)]),
        (float, lambda: [float.hex(value)]),
        (complex, lambda: [float.hex(value.real), float.hex(value.imag)]),
        (bytes, lambda: [bytes.hex(value)]),
        (bytearray, lambda: [bytearray.hex(value)]),
        (range, lambda: [value.start, value.stop, value.step]),
        (dict, lambda: [[pack(key), pack(each)] for key, each in dict.items(value)]),
        (list, lambda: map(pack, list.__iter__(value))),
        (tuple, lambda: map(pack, tuple.__iter__(value))),
        (set, lambda: map(pack, set.__iter__(value))),
        (frozenset, lambda: map(pack, frozenset.__iter__(value))),
    ):
        if isinstance(value, kind):
            return [kind.__name__, *parts()]
    if isinstance(value, Iterator):
        return ["iterator", *map(pack, value)]
    raise TypeError(
        f"a {type(value).__name__} is no plain value; only plain values pass between a program and its tests"
    )


def unpack(value: Any) -> Any:
    """The value that was passed to `pack`. ValueError, KeyError or TypeError for anything that `pack` does not
    write."""
    if value is None or isinstance(value, bool | str):
        return value
    kind, *parts = value
    if kind in FLAT:
        return FLAT[kind](*parts)
    items = [list(map(unpack, part)) for part in parts] if kind == "dict" else list(map(unpack, parts))
    return NESTED[kind](items)
