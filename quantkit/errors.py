"""The one exception that means "the input is at fault": shown as a single line, exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what would be accepted."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, on one line of at most so many characters; its type where it says nothing.

    >>> one_line(ValueError("not\\n  a number"))
    'not a number'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
