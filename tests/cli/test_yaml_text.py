import pytest
import yaml

from molf.cli.parsing import parse_run
from molf.cli.yaml_text import load_yaml
from molf.errors import UsageError

DOUBLED = "a: &a0 [x, x]\n" + "".join(f"b{n}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))
MERGED = "m0: &m0 {x: 1}\n" + "".join(f"m{n + 1}: &m{n + 1} {{<<: [*m{n}, *m{n}]}}\n" for n in range(60))


@pytest.mark.parametrize(
    "text, problem",
    [
        (DOUBLED, "more than 10,000 values"),
        (MERGED, "more than 10,000 values"),
        ("a: &a [1, *a]", "an alias inside of its own anchor"),
        ("a: &a {b: *a}", "an alias inside of its own anchor"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "{a: " * 5000, "nested too deeply"),
        ("a:\n  " + "- " * 5000, "nested too deeply"),
        ("a: 2026-02-31", "day is out of range"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: 0x" + "f" * 5000, "an integer of more than 64 bits"),
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice"),
        ("a: {b: 2, b: 3}", "the key 'b' occurs twice"),
        ("a: [1", "expected"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(tmp_path, text, problem):
    with pytest.raises(yaml.YAMLError, match=problem):
        load_yaml(text)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"c.yaml.* is not valid YAML: .*{problem}"):
        parse_run(["--config", str(tmp_path / "c.yaml")])


def test_a_list_of_a_flag_is_bounded_too():
    doubled = "[&a [1, 1], " + ", ".join(f"&{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]" for n in range(24)) + "]"
    with pytest.raises(UsageError, match="is not a list such as"):
        parse_run(["--ranks", doubled])


def test_aliases_and_merges_mean_what_they_do_in_yaml():
    text = "base: &base {rate: 1, ranks: &r [4, 8]}\nrun: {<<: *base, rate: 2}\nother: *r\n"

    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("") is None
