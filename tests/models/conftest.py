"""Fixtures of the models' tests."""

import pytest
from support.tiny_parts import tiny_parts


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()
