"""docs/evening.md: each of its commands runs, and each of its patches does what the page says of it.

A patch is applied to a copy of the files that it may change, and the plane is imported from there.
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from plane import panels
from plane.__main__ import PICTURED, main
from plane.method import SIGMAS, Setting, evaluate, train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "evening.md").read_text()
COMMANDS = re.findall(r"^    \.venv/bin/python -m plane (.+)$", PAGE, re.MULTILINE)
PATCHES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "forks").glob("*/*.patch") if named(file))
