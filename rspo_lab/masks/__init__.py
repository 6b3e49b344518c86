from rspo_lab.masks.designs import DESIGNS, Masks, count

__all__ = ["DESIGNS", "Masks", "count"]
