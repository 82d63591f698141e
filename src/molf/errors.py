"""Errors that users can put right, kept apart from those that are ours."""

from __future__ import annotations

import re

__all__ = ["MolfError", "UsageError", "visible"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class MolfError(ValueError):
    """Something a user gave or asked for cannot work.

    The message says what was given, what is allowed and what to do. The command line prints it in one line; any other
    exception keeps its traceback.
    """


class UsageError(MolfError):
    """The words of a command are wrong: an unknown setting, a missing value. The command line exits with status 2."""


def visible(text: str) -> str:
    """Return a text for a terminal, without control characters but tabs and ends of lines: names in files may move the cursor."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
