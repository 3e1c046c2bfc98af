"""Token mixers, one file each; importing this package registers them all in MIXERS.

`base.py` is the contract. The registry is filled from the folder itself, so a new mixer is a new file.
"""

import importlib
import pkgutil

from torchlinearmoe.mixers.base import MIXERS, Mixer

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MIXERS", "Mixer"]
