"""The kinds of rows of a user's own data, and what each must hold."""

import logging
from collections.abc import Iterable
from itertools import islice
from typing import Any

from molf.errors import MolfError
from molf.tasks.base import Row
from molf.tasks.formats import Located, json_name, parse_json

ROW_SCHEMAS: dict[tuple[str, ...], str] = {
    ("prompt", "completion"): "a prompt and its completion",
    ("messages",): "a conversation",
    ("text",): "a text",
}
"""The columns of each kind of row, and its name."""
ROLES = ("system", "user", "assistant")
TEMPLATE_COLUMNS: dict[str, type] = {"tools": list, "chat_template_kwargs": dict}
"""Optional columns of conversations, which the chat template gets."""

_log = logging.getLogger(__name__)


def checked_rows(records: Iterable[Located], limit: int | None, origin: str) -> list[Row]:
    """Return the first rows, each with the columns of its schema only, which must be that of the first row."""
    rows: list[Row] = []
    columns: tuple[str, ...] = ()
    ignored: dict[str, None] = {}
    for where, record in islice(records, limit):
        found = schema_of(record, where)
        columns = columns or found
        if found != columns:
            raise MolfError(
                f"{where}: {ROW_SCHEMAS[found]} ({', '.join(found)}), but the first row is {ROW_SCHEMAS[columns]} "
                f"({', '.join(columns)}); all rows must have the same columns"
            )
        check = _messages if columns == ("messages",) else _text
        row = {column: check(record[column], f"{where}, column {column!r}") for column in columns}
        rows.append(row | _template_arguments(record, columns, where))
        ignored |= dict.fromkeys(name for name in record if name not in rows[-1])
    if not rows:
        raise MolfError(f"{origin}: no records")
    if ignored:
        _log.warning("%s: columns that are not used: %s", origin, ", ".join(ignored))
    return rows


def _template_arguments(record: Row, columns: tuple[str, ...], where: str) -> Row:
    """Return what the row gives its chat template besides messages, as TRL reads it: ``tools`` may be JSON text."""
    given = {name: record[name] for name in TEMPLATE_COLUMNS if record.get(name) is not None}
    if given and columns != ("messages",):
        raise MolfError(
            f"{where}: {', '.join(given)} go to a chat template, and only conversations have one; remove them"
        )
    for name, value in given.items():
        if name == "tools" and isinstance(value, str):
            given[name] = parse_json(value, f"{where}, column 'tools'")
        if not isinstance(given[name], TEMPLATE_COLUMNS[name]):
            expected = json_name(TEMPLATE_COLUMNS[name]())
            raise MolfError(f"{where}, column {name!r}: must be {expected}, found {json_name(given[name])}")
    return given


def schema_of(record: Row, where: str) -> tuple[str, ...]:
    """Return the columns of the one schema that a row follows."""
    begun = [columns for columns in ROW_SCHEMAS if any(record.get(column) is not None for column in columns)]
    if not begun:
        schemas = "; ".join(" and ".join(columns) for columns in ROW_SCHEMAS)
        there = ", ".join(f"{name} (null)" if record[name] is None else name for name in record)
        raise MolfError(f"{where}: no usable column; a row needs {schemas}, and this one has: {there or 'nothing'}")
    if len(begun) > 1:
        both = " and ".join(f"{ROW_SCHEMAS[columns]} ({', '.join(columns)})" for columns in begun)
        raise MolfError(f"{where}: the row is {both}; keep the columns of one of them")
    for column in begun[0]:
        if record.get(column) is None:
            raise MolfError(f"{where}, column {column!r}: {'null' if column in record else 'missing'}")
    return begun[0]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        told = isinstance(value, list) and any(isinstance(item, dict) and "role" in item for item in value)
        hint = "; conversations go in a column 'messages'" if told else ""
        raise MolfError(f"{where}: must be a string, found {json_name(value)}{hint}")
    if not value.strip():
        raise MolfError(f"{where}: empty")
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise MolfError(f"{where}: must be a list of messages with role and content, found {json_name(value)}")
    if not value:
        raise MolfError(f"{where}: empty")
    messages = [_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)]
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise MolfError(
            f"{where}, message {roles.index('system', 1) + 1}: only the first message may have role 'system'"
        )
    if roles[-1] != "assistant":
        raise MolfError(f"{where}: the last message must have role 'assistant', found {roles[-1]!r}")
    if roles[0] == "assistant":
        raise MolfError(f"{where}: the first message has role 'assistant', so there is nothing for it to answer")
    return messages


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise MolfError(f"{where}: must be an object with role and content, found {json_name(message)}")
    more = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
    if more:
        raise MolfError(f"{where}: only role and content are supported, found {', '.join(more)}")
    if message.get("role") not in ROLES:
        raise MolfError(f"{where}: role must be one of {', '.join(ROLES)}, found {message.get('role')!r}")
    return {"role": message["role"], "content": _text(message.get("content"), f"{where}, content")}
