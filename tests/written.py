"""Parts of documents that are written from the code; `test_project.py` holds them against it.

`python tests/written.py` writes them (`make docs`).
"""

import sys

from layers import ROOT, modules_table

sys.path.insert(0, str(ROOT))  # a checkout that is not installed

from lplb_ep.settings import settings_table

ARCHITECTURE, README = ROOT / "docs" / "architecture.md", ROOT / "README.md"
START, END = "<!-- modules: written by `make docs` -->\n", "<!-- end of modules -->\n"
FIRST_ROW = settings_table().partition("\n")[0]


def with_modules(text):
    """The text of docs/architecture.md with the table of modules as it should be."""
    before, rest = text.split(START)
    return before + START + modules_table() + END + rest.split(END)[1]


def with_settings(text):
    """The text of README.md with the table of settings as it should be."""
    before, rest = text.split(FIRST_ROW)
    return before + settings_table() + rest[rest.index("\n\n") + 1 :]


if __name__ == "__main__":
    ARCHITECTURE.write_text(with_modules(ARCHITECTURE.read_text()))
    README.write_text(with_settings(README.read_text()))
