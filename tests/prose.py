"""The sentences of source files: of docstrings, comments and messages.

`python tests/prose.py FILE-OR-FOLDER …` prints those that are too long, or have private words.
"""

import ast
import functools
import io
import re
import sys
import tokenize
from pathlib import Path

MOST_WORDS = 25
MOST_IN_DOCUMENTS = 30
PRIVATE_WORDS = re.compile(
    r"\b(?:room|told|spread|wire|cargo|halves|what is|that which|cannot be(?=[.,;:]))\b",
    re.IGNORECASE,
)

# Whatever stands in backticks or brackets is one word: a name, an expression, a shape.
_ONE_WORD = re.compile(r"`+[^`]*`+|\[[^\]]*\]|\{[^}]*\}")
_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[^a-z\s])")
# What starts a paragraph of its own: an item of a list, an argument with its meaning, a legend.
_NAMES = r"[`*\"]*\w[\w.`\"]*"
_ITEM = re.compile(rf"\s*(?:[-*]\s|\d+\.\s|{_NAMES}(?:, {_NAMES})*:(?:\s|$)|\S.*\s{{3,}}\S)")
_RULER = re.compile(r"[-=─/*#|\s]{3,}")


def faults(path):
    """Yields a line for each sentence under `path`, a file or folder, that is not plain."""
    sentences_of = {
        ".py": sentences_of_python,
        ".cu": sentences_of_cuda,
        ".cuh": sentences_of_cuda,
        ".md": sentences_of_markdown,
    }
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.suffix not in sentences_of:
            continue
        most = MOST_IN_DOCUMENTS if file.suffix == ".md" else MOST_WORDS
        for line, sentence in sentences_of[file.suffix](file.read_text()):
            private, words = (
                PRIVATE_WORDS.search(_ONE_WORD.sub(" x ", sentence)),
                num_words(sentence),
            )
            if private or words > most:
                why = repr(private[0]) if private else f"{words} words"
                yield f"{file}:{line}: {why}: {sentence}"


def sentences_of_python(text):
    """Yields (line, sentence) for the docstrings, comments and strings of Python source."""
    tree = ast.parse(text)
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in ast.walk(node) if part is not node}
            parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            yield from _sentences(node.lineno, "".join(parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            is_cuda = node.value.startswith("#define")
            found = sentences_of_cuda if is_cuda else functools.partial(_sentences, 0)
            for line, sentence in found(node.value):
                yield node.lineno + line, sentence
    for line, comment in _comments_of_python(text):
        yield from _sentences(line, comment)


def sentences_of_cuda(text):
    """Yields (line, sentence) for the comments of C++ source."""
    found = re.finditer(
        r"/\*.*?\*/|(?:^[ \t]*//[^\n]*\n)+|//[^\n]*", text, re.DOTALL | re.MULTILINE
    )
    for match in found:
        plain = re.sub(r"^[ \t]*(?://+|/\*+|\*/|\*(?!/))|\*/", "", match[0], flags=re.MULTILINE)
        yield from _sentences(text.count("\n", 0, match.start()) + 1, plain)


def sentences_of_markdown(text):
    """Yields (line, sentence) of Markdown: no code, no tables, and only the text of links."""
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731  (lines keep their numbers)
    text = re.sub(r"^ *```.*?^ *```", blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->|<[^>\n]+>", blank, text, flags=re.DOTALL)
    text = re.sub(r"^ *\|.*$|^#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", text):
        yield from _sentences(line, paragraph)
        line += paragraph.count("\n")


def num_words(sentence):
    """How many words a sentence has; what stands in backticks or brackets is one."""
    return sum(any(c.isalnum() for c in word) for word in _ONE_WORD.sub(" x ", sentence).split())


def _comments_of_python(text):
    """Yields (line, text): comments on lines of their own that follow one another are one."""
    last, first, block = None, 0, []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        alone = not token.line[:column].strip()
        if block and not (alone and last == (line - 1, column)):
            yield first, "\n".join(block)
            block = []
        first = first if block else line
        block.append(token.string.removeprefix("#").removeprefix(" "))
        last = (line, column) if alone else None
    if block:
        yield first, "\n".join(block)


def _sentences(line, text):
    for paragraph in _paragraphs(text):
        flat = " ".join(paragraph.split())
        for sentence in _END.split(_RULER.sub(" ", flat)):
            if sentence.strip():
                yield line, sentence.strip()


def _paragraphs(text):
    paragraph = []
    for row in text.splitlines():
        if paragraph and (not row.strip() or _ITEM.match(row)):
            yield "\n".join(paragraph)
            paragraph = []
        paragraph.append(row)
    yield "\n".join(paragraph)


if __name__ == "__main__":
    found = [fault for path in sys.argv[1:] for fault in faults(Path(path))]
    print("\n".join(found))
    sys.exit(bool(found))
