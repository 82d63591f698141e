import json
import re

import pytest

from molf.errors import MolfError
from molf.tasks.schemas import checked_rows


def kept(*records):
    return checked_rows(((f"f.jsonl, line {number}", one) for number, one in enumerate(records, start=1)), None, "f")


PAIR = {"prompt": "Q:", "completion": " A"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_rows_keep_the_columns_of_their_form():
    assert kept({**PAIR, "id": 3}, {"completion": " B", "prompt": "R:"}) == [PAIR, {"prompt": "R:", "completion": " B"}]
    assert kept({"text": "One.", "score": 0.5}) == [{"text": "One."}]
    system = {"role": "system", "content": "Be kind.", "tool_calls": None}
    assert kept({"messages": [system, *CHAT, *CHAT]}) == [
        {"messages": [{"role": "system", "content": "Be kind."}, *CHAT, *CHAT]}
    ]
    assert kept({**PAIR, "messages": None}) == [PAIR]  # as a file with columns for all forms has it


TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_conversations_keep_what_their_template_gets():
    more = {"tools": json.dumps(TOOLS), "chat_template_kwargs": {"thinking": True}}
    assert kept({"messages": CHAT, **more}, {"messages": CHAT, "tools": TOOLS}, {"messages": CHAT, "tools": None}) == [
        {"messages": CHAT, "tools": TOOLS, "chat_template_kwargs": {"thinking": True}},
        {"messages": CHAT, "tools": TOOLS},
        {"messages": CHAT},
    ]


def test_unused_columns_are_told(caplog):
    kept({**PAIR, "id": 3, "source": "x"}, {**PAIR, "id": 4})
    assert caplog.messages == ["f: columns that are not used: id, source"]


def says(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "", "completion": " A"}, "line 2, column 'prompt': empty"),
        ({"prompt": "Q:", "completion": " \n"}, "line 2, column 'completion': empty"),
        ({"prompt": "Q:", "completion": None}, "line 2, column 'completion': null"),
        ({"prompt": "Q:"}, "line 2, column 'completion': missing"),
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
    with pytest.raises(MolfError, match=re.escape(message).replace(r"\.\*", ".*")):
        kept(PAIR, record)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, ", column 'messages': empty"),
        ({"messages": "Hi"}, "must be a list of messages with role and content, found a string"),
        ({"messages": ["Hi"]}, "message 1: must be an object with role and content, found a string"),
        (says(("human", "Hi")), "message 1: role must be one of system, user, assistant, found 'human'"),
        ({"messages": [{"content": "Hi"}]}, "message 1: role must be one of system, user, assistant, found None"),
        (says(("user", "Hi"), ("assistant", " ")), "message 2, content: empty"),
        (says(("user", None)), "message 1, content: must be a string, found null"),
        (says(("user", "Hi")), "the last message must have role 'assistant', found 'user'"),
        (says(("assistant", "Hi")), "the first message has role 'assistant'"),
        (
            says(("user", "Hi"), ("system", "x"), ("assistant", "y")),
            "message 2: only the first message may have role 'system'",
        ),
        ({"messages": CHAT, "tools": "f("}, ", column 'tools': not JSON"),
        ({"messages": CHAT, "tools": "[" * 100_000}, ", column 'tools': lists and objects are nested too deeply"),
        ({"messages": CHAT, "tools": '[{"f": 1, "f": 2}]'}, ", column 'tools': the name 'f' occurs twice"),
        ({"messages": CHAT, "tools": '{"f": 1}'}, ", column 'tools': must be a list, found an object"),
        (
            {"messages": CHAT, "chat_template_kwargs": "x"},
            "column 'chat_template_kwargs': must be an object, found a str",
        ),
        ({**PAIR, "tools": TOOLS}, "tools go to a chat template, and only conversations have one"),
        (
            {"messages": [{"role": "user", "content": "x", "tools": "y"}]},
            "message 1: only role and content are supported, found tools",
        ),
    ],
)
def test_bad_conversations_are_named(record, message):
    with pytest.raises(MolfError, match=f"f.jsonl, line 1.*{re.escape(message)}"):
        kept(record)


def test_a_message_in_parts_is_not_told_to_become_a_column():
    with pytest.raises(MolfError, match="message 1, content: must be a string, found a list$"):
        kept(says(("user", [{"type": "text", "text": "Hi"}]), ("assistant", "Hello")))
