"""constraints.txt names one version of everything that the tests run with, and where nothing comes from."""

import re
import runpy
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version
from support.documented import ROOT

PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"
)


def test_each_pin_is_a_name_and_a_version():
    for name, pinned in PINS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name) and str(Version(pinned)) == pinned and not Version(pinned).local


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring packages that Linux has not")
def test_every_package_that_the_tests_bring_is_pinned():
    """Of another version here nothing is said: whoever upgrades one runs the tests, then `make pin`."""
    script = runpy.run_path(str(ROOT / "scripts" / "write_constraints.py"))
    try:
        brought = script["installed_versions"]("sd3pipe[test]")
    except SystemExit as missing:
        pytest.skip(str(missing))
    assert brought.keys() <= PINS.keys()
    assert Version(version("torch")).public == PINS["torch"]
