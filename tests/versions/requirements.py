"""What pyproject.toml asks for, read without pip."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
APART = ("vllm",)  # extras that have an environment of their own: others' bounds exclude them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def name_of(requirement: str) -> str:
    """A requirement's or a pin's package, as indexes spell it:
    "Prometheus_Client>=0.20" is prometheus-client.
    """
    found = _NAME.match(requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def required(*extras: str, build: bool = False) -> list[str]:
    """The package's requirements, those of some extras, and on request those of its build."""
    text = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = list(text["project"]["dependencies"])
    for extra in extras:
        found += text["project"]["optional-dependencies"][extra]
    return found + (text["build-system"]["requires"] if build else [])


def all_required() -> list[str]:
    """Everything that pyproject.toml names for one environment."""
    text = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [extra for extra in text["project"]["optional-dependencies"] if extra not in APART]
    return required(*extras, build=True)


def pinned() -> dict[str, str]:
    """Package -> version, of constraints.txt."""
    lines = CONSTRAINTS.read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {name: version for name, _, version in pins}


def lowest(requirement: str) -> str:
    """The oldest release that "name>=version" allows, as "name==version"."""
    name, bound, version = requirement.partition(">=")
    assert bound and "," not in version, f"{requirement}: must be name>=version"
    return f"{name}=={version}"
