"""The option names of every command are frozen in options.txt, so that a new knob is a decision."""

from pathlib import Path

from sd3pipe.cli import COMMANDS
from sd3pipe.params.command_line import load_model, load_stage_models
from sd3pipe.params.fields import option_extra
from sd3pipe.params.resolve import option_name
from sd3pipe.params.sd_scripts import OPTIONS

LIST = Path(__file__).with_name("options.txt")


def current_names() -> list[str]:
    """Returns 'command --option' for every command."""
    return [
        f"{command} {name.upper() if option_extra(field)['positional'] else option_name(name)}"
        for command in COMMANDS
        for name, field in load_model(command).model_fields.items()
    ]


def test_option_names_are_the_frozen_ones():
    frozen = LIST.read_text(encoding="utf-8").splitlines()
    current = current_names()
    added, gone = sorted(set(current) - set(frozen)), sorted(set(frozen) - set(current))
    assert not added and not gone, f"decide, then write them to {LIST.name}: added {added}, gone {gone}"


def test_every_option_has_help_that_ends_a_sentence():
    for command in COMMANDS:
        for name, field in load_model(command).model_fields.items():
            assert field.description and field.description.endswith("."), f"{command} {name}"


def test_no_option_is_both_taken_and_refused():
    for stage, model in load_stage_models().items():
        refused = {
            name for name in model.model_fields if name in OPTIONS and OPTIONS[name].fate not in ("acts", "read")
        }
        assert refused <= {"resume"}, stage  # which takes our own checkpoints, not sd-scripts' states


def test_aliases_are_unique_within_a_command():
    for command in COMMANDS:
        model = load_model(command)
        spellings = [*model.model_fields]
        spellings += [alias for field in model.model_fields.values() for alias in option_extra(field)["aliases"]]
        assert len(spellings) == len(set(spellings)), command
