import sys
from pathlib import Path

# The ranks' processes import by name: `ranks` and `oracle` from here, the test files from cpu/.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "cpu")]
