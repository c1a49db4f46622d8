"""What an operation does to the tags of a caption, and what it leaves alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd3pipe.studio.tags import OPERATIONS, edited


@pytest.mark.parametrize(
    "caption, operation, tag, other, after",
    [
        ("cat, sofa", "add", "night", "", "cat, sofa, night"),
        ("cat, sofa", "add", "CAT", "", "cat, sofa"),
        ("", "add", "cat", "", "cat"),
        ("cat, sofa, Cat", "remove", "cat", "", "sofa"),
        ("cat", "remove", "cat", "", ""),
        ("cat, sofa", "replace", "cat", "dog", "dog, sofa"),
        ("cat, dog", "replace", "cat", "dog", "dog"),
        ("cat, sofa", "replace", "cat", "", "sofa"),
        ("a cat on a sofa", "replace", "cat", "dog", "a cat on a sofa"),
        ("cat, sofa, night", "front", "night", "", "night, cat, sofa"),
        ("cat, sofa", "front", "night", "", "cat, sofa"),
        ("cat, sofa, Cat ,sofa", "dedupe", "", "", "cat, sofa"),
        ("cat, sofa\ndog", "add", "night", "", "cat, sofa, night\ndog, night"),
        ("cat,sofa  ", "remove", "dog", "", "cat,sofa  "),  # untouched to the blank
    ],
)
def test_operation(caption, operation, tag, other, after):
    assert edited(caption, operation, tag, other) == after


def test_another_separator_is_kept():
    assert edited("cat; sofa, red", "add", "night", separator=";") == "cat; sofa, red; night"


@given(st.text("ab, \n", max_size=20), st.sampled_from(sorted(OPERATIONS)), st.sampled_from("abx"))
def test_doing_it_twice_is_doing_it_once(caption, operation, tag):
    once = edited(caption, operation, tag, "y")
    assert edited(once, operation, tag, "y") == once
