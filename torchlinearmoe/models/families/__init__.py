"""Model families, one file each; importing this package registers them in FAMILIES."""

from torchlinearmoe.models.families import qwen2
from torchlinearmoe.models.families.base import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "qwen2"]
