"""Fixtures of the cache tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """These tests kill processes, not machines: what is written is visible to the next process without fsync."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "caches" / "text"
