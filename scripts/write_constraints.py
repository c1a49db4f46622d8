"""Prints constraints.txt: each package that the tests run with, in the version that this environment holds."""

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

OF_A_BUILD = ("cuda-", "nvidia-", "triton", "pytorch-triton")  # what one build of torch brings and another does not
HEADER = """\
# The whole set that the tests ran with, for `make setup` and CI; the package accepts the ranges in pyproject.toml.
# `make pin` writes it from .venv. No builds, hashes or hosts: torch is whichever build of its version the machine has.
"""


def installed_versions(wanted: str) -> dict[str, str]:
    """Returns the version of each package that a requirement brings here, by name, without itself."""
    versions: dict[str, str] = {}
    waiting, seen = [Requirement(wanted)], set()
    while waiting:
        requirement = waiting.pop()
        asked = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if asked in seen:
            continue
        seen.add(asked)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            raise SystemExit(f"{requirement}: is not installed here: run `make setup` first") from None
        versions[asked[0]] = Version(found.version).public
        for line in found.requires or ():
            needed = Requirement(line)
            extras = asked[1] or {""}
            here = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras)
            if here and not needed.name.startswith(OF_A_BUILD):
                waiting.append(needed)
    del versions[canonicalize_name(Requirement(wanted).name)]
    return versions


if __name__ == "__main__":
    print(HEADER, end="")
    for name, version in sorted(installed_versions("sd3pipe[test]").items()):
        print(f"{name}=={version}")
