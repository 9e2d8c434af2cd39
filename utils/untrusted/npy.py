"""Strings of a `.npy` file, read without building anything that the file describes but strings.

A published gene panel may be an *object* array, which NumPy stores as a pickle. To unpickle it is not safe, whichever
classes are admitted: `ndarray.__setstate__` and `dtype.__setstate__` trust their arguments and can be made to take bytes of
the file for pointers. Here the instructions of the pickle are followed one by one, calls are only written down, and what
comes out must be the one thing NumPy writes for an array of strings.
"""

from __future__ import annotations

import io
import math
import pickletools
import sys
from dataclasses import dataclass

import numpy as np

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG1"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NO_EFFECT = {"PROTO", "FRAME"}


@dataclass(frozen=True)
class _Named:
    """A class or function that a pickle names; it is never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class _Called:
    """A call that a pickle asks for; it is never made."""

    function: object
    arguments: object


@dataclass(frozen=True)
class _Filled:
    """An object whose state a pickle wants to set; it never exists."""

    thing: object
    state: object


_MARK = _Named("", "mark")
_LATIN_1 = _Named("_codecs", "encode")  # how protocol 2 writes bytes
_EMPTY_ARRAYS = [
    _Called(_Named(module, "_reconstruct"), (_Named("numpy", "ndarray"), (0,), b"b"))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
]
_DTYPE = _Filled(_Called(_Named("numpy", "dtype"), ("O8", False, True)), (3, "|", None, None, None, -1, -1, 63))


def strings_of_npy(content: bytes) -> list[str]:
    """Return the strings of a `.npy` file, given as its bytes, in order (an array of several axes row by row).

    Raises ValueError (or what a parser of NumPy or of pickles raises on damaged bytes) for everything else.
    """
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format is not the one of an array of names")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = reader(file)
    if min(shape, default=1) < 0 or (is_fortran and len(shape) > 1):
        raise ValueError(f"an array of the shape {shape} is no list of names")
    count, start = math.prod(shape), file.tell()
    if dtype.kind == "O":
        return _strings_of_pickle(content[start:], count)
    if dtype.kind != "U":
        raise ValueError(f"expected an array of strings, found one of {dtype}")
    if len(content) - start < count * dtype.itemsize:
        raise ValueError(f"it holds {len(content) - start} bytes for {count} strings of {dtype.itemsize} bytes each")
    codes = np.frombuffer(content, np.dtype("u4").newbyteorder(dtype.byteorder), count * dtype.itemsize // 4, start)
    if codes.max(initial=0) > sys.maxunicode:  # NumPy would make strings of it that no Python may hold
        raise ValueError("it holds numbers where letters were expected")
    return np.frombuffer(content, dtype, count, start).tolist()


def _strings_of_pickle(content: bytes, count: int) -> list[str]:
    """The strings of a pickled object array of `count` strings, as NumPy writes it with the protocols 2 to 5."""
    array = _interpret(content)
    if not isinstance(array, _Filled) or array.thing not in _EMPTY_ARRAYS:
        raise ValueError("its pickle is not that of an array of strings, and nothing else is read from a pickle")
    match array.state:
        case (1, shape, dtype, False, list(strings)) if (
            isinstance(shape, tuple)
            and dtype == _DTYPE
            and all(type(string) is str for string in strings)
            and len(strings) == math.prod(shape) == count
        ):
            return strings
    raise ValueError("its pickle is not that of an array of strings, and nothing else is read from a pickle")


def _interpret(content: bytes) -> object:
    """What a pickle describes, as strings, numbers, tuples, lists and inert records of the calls it asks for."""
    stack: list = []
    memo: dict = {}
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _NO_EFFECT:
            continue
        if name == "STOP":
            return stack.pop()
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else _since_mark(stack)
            if type(stack[-1]) is not list:
                raise ValueError("its pickle appends to what is no list")
            stack[-1].extend(values)
        else:
            stack.append(_made(name, argument, stack))
    raise ValueError("its pickle has no end")


def _made(name: str, argument: object, stack: list) -> object:
    """The object that an instruction puts on the stack, made from what it takes off it."""
    if name in _VALUES:
        return argument
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name == "MARK":
        return _MARK
    if name == "EMPTY_LIST":
        return []
    if name in _TUPLES:
        return tuple(reversed([stack.pop() for _ in range(_TUPLES[name])]))
    if name == "TUPLE":
        return tuple(_since_mark(stack))
    if name == "GLOBAL":
        return _Named(*str(argument).split(" ", 1))
    if name not in ("STACK_GLOBAL", "REDUCE", "BUILD"):
        raise ValueError(f"its pickle holds the instruction {name}, which an array of strings does not need")
    second, first = stack.pop(), stack.pop()
    if name == "STACK_GLOBAL":
        return _Named(str(first), str(second))
    if name == "BUILD":
        return _Filled(first, second)
    return b"b" if (first, second) == (_LATIN_1, ("b", "latin1")) else _Called(first, second)


def _since_mark(stack: list) -> list:
    values: list = []
    while stack[-1] is not _MARK:
        values.append(stack.pop())
    stack.pop()
    return values[::-1]
