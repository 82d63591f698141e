import json

import pytest

from molf.errors import MolfError
from molf.tasks.retention import ROWS, background_texts


@pytest.mark.parametrize("task", ["fact", "med", "sql", "custom"])
def test_texts_are_those_of_the_other_tasks(task):
    texts, origin = background_texts(task)
    others = [name for name in ("fact", "med", "sql") if name != task]
    assert origin == f"the package's samples of {', '.join(others)}"
    assert len(texts) == ROWS * len(others)
    assert ("The mother tongue of Danielle Darrieux is French" in texts) == (task != "fact")
    assert any(text.endswith(";") and "CREATE TABLE" in text for text in texts) == (task != "sql")


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        ([{"text": "One. "}, {"text": "Two."}], ["One. ", "Two."]),
        ([{"prompt": "1 + 1 =", "completion": " 2"}], ["1 + 1 = 2"]),
        ([{"text": "x"}] * 99, ["x"] * 3 * ROWS),
    ],
    ids=["text", "prompt", "many"],
)
def test_own_texts(rows, texts, tmp_path):
    file = tmp_path / "kept.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert background_texts("fact", str(file)) == (texts, str(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "is no file"),
        ("kept.docx", "x", "format cannot be read"),
        ("kept.jsonl", "", "no records"),
        (
            "kept.jsonl",
            '{"question": "x"}',
            r"a 'completion', all of them strings; found 'question' \(a string\)",
        ),
        ("kept.jsonl", '{"text": " "}', r"found 'text' \(blank\)"),
        ("kept.jsonl", '{"prompt": "x", "completion": 3}', "records with a 'text'"),
    ],
)
def test_bad_texts_are_refused(name, content, message, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(MolfError, match=message):
        background_texts("fact", str(file))
