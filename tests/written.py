"""Parts of documents that are written from the code; `test_project.py` holds them against it.

`python tests/written.py` writes them (`make docs`).
"""

import sys

from layers import ROOT, modules_table

sys.path.insert(0, str(ROOT))  # a checkout that is not installed

from lplb_ep.settings import settings_table

ARCHITECTURE, SETTINGS = ROOT / "docs" / "architecture.md", ROOT / "docs" / "settings.md"
START, END = "<!-- modules: written by `make docs` -->\n", "<!-- end of modules -->\n"
ABOUT_SETTINGS = """# Settings

Settings change how batches are balanced, with no change to the program. Every setting is an
environment variable, read when a buffer is made. An unknown `LPLB_EP…` variable is an error.
Settings that decide how batches are planned must be the same on all ranks, which is checked then.

"""


def with_modules(text):
    """The text of docs/architecture.md with the table of modules as it should be."""
    before, rest = text.split(START)
    return before + START + modules_table() + END + rest.split(END)[1]


def settings():
    """The text of docs/settings.md."""
    return ABOUT_SETTINGS + settings_table()


if __name__ == "__main__":
    ARCHITECTURE.write_text(with_modules(ARCHITECTURE.read_text()))
    SETTINGS.write_text(settings())
