"""Escaping of untrusted text, such as names in a file."""

from __future__ import annotations


def printable(text: str, instead: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """Replace control characters in a text. They can control a terminal, and are not allowed in XML.

    Args:
        text: any text.
        instead: the replacement for each control character.
    """
    return "".join(letter if letter.isprintable() else instead for letter in text)
