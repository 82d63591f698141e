import re

import pytest

from molf.tasks.custom_rows import usable_rows

PAIR = {"prompt": "Q:", "completion": " A"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def rows(*records):
    return usable_rows((f"f.jsonl, line {number}", record) for number, record in enumerate(records, start=1))


def test_rows_keep_the_columns_of_their_form():
    assert rows({**PAIR, "id": 3}, {"completion": " B", "prompt": "R:"}) == [PAIR, {"prompt": "R:", "completion": " B"}]
    assert rows({"text": "One.", "score": 0.5}) == [{"text": "One."}]
    system = {"role": "system", "content": "Be kind.", "tool_calls": None}
    assert rows({"messages": [system, *CHAT, *CHAT]}) == [
        {"messages": [{"role": "system", "content": "Be kind."}, *CHAT, *CHAT]}
    ]
    assert rows({**PAIR, "messages": None}) == [PAIR]  # as a file with columns for all forms has it
    assert rows() == []


def says(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "", "completion": " A"}, "line 2, column 'prompt': empty"),
        ({"prompt": "Q:", "completion": " \n"}, "line 2, column 'completion': empty"),
        ({"prompt": "Q:", "completion": None}, "line 2, column 'completion': null"),
        ({"prompt": "Q:"}, "line 2, column 'completion': there is none"),
        ({"prompt": 3, "completion": "A"}, "line 2, column 'prompt': must be a string, found an integer"),
        (
            {"prompt": CHAT, "completion": CHAT},
            "must be a string, found a list; conversations go in a column 'messages'",
        ),
        (
            {"text": None, "id": 1},
            "line 2: no usable column; a row needs prompt and completion; messages; text, .* text (null), id",
        ),
        ({}, "line 2: no usable column; .* has: nothing"),
        (
            {**PAIR, "text": "x"},
            "line 2: the row is a prompt and its completion (prompt, completion) and a text (text); keep",
        ),
        ({"text": "x"}, "line 2: a text (text), but the first row is a prompt and its completion (prompt, completion)"),
    ],
)
def test_bad_cells_are_named(record, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        rows(PAIR, record)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, ": empty"),
        ({"messages": "Hi"}, "must be a list of messages with role and content, found a string"),
        ({"messages": ["Hi"]}, "message 1: must be an object with role and content, found a string"),
        (says(("human", "Hi")), "message 1: role must be one of system, user, assistant, found 'human'"),
        ({"messages": [{"content": "Hi"}]}, "message 1: role must be one of system, user, assistant, found None"),
        (says(("user", "Hi"), ("assistant", " ")), "message 2, content: empty"),
        (says(("user", None)), "message 1, content: must be a string, found null"),
        (says(("user", "Hi")), "the last message must be the assistant's, found one of role 'user'"),
        (says(("assistant", "Hi")), "the first message is the assistant's"),
        (
            says(("user", "Hi"), ("system", "x"), ("assistant", "y")),
            "message 2: only the first message may be the system's",
        ),
        ({"messages": [{"role": "user", "content": "x", "tools": "y"}]}, "message 1: tools: only role and content"),
    ],
)
def test_bad_conversations_are_named(record, message):
    with pytest.raises(ValueError, match=f"f.jsonl, line 1, column 'messages'.*{re.escape(message)}"):
        rows(record)
