import pytest

from cellos.core.documents.wording import given, member, quoted, quoted_char


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", '"plain"'),
        ("", '""'),
        ('say "hi"', r'"say \"hi\""'),
        ("a\\b", r'"a\\b"'),
        ("a\nb\rc\td\0e", r'"a\nb\rc\td\0e"'),
        ("it's", '"it\'s"'),
        ("\x7f", r'"\u{7f}"'),
        ("\x1b[31m", r'"\u{1b}[31m"'),
        ("\u202e", r'"\u{202e}"'),
        ("\ud800", r'"\u{d800}"'),
        ("grün 🐚", '"grün 🐚"'),
    ],
)
def test_strings_are_quoted_on_one_visible_line(value: str, text: str) -> None:
    assert quoted(value) == text


@pytest.mark.parametrize(("char", "text"), [(".", "'.'"), ("'", r"'\''"), ('"', "'\"'"), ("\n", r"'\n'"), ("\xa0", r"'\u{a0}'")])
def test_a_character_stands_in_single_quotes(char: str, text: str) -> None:
    assert quoted_char(char) == text


@pytest.mark.parametrize(
    ("path", "name", "text"),
    [
        ("", "spec", "spec"),
        ("spec.run", "argv", "spec.run.argv"),
        ("labels", "cost-centre", "labels.cost-centre"),
        ("labels", "two words", 'labels["two words"]'),
        ("labels", "a.b", 'labels["a.b"]'),
        ("", "", '[""]'),
        ("spec", "évil\n", r'spec["évil\n"]'),
    ],
)
def test_member_paths_cannot_be_misread(path: str, name: str, text: str) -> None:
    assert member(path, name) == text


def test_long_values_are_cut() -> None:
    assert quoted("x" * 300) == '"' + "x" * 300 + '"'
    assert quoted("x" * 1_000_000) == '"' + "x" * 300 + '"…'
    assert given("x" * 81) == 'the string "' + "x" * 80 + '"…'
    assert member("spec", "x" * 81) == 'spec["' + "x" * 80 + '"…]'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (7, "the integer 7"),
        (1.0, "the number 1.0"),
        ("7", 'the string "7"'),
        ({}, "an object"),
        ([], "a list"),
    ],
)
def test_what_was_given_is_described(value: object, text: str) -> None:
    assert given(value) == text
