"""The build backend (PEP 517): setuptools, and CMake and Ninja as wheels where this machine has none that serve.

Fetching and unpacking them takes a tenth of an install.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that stay as they are

#: Tool -> oldest version, as in CMakeLists.txt; Ninja's oldest has the depfiles that nvcc writes.
TOOLS = {"cmake": (3, 24), "ninja": (1, 10)}


def missing_tools() -> list[str]:
    """Requirements for the tools that do not run here, or are too old.

    Asked by running them: the script of a wheel in another environment is on PATH, but its package is hidden from an
    isolated build.
    """
    wanted = []
    for tool, oldest in TOOLS.items():
        try:
            told = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            told = ""
        found = re.search(r"(\d+)\.(\d+)", told)
        if found is None or (int(found[1]), int(found[2])) < oldest:
            wanted.append(f"{tool}>={'.'.join(map(str, oldest))}")
    return wanted


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing_tools()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing_tools()]
