"""The table of stages agrees with the option sets, which fill the same places from project.toml."""

import pytest

from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import alternatives, option_extra
from sd3pipe.stages import HUB_KEYS, REQUIRED_KEYS, STAGES, command_words, paths_of, stages_of

ALL = {path.key.partition("/")[0]: f"x/{path.key.partition('/')[0]}" for stage in STAGES for path in stage.paths}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_place_is_an_option_of_the_stage(stage):
    fields = load_stage_models()[stage.module].model_fields
    for path in (path for path in stage.paths if path.option):
        assert option_extra(fields[path.option])["role"] == "path"
        assert option_extra(fields[path.option])["paths_key"] in (path.key, None)


def test_a_project_with_everything_has_every_place():
    assert stages_of(ALL) == STAGES
    assert [tuple(paths_of(stage, ALL)) for stage in STAGES] == [stage.paths for stage in STAGES]


def test_without_prompts_nothing_names_their_cache():
    paths = {key: f"-{key}" for key in REQUIRED_KEYS}
    words = [word for stage in stages_of(paths) for word in command_words(stage, paths)]
    assert "--prompts" not in words and "--sample-prompts" not in words


def test_no_path_is_taken_for_an_option():
    paths = {key: f"-{key}" for key in REQUIRED_KEYS}
    assert command_words(stages_of(paths)[-1], paths) == [
        "export", "--adapter", "./-run", "--model", "./-model", "--out", "./-export",
    ]  # fmt: skip


def test_what_may_be_a_hub_id_is_what_options_take_as_text():
    as_text = {
        option_extra(field)["paths_key"]
        for model in load_stage_models().values()
        for field in model.model_fields.values()
        if option_extra(field)["role"] == "path" and str in alternatives(field.annotation)
    }
    assert as_text - {None} == set(HUB_KEYS)
