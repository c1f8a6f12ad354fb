"""Names that a format cannot take are escaped, none become one, and each can be had back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multisa.runtime.writers.base import file_name, label_name, line_name, tar_key, unescape_name

ESCAPES = (tar_key, line_name, label_name, file_name)
NAMES = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("%~./#:_ 2F"), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("escape", "name", "expected"),
    [
        (tar_key, "a/b", "a/b"),
        (tar_key, "2024.01/a.b", "2024.01/a%2Eb"),
        (tar_key, "__MACOSX__/a", "%5F%5FMACOSX__/a"),
        (tar_key, "100%", "100%"),
        (tar_key, "a%2Eb", "a%252Eb"),
        (line_name, "a.b c/#d", "a.b c/#d"),
        (line_name, "#a", "%23a"),
        (line_name, " a\n", "%20a%0A"),
        (line_name, "#100%", "%23100%25"),
        (label_name, "dog: small", "dog%3A small"),
        (file_name, "a/b.c", "a%2Fb.c"),
        (file_name, "a%2Fb", "a%252Fb"),
        (file_name, "ü~é", "ü~é"),
        (file_name, "a%~b", "a%25~b"),
    ],
)
def test_names_are_escaped_only_where_they_must_be(escape, name: str, expected: str) -> None:
    assert escape(name) == expected
    assert unescape_name(expected) == name


@pytest.mark.parametrize("escape", ESCAPES)
@given(names=st.lists(NAMES, min_size=2, max_size=2, unique=True))
def test_any_name_can_be_had_back(escape, names: list[str]) -> None:
    first, second = map(escape, names)
    assert first != second
    assert unescape_name(first) == names[0] and unescape_name(second) == names[1]


@given(name=NAMES)
def test_what_is_escaped_suits_the_format(name: str) -> None:
    assert "." not in tar_key(name).rpartition("/")[2]
    assert not tar_key(name).startswith("__")
    line = line_name(name)
    assert line.splitlines() == [line] and line.strip() == line and not line.startswith("#")
    assert ":" not in label_name(name)
    assert "/" not in file_name(name)


def test_names_too_long_for_a_file_stay_apart() -> None:
    long = "ü" * 200
    cut = [file_name(f"{long}/{end}") for end in ("a", "b")]
    assert len(set(cut)) == 2
    assert all(len(f"{name}.png".encode()) <= 255 and name.startswith("üü") for name in cut)
    # The name that a cut one became belongs to it alone.
    assert file_name(cut[0]) != cut[0]
