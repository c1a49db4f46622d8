"""One key of a parameter file is changed, and every other byte stays."""

import tomllib

import pytest

from sd3pipe.errors import ParameterError
from sd3pipe.params.resolve import spellings
from sd3pipe.params.stage_edit import edited_stage_file
from sd3pipe.params.stage_file import render_stage_file
from sd3pipe.params.train import TrainParams

TEXT = """\
# my run
network_dim = 16   # the rank
[speed]
train_batch_size = 2
network_args = [
  "conv_dim=4",  # why
]
# seed = 42

[subsets.cats]
num_repeats = 3
"""


def edited(changes, text=TEXT):
    return edited_stage_file(text, changes, spellings(TrainParams), "train.toml")


def test_a_value_changes_and_its_comment_stays():
    assert edited({"network_dim": 32}) == TEXT.replace("network_dim = 16 ", "network_dim = 32 ")


def test_a_key_below_a_heading_changes_where_it_stands():
    assert edited({"train_batch_size": 4}) == TEXT.replace("size = 2", "size = 4")


def test_a_commented_default_makes_room_for_a_value():
    assert edited({"seed": 7}) == TEXT.replace("# seed = 42", "seed = 7")


def test_a_new_key_stands_above_the_first_heading():
    text = edited({"learning_rate": 1e-3})
    assert text.replace("learning_rate = 0.001\n", "") == TEXT
    assert tomllib.loads(text)["learning_rate"] == 1e-3


def test_back_to_the_default_is_a_comment():
    assert edited({"network_dim": None}) == TEXT.replace("network_dim", "# network_dim")
    assert edited({"optimizer_type": None}) == TEXT


def test_a_value_of_several_lines_is_replaced_whole():
    text = edited({"network_args": ["conv_dim=8"]})
    assert tomllib.loads(text)["speed"]["network_args"] == ["conv_dim=8"] and "why" not in text


def test_a_table_of_a_subset_is_left_alone():
    assert tomllib.loads(edited({"caption_dropout_rate": None, "seed": 1}))["subsets"] == {"cats": {"num_repeats": 3}}


def test_what_cannot_be_edited_by_lines_is_refused():
    with pytest.raises(ParameterError, match="only an editor"):
        edited({"seed": 1}, text="a = {x = 1}\nspeed = {seed = 2}\n")


def test_every_option_of_a_written_file_can_be_set_and_reset():
    text = render_stage_file(TrainParams, "train")
    for name, value in {"network_dim": 3, "seed": 5, "base_dtype": "nf4", "optimizer_args": ["eps=1e-6"]}.items():
        changed = edited({name: value}, text)
        assert tomllib.loads(changed)[name] == value
        assert tomllib.loads(edited({name: None}, changed)).get(name) is None
