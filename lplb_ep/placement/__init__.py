"""Where the copies of each expert are: the table, and its builders."""

from .layer_files import load_placements, save_placements
from .table import Placement

__all__ = ["Placement", "load_placements", "save_placements"]
