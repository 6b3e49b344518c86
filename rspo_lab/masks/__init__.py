from rspo_lab.masks.base import Masks
from rspo_lab.masks.designs import DESIGNS
from rspo_lab.masks.published import count

__all__ = ["DESIGNS", "Masks", "count"]
