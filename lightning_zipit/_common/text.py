"""Text from outside, such as names in a file, made safe to show."""

from __future__ import annotations


def printable(text: str, instead: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """Text without control characters, which can command a terminal and which XML cannot hold.

    Args:
        text: any text.
        instead: what takes the place of each control character.
    """
    return "".join(letter if letter.isprintable() else instead for letter in text)
