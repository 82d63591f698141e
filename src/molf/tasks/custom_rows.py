"""The rows of a user's own data: which form they have, and what is wrong with one."""

from collections.abc import Iterable
from typing import Any

from molf.tasks.base import Row
from molf.tasks.records import Located, json_name

FORMS: dict[tuple[str, ...], str] = {
    ("prompt", "completion"): "a prompt and its completion",
    ("messages",): "a conversation",
    ("text",): "a text",
}
"""Columns -> what a row with them is."""
ROLES = ("system", "user", "assistant")


def usable_rows(records: Iterable[Located]) -> list[Row]:
    """Return the rows with nothing but the columns of their form.

    Raises:
        ValueError: If a row is not usable, or has another form than the first; the message names place and column.
    """
    rows: list[Row] = []
    columns: tuple[str, ...] = ()
    for where, record in records:
        found = _form(record, where)
        columns = columns or found
        if found != columns:
            raise ValueError(
                f"{where}: {FORMS[found]} ({', '.join(found)}), but the first row is {FORMS[columns]} "
                f"({', '.join(columns)}); all rows must have one form"
            )
        rows.append({column: _cell(record[column], f"{where}, column {column!r}") for column in columns})
    return rows


def _form(record: Row, where: str) -> tuple[str, ...]:
    """Return the columns of the one form that a row has cells of."""
    begun = [columns for columns in FORMS if any(record.get(column) is not None for column in columns)]
    if not begun:
        forms = "; ".join(" and ".join(columns) for columns in FORMS)
        there = ", ".join(f"{name} (null)" if record[name] is None else name for name in record)
        raise ValueError(f"{where}: no usable column; a row needs {forms}, and this one has: {there or 'nothing'}")
    if len(begun) > 1:
        both = " and ".join(f"{FORMS[columns]} ({', '.join(columns)})" for columns in begun)
        raise ValueError(f"{where}: the row is {both}; keep the columns of one form")
    for column in begun[0]:
        if record.get(column) is None:
            raise ValueError(f"{where}, column {column!r}: {'null' if column in record else 'there is none'}")
    return begun[0]


def _cell(value: Any, where: str) -> Any:
    if where.endswith("'messages'"):
        return _messages(value, where)
    return _text(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        hint = "; conversations go in a column 'messages'" if isinstance(value, list) else ""
        raise ValueError(f"{where}: must be a string, found {json_name(value)}{hint}")
    if not value.strip():
        raise ValueError(f"{where}: empty")
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: must be a list of messages with role and content, found {json_name(value)}")
    if not value:
        raise ValueError(f"{where}: empty")
    messages = [_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)]
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError(f"{where}, message {roles.index('system', 1) + 1}: only the first message may be the system's")
    if roles[-1] != "assistant":
        raise ValueError(f"{where}: the last message must be the assistant's, found one of role {roles[-1]!r}")
    if roles[0] == "assistant":
        raise ValueError(f"{where}: the first message is the assistant's, so that there is nothing for it to answer")
    return messages


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: must be an object with role and content, found {json_name(message)}")
    more = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
    if more:
        raise ValueError(f"{where}: {', '.join(more)}: only role and content are understood")
    if message.get("role") not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, found {message.get('role')!r}")
    return {"role": message["role"], "content": _text(message.get("content"), f"{where}, content")}
