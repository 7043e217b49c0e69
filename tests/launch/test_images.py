"""The images' locked environments are what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
EXTRA = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}


@pytest.mark.parametrize("kind", EXTRA)
def test_lock(kind):
    text = (ROOT / f"launch/images/{kind}.lock.txt").read_text()
    assert "://" not in text
    entries = re.findall(
        r"^([A-Za-z0-9._-]+)==(\S+)([^\n]*(?:\n    --hash.*)+)", text, re.M
    )
    assert len(entries) == len(re.findall(r"^[A-Za-z0-9]", text, re.M))
    locked = {canonicalize_name(name): Version(version) for name, version, _ in entries}
    assert all("--hash=sha256:" in rest for _, _, rest in entries)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = [
        *project["dependencies"],
        *project["optional-dependencies"]["data"],
        EXTRA[kind],
    ]
    for text in expected:
        requirement = Requirement(text)
        version = locked.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not locked"
        assert requirement.specifier.contains(version), (
            f"{requirement}: {version} is locked"
        )
