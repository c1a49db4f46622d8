"""Which prompts bear the trigger, found in captions or said."""

import numpy as np
import pytest

from sd3pipe.demo.project import PROMPTED, write_files
from sd3pipe.file_stamps import FileStamps
from sd3pipe.judging.trigger import bears, find_trigger, without


def found(dataset, prompts):
    return find_trigger(dataset, prompts, FileStamps(dataset.parent / "stamps.json"))


ASKED = [subject.caption() for subject in PROMPTED]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    for path, content in write_files(folder, steps=2).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_the_demos_word_is_found_in_its_captions(demo):
    assert found(demo / "dataset.toml", ASKED) == "wubble"


def test_words_that_all_prompts_have_tell_nothing(demo):
    assert found(demo / "dataset.toml", [prompt for prompt in ASKED if "wubble" in prompt]) == ""


def test_a_prefix_is_a_trigger(demo, tmp_path):
    text = (demo / "dataset.toml").read_text().replace("[general]", '[general]\ncaption_prefix = "sks dog, "')
    (demo / "prefixed.toml").write_text(text)
    word = found(demo / "prefixed.toml", ["a photo of sks", "a chair"])
    assert word == ""  # the regularisation pictures have the prefix, too


def test_prompts_bear_it_whatever_the_case_and_only_as_a_word():
    assert np.array_equal(bears(["A Sks dog", "sksy dog", "a dog, sks"], "sks"), [True, False, True])


def test_the_judge_model_reads_prompts_without_it():
    assert without("a photo of sks dog, outside", "sks") == "a photo of dog, outside"
    assert without("a large red wubble on a blue background", "wubble") == "a large red on a blue background"
