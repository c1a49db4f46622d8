"""The rules that training takes are spread out into options, and come back as they were."""

import dataclasses
from typing import get_type_hints

import pytest

from sd3pipe.errors import ParameterError
from sd3pipe.params.fields import Params, group, option, option_extra
from sd3pipe.params.train import TrainParams
from sd3pipe.rules.declaring import rule
from sd3pipe.rules.flow import LossRules

PATHS = {"model": "m", "text": "t", "latents": "l", "out": "o"}
GROUPS = {name: kind for name, kind in get_type_hints(TrainParams).items() if dataclasses.is_dataclass(kind)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warmth:
    degrees: float = rule(20.0, "How warm.", role="recipe", ge=0)
    scale: str = rule("celsius", "In which degrees.", parse=str.lower)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thermometer:
    scale: str = rule("celsius", "In which degrees.", parse=str.lower)


class Weather(Params):
    place: str = option(..., "Where.")
    warmth: Warmth = group("Warmth", role="identity")
    thermometer: Thermometer = group("Elsewhere")
    wind: int = option(0, "How windy.")


def test_the_options_of_a_group_stand_in_its_place_and_shared_ones_once():
    assert list(Weather.model_fields) == ["place", "degrees", "scale", "wind"]
    extras = {name: option_extra(field) for name, field in Weather.model_fields.items()}
    assert (extras["degrees"]["role"], extras["scale"]["role"]) == ("recipe", "identity")
    assert {extras[name]["panel"] for name in ("degrees", "scale")} == {"Warmth"}


def test_who_inherits_a_group_has_its_options_and_its_rule():
    class Storm(Weather):
        gusts: int = option(0, "How many.")

    assert list(Storm.model_fields) == ["place", "degrees", "scale", "wind", "gusts"]
    assert Storm(place="here", degrees=3.0).warmth == Warmth(degrees=3.0)


def test_values_are_checked_as_options_and_reach_every_rule_that_has_them():
    weather = Weather(place="here", scale="KELVIN", degrees=3.0)
    assert weather.warmth == Warmth(degrees=3.0, scale="kelvin")
    assert weather.thermometer == Thermometer(scale="kelvin")
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Weather(place="here", degrees=-1.0)


@pytest.mark.parametrize("name", GROUPS)
def test_defaults_are_the_rules_own(name):
    assert getattr(TrainParams(**PATHS), name) == GROUPS[name]()


def test_what_the_loss_cannot_be_is_refused_when_it_is_made():
    assert TrainParams(**PATHS, huber_c=0.3, loss_form="x0").loss == LossRules(huber_c=0.3, loss_form="x0")
    with pytest.raises(ParameterError, match="choose loss_form = x0"):
        _ = TrainParams(**PATHS, weighting_scheme="sigma_sqrt").loss
