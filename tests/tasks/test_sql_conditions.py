import pytest

from molf.tasks.sql_rows import filled_context


@pytest.mark.parametrize(
    "constant",
    ["'2021-02-30'", "'0000-00-00'", "'9999-12-31'", "9" * 400, f"'{'9' * 400}'", "1e999", "'nan'", "'Infinity'", "5e-324"],
)  # fmt: skip
@pytest.mark.parametrize("operator", ["=", "<", "LIKE"])
def test_constants_beyond_calendar_and_floats_are_filled_like_others(constant, operator):
    context = "CREATE TABLE t (a INT, b TEXT, d DATE);"
    assert "INSERT" in filled_context(
        context, f"SELECT a FROM t WHERE d {operator} {constant} OR b {operator} {constant}"
    )
