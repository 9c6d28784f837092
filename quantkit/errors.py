"""The one exception that means "the input is at fault": shown as a single line, exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what would be accepted."""
