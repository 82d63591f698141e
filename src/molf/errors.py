"""Errors that users can put right, kept apart from those that are ours."""

from __future__ import annotations

__all__ = ["MolfError", "UsageError"]


class MolfError(ValueError):
    """Something a user gave or asked for cannot work.

    The message says what was given, what is allowed and what to do. The command line prints it in one line; any other
    exception keeps its traceback.
    """


class UsageError(MolfError):
    """The words of a command are wrong: an unknown setting, a missing value. The command line exits with status 2."""
