"""Where the copies of each expert live: the table, and who fills it."""

from .layer_files import load_placements, save_placements
from .table import Placement

__all__ = ["Placement", "load_placements", "save_placements"]
