"""Where the copies of each expert live: the table, and who fills it."""

from .table import Placement, load_placements, save_placements

__all__ = ["Placement", "load_placements", "save_placements"]
