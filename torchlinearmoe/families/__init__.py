"""Model families, one file each; importing this package registers them in FAMILIES."""

import importlib
import pkgutil

from torchlinearmoe.families.base import FAMILIES, Family

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Family"]
