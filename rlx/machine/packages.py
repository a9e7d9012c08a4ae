"""Says which Python packages are installed: a mere folder of a package's name is none."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType


def is_installed(name: str) -> bool:
    """Says whether there is code to import under this top-level name."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def import_package(name: str) -> ModuleType:
    """Imports a top-level module; ImportError also where only a folder has its name."""
    if not is_installed(name):
        raise ImportError(f"{name} is not installed")
    return importlib.import_module(name)
