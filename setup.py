"""Packaging of megatron_sps2: the engine, and checkpoints_tools beside it.

Asks for the lowest versions that fit; requirements.txt holds the exact ones that were tried.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# requirements.txt pins the torch that was tried; a user with a newer or a CUDA build keeps it.
LOWER_BOUNDS = {"torch": "torch>=2.11"}


def requirements(name: str) -> list[str]:
    """The requirement lines of a file, without comments and `-r` lines, `LOWER_BOUNDS` applied."""
    lines = [line.split("#")[0].strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if line and not line.startswith("-")]
    return [LOWER_BOUNDS.get(re.split(r"[=<>!~ ;\[]", line)[0], line) for line in wanted]


def version() -> str:
    """`__version__` of the package, read without importing it."""
    text = (HERE / "megatron_sps2" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found else "0.1.0"


setup(
    name="megatron_sps2",
    version=version(),
    description="Long-prompt inference for Megatron models over sequence-parallel and tensor-parallel ranks",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_sps2*", "checkpoints_tools*"]),
    package_data={"megatron_sps2.server": ["page.html"]},
    install_requires=requirements("requirements.txt"),
    extras_require={"test": requirements("requirements-test.txt")},
    entry_points={"console_scripts": ["sps2 = megatron_sps2.cli.main:main"]},
)
