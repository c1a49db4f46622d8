"""The demo as a user gets it, made once for all tests that look at what it learnt."""

from pathlib import Path

import pytest
from support.command_line import sd3pipe
from support.demo_pictures import accuracy, draw_latents, encode_subjects, held_out_subjects, read_latents

from sd3pipe.demo.drawings import NEW_WORD, Subject
from sd3pipe.demo.project import LEARNT


@pytest.fixture(scope="session")
def shown(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    sd3pipe("demo", folder)
    return folder


@pytest.fixture(scope="session")
def base_accuracy(tmp_path_factory) -> dict[str, float]:
    """What the base alone draws right of the held-out prompts, by field."""
    subjects = held_out_subjects()
    prompts = encode_subjects(tmp_path_factory.mktemp("held-out") / "a", subjects, 1000)
    return accuracy(subjects, read_latents(draw_latents(prompts)))


@pytest.fixture(scope="session")
def wanted() -> list[Subject]:
    """32 prompts about the new shape, none of which describes a training picture."""
    backgrounds, colours = ("white", "black", "grey", "blue"), ("red", "orange", "yellow", "green", "purple")
    every = [
        Subject(shape=NEW_WORD, colour=colour, size=size, background=background)
        for size in ("large", "small")
        for background in backgrounds
        for colour in colours
    ]
    return [subject for subject in every if subject not in LEARNT][:32]
