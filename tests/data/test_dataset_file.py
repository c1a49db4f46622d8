"""Dataset files: sd-scripts' inheritance and defaults, and one line per problem with file, table and key."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.dataset_keys import Keys
from sd3pipe.errors import ParameterError


def load(tmp_path, text, name="d.toml"):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return load_dataset(file)


def problems(tmp_path, text, name="d.toml"):
    with pytest.raises(ParameterError) as caught:
        load(tmp_path, text, name)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


SMALL = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'pics'\n"

INHERITED = """
[general]
num_repeats = 2
flip_aug = true
caption_extension = ".tag"
resolution = 768
[[datasets]]
num_repeats = 3
enable_bucket = true
[[datasets.subsets]]
image_dir = "one"
num_repeats = 4
flip_aug = false
[[datasets.subsets]]
image_dir = "two"
[[datasets]]
resolution = [512, 640]
[[datasets.subsets]]
image_dir = "one"
is_reg = true
"""


def test_a_value_comes_from_subset_then_dataset_then_general(tmp_path):
    one, two, three = load(tmp_path, INHERITED).subsets
    assert [subset.num_repeats for subset in (one, two, three)] == [4, 3, 2]
    assert [subset.flip_aug for subset in (one, two, three)] == [False, True, True]
    assert {subset.caption_extensions for subset in (one, two, three)} == {(".tag",)}
    assert (one.bucketing.width, two.bucketing.enable_bucket) == (768, True)
    assert (three.bucketing.width, three.bucketing.height, three.bucketing.enable_bucket) == (512, 640, False)
    assert [subset.dataset for subset in (one, two, three)] == [0, 0, 1]


def test_what_the_file_leaves_out_has_sd_scripts_defaults(tmp_path):
    subset = load(tmp_path, SMALL).subsets[0]
    assert subset.caption_extensions == (".txt", ".caption")
    assert (subset.num_repeats, subset.is_reg, subset.class_tokens) == (1, False, None)
    assert subset.captions.caption_separator == ","
    assert (subset.bucketing.min_bucket_reso, subset.bucketing.max_bucket_reso) == (256, 1024)
    assert subset.bucketing.bucket_reso_steps == 64 and not subset.bucketing.enable_bucket
    assert subset.caption_dropout_rate == 0 and subset.validation_split == 0


def test_subsets_are_named_after_their_folders(tmp_path):
    assert [subset.name for subset in load(tmp_path, INHERITED).subsets] == ["one", "two", "one-2"]
    text = (
        SMALL + "[[datasets.subsets]]\nimage_dir = 'b/pics/'\n[[datasets.subsets]]\nimage_dir = 'x'\nname = 'pics-2'\n"
    )
    assert [subset.name for subset in load(tmp_path, text).subsets] == ["pics", "pics-3", "pics-2"]


def test_a_folder_given_twice_in_a_dataset_counts_once_unless_named(tmp_path):
    twice = load(tmp_path, SMALL + "[[datasets.subsets]]\nimage_dir = 'pics'\n")
    assert len(twice.subsets) == 1 and "pics" in twice.remarks[0]
    named = load(tmp_path, SMALL + "[[datasets.subsets]]\nimage_dir = 'pics'\nname = 'again'\n")
    assert [subset.name for subset in named.subsets] == ["pics", "again"]


def test_json_says_the_same_as_toml(tmp_path):
    toml = load(tmp_path, SMALL)
    content = {
        "general": None,
        "datasets": [{"resolution": 512, "subsets": [{"image_dir": "pics", "keep_tokens": None}]}],
    }
    assert load(tmp_path, json.dumps(content), "d.json").subsets == toml.subsets


def test_paths_are_taken_from_the_file_then_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config" / "d.toml"
    file.write_text(SMALL, encoding="utf-8")
    assert load_dataset(file).subsets[0].image_dir.resolve() == tmp_path / "pics"
    (tmp_path / "config" / "pics").mkdir()
    assert load_dataset(file).subsets[0].image_dir == tmp_path / "config" / "pics"


def test_every_problem_is_told_at_once_with_table_key_and_nearest_key(tmp_path):
    lines = problems(
        tmp_path,
        "[general]\nshuffle_captions = true\nflip_aug = 1\n[[datasets]]\nresolution = 1000\nis_reg = true\n"
        "[[datasets.subsets]]\nnum_repeats = '10'\nimage_dir = 'x'\n[[datasets.subsets]]\ncolor_aug = true\n"
        "[extra]\na = 1\n",
    )
    told = "\n".join(lines)
    assert all(line.startswith(str(tmp_path / "d.toml")) for line in lines)
    assert "[general]: shuffle_captions: unknown key (did you mean shuffle_caption?)" in told
    assert "[general]: flip_aug = 1: must be a valid boolean" in told
    assert "[[datasets]] 1: is_reg: cannot stand here: it belongs in [[datasets.subsets]]" in told
    assert "[[datasets]] 1: resolution = [1000, 1000]: without enable_bucket" in told
    assert "[[datasets]] 1 [[datasets.subsets]] 1: num_repeats = '10': must be a valid integer" in told
    assert "[[datasets]] 1 [[datasets.subsets]] 2: color_aug" in told
    assert "[[datasets.subsets]] 2: image_dir: is missing" in told
    assert "only general and datasets stand here" in told
    assert len(lines) == 8


@pytest.mark.parametrize(
    "line, reason",
    [
        ("color_aug = true", "cache of encoded pictures cannot"),
        ("token_warmup_step = 100", "captions are encoded before training"),
        ("network_multiplier = 0.5", "does not use it"),
        ("custom_attributes = {weight = 2}", "nothing reads this"),
        ("masked_loss = true", "stages/train.toml"),
        ("resize_interpolation = 'sinc'", "must be 'lanczos'"),
        ("caption_dropout_rate = 1.5", "less than or equal to 1"),
        ("num_repeats = 0", "greater than or equal to 1"),
        ("validation_split = nan", "must be a finite number"),
        ("alpha_background = 'pink'", "white, black, grey"),
        ("face_crop_aug_range = [2.0, 1.0]", "rising"),
        ("caption_extension = 'txt'", "has no dot: did you mean '.txt'?"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(tmp_path, line, reason):
    key = line.split(" ", 1)[0]
    place = SMALL.replace("resolution = 512", f"resolution = 512\n{line}")
    (told,) = problems(tmp_path, place)
    assert key in told and reason in told


@pytest.mark.parametrize(
    "line", ["color_aug = false", "token_warmup_step = 0", "network_multiplier = 1.0", "network_multiplier = 1"]
)
def test_keys_without_effect_are_taken_at_their_neutral_value(tmp_path, line):
    with_it = load(tmp_path, SMALL.replace("resolution = 512", f"resolution = 512\n{line}"))
    assert with_it.subsets == load(tmp_path, SMALL).subsets


def test_keys_that_act_elsewhere_are_told(tmp_path):
    text = SMALL.replace("resolution = 512", "resolution = 512\nbatch_size = 4\ncache_info = true")
    told = "\n".join(load(tmp_path, text).remarks)
    assert "train_batch_size = 4" in told and "captions are remembered anyway" in told


def test_bucket_limits_are_adjusted_and_checked_as_in_sd_scripts(tmp_path):
    text = SMALL.replace("512", "512\nenable_bucket = true\nmin_bucket_reso = 300\nmax_bucket_reso = 1000")
    dataset = load(tmp_path, text)
    bucketing = dataset.subsets[0].bucketing
    assert (bucketing.min_bucket_reso, bucketing.max_bucket_reso) == (256, 1024)
    assert len(dataset.remarks) == 2
    bad = SMALL.replace(
        "512", "512\nenable_bucket = true\nmin_bucket_reso = 640\nmax_bucket_reso = 448\nbucket_reso_steps = 64"
    )
    assert len(problems(tmp_path, bad)) == 2
    (odd,) = problems(tmp_path, SMALL.replace("512", "512\nenable_bucket = true\nbucket_reso_steps = 24"))
    assert "multiple of 16" in odd
    (unset,) = problems(tmp_path, SMALL.replace("512", "128\nenable_bucket = true"))
    assert "min_bucket_reso = 256 (the default): must be at least" in unset


def test_the_weight_of_regularisation_is_left_to_train_unless_it_is_given(tmp_path):
    assert load(tmp_path, SMALL).subsets[0].weighting()["prior_loss_weight"] is None
    assert load(tmp_path, SMALL + "prior_loss_weight = 0.5\n").subsets[0].weighting()["prior_loss_weight"] == 0.5


def test_preservation_goes_to_the_weighting_only(tmp_path):
    text = SMALL + "custom_attributes = {diff_output_preservation = true}\n"
    assert load(tmp_path, text).subsets[0].weighting()["diff_output_preservation"] is True


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("d.toml", b"a = [", "not valid TOML"),
        ("d.toml", b"\xff\xfe", "UTF-8"),
        ("d.json", b"[1]", "table"),
        ("d.json", b"{", "not valid JSON"),
        ("d.json", b"\xff", "not valid JSON"),
        ("d.toml", b"", "[[datasets]]"),
        ("d.toml", b"datasets = 3", "[[datasets]]"),
        ("d.toml", b"[[datasets]]\nresolution = 512", "[[datasets.subsets]]"),
        ("d.toml", b"[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'", "resolution: is missing"),
        ("d.toml", b"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir=''", "image_dir: is missing"),
        ("d.toml", b"[[datasets]]\nresolution = 512\n[datasets.subsets]", "in double brackets, not [datasets.subsets]"),
    ],
)
def test_files_that_are_no_dataset_file_say_why(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ParameterError, match=r".*") as caught:
        load_dataset(tmp_path / name)
    assert told in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_folder_whose_name_is_not_utf8_may_stand_in_json(tmp_path):
    content = b'{"datasets": [{"resolution": 512, "subsets": [{"image_dir": "caf\xe9"}]}]}'
    (tmp_path / "d.json").write_bytes(content)
    assert load_dataset(tmp_path / "d.json").subsets[0].image_dir == tmp_path / os.fsdecode(b"caf\xe9")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ParameterError, match="no such file"):
        load_dataset(tmp_path / "none.toml")


VALUES = st.one_of(
    st.booleans(), st.integers(-5, 2048), st.floats(-1, 2), st.text(max_size=5), st.none(),
    st.lists(st.integers(0, 2000), max_size=3), st.sampled_from(["lanczos", "area", ",", "pics", ".txt"]),
    st.dictionaries(st.text(max_size=3), st.booleans(), max_size=1),
)  # fmt: skip
NAMES = st.one_of(st.sampled_from(sorted(Keys.model_fields)), st.text(max_size=6))
TABLES = st.dictionaries(NAMES, VALUES, max_size=4)
DATASETS = st.lists(
    st.builds(
        lambda table, subsets, size: {
            **table,
            "resolution": size,
            "subsets": [{"image_dir": "p", **s} for s in subsets],
        },
        TABLES,
        st.lists(TABLES, max_size=2),
        st.sampled_from([512, 64, [512, 768], "x"]),
    ),
    max_size=2,
)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(general=TABLES, datasets=DATASETS)
def test_any_file_loads_to_the_same_thing_twice_or_names_file_and_key(tmp_path_factory, general, datasets):
    file = tmp_path_factory.mktemp("any") / "d.json"
    file.write_text(json.dumps({"general": general, "datasets": datasets}), encoding="utf-8")
    try:
        first = load_dataset(file)
    except ParameterError as error:
        lines = str(error).splitlines()
        assert lines and all(line.startswith(f"{file}: ") and line.count(": ") >= 2 for line in lines)
        assert all(line.isprintable() for line in lines)
        return
    assert first == load_dataset(file)
    assert len({subset.name for subset in first.subsets}) == len(first.subsets)
    assert all(subset.bucketing.width >= 16 for subset in first.subsets)
    assert os.fspath(first.path) == os.fspath(file)
