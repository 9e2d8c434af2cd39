"""Damage to a file, drawn from a seed: bits, bytes, blocks, lines, numbers."""

from __future__ import annotations

import random
import re

Mutation = tuple[str, bytes]  # what was done, in words, and the damaged content
_NUMBER = re.compile(rb"(?<![\w.])-?\d+(\.\d+)?(?![\w.])")
_STRANGE_NUMBERS = (
    b"",
    b"-1",
    b"0",
    b"1.5",
    b"1e300",
    b"nan",
    b"inf",
    b"9" * 30,
    b"4294967296",
    b"0x10",
    b"true",
    b'"7"',
)


def mutate(content: bytes, draw: random.Random, is_text: bool) -> Mutation:
    """Damage `content` once. Returns what was done and the new content, which differs from the old.

    is_text: lines and numbers are damaged as well.
    """
    kinds = [_flip_bit, _set_byte, _delete, _insert, _truncate, _zero_block, _swap_blocks, _repeat_block]
    if is_text:
        kinds += [_other_number, _without_line, _twice_a_line, _windows_lines, _byte_order_mark, _swap_lines] * 2
    while True:
        done = draw.choice(kinds)(content, draw)
        if done is not None and done[1] != content:
            return done


def _place(content: bytes, draw: random.Random) -> int:
    """Anywhere; half of the time in the first 4096 bytes, where formats keep what matters."""
    return draw.randrange(min(len(content), 4096) if draw.random() < 0.5 else len(content))


def _flip_bit(content: bytes, draw: random.Random) -> Mutation:
    at, bit = _place(content, draw), draw.randrange(8)
    return f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def _set_byte(content: bytes, draw: random.Random) -> Mutation:
    at, value = _place(content, draw), draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    return f"byte {at} is {value}", content[:at] + bytes([value]) + content[at + 1 :]


def _delete(content: bytes, draw: random.Random) -> Mutation:
    at, count = _place(content, draw), draw.choice((1, 1, 2, 4, 8, 16))
    return f"{count} bytes gone at {at}", content[:at] + content[at + count :]


def _insert(content: bytes, draw: random.Random) -> Mutation:
    at, new = (
        _place(content, draw),
        draw.choice((b"\0", b"\n", b"\t", b"\xff", draw.randbytes(draw.choice((1, 4, 16))))),
    )
    return f"{new!r} at {at}", content[:at] + new + content[at:]


def _truncate(content: bytes, draw: random.Random) -> Mutation:
    at = draw.randrange(len(content))
    return f"ends after {at} bytes", content[:at]


def _block(content: bytes, draw: random.Random) -> tuple[int, int]:
    at = _place(content, draw)
    return at, min(len(content) - at, draw.choice((8, 64, 512)))


def _zero_block(content: bytes, draw: random.Random) -> Mutation:
    at, count = _block(content, draw)
    return f"{count} zeros at {at}", content[:at] + bytes(count) + content[at + count :]


def _repeat_block(content: bytes, draw: random.Random) -> Mutation:
    at, count = _block(content, draw)
    return f"{count} bytes twice at {at}", content[: at + count] + content[at:]


def _swap_blocks(content: bytes, draw: random.Random) -> Mutation:
    (a, count), (b, _) = sorted((_block(content, draw), _block(content, draw)))
    count = min(count, b - a, len(content) - b)
    first, second = content[a : a + count], content[b : b + count]
    return f"{count} bytes at {a} and {b} exchanged", (
        content[:a] + second + content[a + count : b] + first + content[b + count :]
    )


def _other_number(content: bytes, draw: random.Random) -> Mutation | None:
    found = list(_NUMBER.finditer(content))
    if not found:
        return None
    number, new = draw.choice(found), draw.choice(_STRANGE_NUMBERS)
    return f"{new!r} for {number[0]!r} at {number.start()}", content[: number.start()] + new + content[number.end() :]


def _lines(content: bytes, draw: random.Random) -> tuple[list[bytes], int]:
    lines = content.splitlines(keepends=True)
    return lines, draw.randrange(len(lines))


def _without_line(content: bytes, draw: random.Random) -> Mutation:
    lines, at = _lines(content, draw)
    return f"without line {at + 1}", b"".join(lines[:at] + lines[at + 1 :])


def _twice_a_line(content: bytes, draw: random.Random) -> Mutation:
    lines, at = _lines(content, draw)
    return f"line {at + 1} twice", b"".join(lines[: at + 1] + lines[at:])


def _swap_lines(content: bytes, draw: random.Random) -> Mutation:
    (lines, a), (_, b) = _lines(content, draw), _lines(content, draw)
    lines[a], lines[b] = lines[b], lines[a]
    return f"lines {a + 1} and {b + 1} exchanged", b"".join(lines)


def _windows_lines(content: bytes, _draw: random.Random) -> Mutation:
    return "Windows line ends", content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def _byte_order_mark(content: bytes, _draw: random.Random) -> Mutation:
    return "a byte order mark", b"\xef\xbb\xbf" + content
