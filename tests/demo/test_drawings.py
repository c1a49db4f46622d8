"""Drawings and captions: made by seed alone, inside the picture, said in words."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd3pipe.demo.drawings import NEW_WORD, OUTLINES, WORDINGS, Subject, all_subjects, draw
from sd3pipe.demo.project import HELD_OUT, LEARNT, PROMPTED, known_subjects, picture_files, project_texts

BLOBS = Path(__file__).resolve().parents[2] / "scripts" / "demo_blobs.py"
RED_RING = Subject(shape="ring", colour="red", size="small", background="grey")


def test_a_seed_gives_the_same_drawing():
    first, again, other = (
        draw(RED_RING, height=64, width=96, generator=np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (64, 96, 3)
    assert (first == again).all()
    assert (first != other).any()


def test_captions_say_all_four_things():
    for wording in range(len(WORDINGS)):
        caption = RED_RING.caption(wording)
        assert all(word in caption for word in ("ring", "red", "small", "grey"))


def test_no_subject_has_the_colour_of_its_background_and_none_comes_twice():
    subjects = all_subjects()
    assert len(set(subjects)) == len(subjects) == len(OUTLINES) * 2 * 8 * 8
    assert all(subject.colour != subject.background for subject in subjects)


@pytest.mark.parametrize("shape", [*OUTLINES, NEW_WORD])
def test_large_shapes_stay_inside_the_picture(shape):
    generator = np.random.default_rng(3)
    subject = Subject(shape=shape, colour="black", size="large", background="white")
    for _ in range(20):
        picture = draw(subject, height=64, width=64, generator=generator)
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edge.min(axis=1) < 128).mean() < 0.02  # a diamond is a little taller than wide: its tip may touch


def test_blobs_show_two_colours():
    draw_blob = runpy.run_path(str(BLOBS))["draw_blob"]
    generator = np.random.default_rng(4)
    for _ in range(20):
        assert draw_blob(height=64, width=64, generator=generator).std(axis=(0, 1)).max() > 5


def test_the_demo_asks_for_what_it_does_not_show():
    assert not set(LEARNT) & set(PROMPTED)
    assert len({*LEARNT, *PROMPTED, *HELD_OUT}) == len(LEARNT) + len(PROMPTED) + len(HELD_OUT)
    assert len(LEARNT) == 12
    assert {subject.shape for subject in LEARNT} == {NEW_WORD}


@pytest.mark.long
def test_demo_pictures_have_captions_and_several_sizes():
    files = picture_files()
    new = [name for name in files if name.startswith("pictures/") and name.endswith(".png")]
    assert len(new) == len(LEARNT)
    assert all(NEW_WORD in files[name.replace(".png", ".txt")].decode() for name in new)
    assert len({Image.open(io.BytesIO(files[name])).size for name in new}) >= 3
    assert picture_files() == files


@pytest.mark.long
def test_known_shapes_stand_beside_the_new_one_and_are_not_what_is_prompted():
    known = known_subjects()
    assert {subject.shape for subject in known} == set(OUTLINES)
    assert not set(known) & {*PROMPTED, *LEARNT}
    files = picture_files()
    captions = [files[name].decode() for name in files if name.startswith("regularisation/") and name.endswith(".txt")]
    assert len(captions) == len(known)
    assert not any(NEW_WORD in caption for caption in captions)


def test_demo_prompts_are_lines_of_a_prompt_file():
    lines = project_texts(steps=10)["sample_prompts.txt"].splitlines()
    assert len(lines) == len(PROMPTED)
    assert all("--w 64 --h 64" in line for line in lines)
