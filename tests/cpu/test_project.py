"""The project's own rules: layers, light import, settings in one place, packaging, README."""

import ast
import functools
import inspect
import itertools
import math
import re
import subprocess
import sys

import pytest
from layers import LAYERS, PACKAGE, ROOT, path_of
from prose import (
    faults,
    num_words,
    sentences_of_cuda,
    sentences_of_markdown,
    sentences_of_python,
)
from written import ARCHITECTURE, SETTINGS, settings, with_modules

import lplb_ep
from lplb_ep.gpu.jit import KERNELS
from lplb_ep.settings import COUNTS, SOLVERS, Settings

# A newcomer reads a module or a kernel's source in one go. A longer one is here with its reason.
LONG = {"abi.cuh": "it is generated"}
# Modules outside deepep/ and embedded/ that name `deep_ep`, and what for.
NAMES_DEEP_EP = {
    "settings": "the choice of a backend",
    "tools.commands.doctor": "says whether it is installed",
}
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
# Files and folders whose every sentence is short and free of private words.
PLAIN = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "NOTES.md",
    "README.md",
    "benchmarks",
    "docs",
    "examples",
    "kernels",
    "lplb_ep",
    "tests/cpu/deepep",
    "tests/emulator",
    "tests/layers.py",
    "tests/path.py",
    "tests/written.py",
]


@functools.cache
def trees():
    """Every module of the package: its name and its syntax tree."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found.append((name, ast.parse(path.read_text())))
    return found


def inner_imports(name, tree):
    """The package's modules that a module imports, anywhere in it, by their names in LAYERS."""
    is_package = (PACKAGE / name.replace(".", "/")).is_dir()
    package = [part for part in name.split(".") if part][: None if is_package else -1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
        module = ".".join(part for part in base if part)
        for alias in node.names:
            inside = f"{module}.{alias.name}".strip(".")
            yield inside if inside in LAYERS else module


def test_modules_import_only_from_those_above():
    assert sorted(name for name, _ in trees()) == sorted(LAYERS)
    for name, tree in trees():
        for imported in inner_imports(name, tree):
            assert LAYERS.index(imported) < LAYERS.index(name), f"{name} imports {imported}"
        absolute = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        assert not any((n.module or "").startswith("lplb_ep") for n in absolute), name


def test_the_modules_of_a_folder_stand_together():
    folders = [folder for folder, _ in itertools.groupby(n.split(".")[0] for n in LAYERS)]
    assert len(folders) == len(set(folders))


def test_the_architecture_has_the_modules_as_they_are():
    text = ARCHITECTURE.read_text()
    assert text == with_modules(text), "run `make docs`"


def test_modules_stay_readable():
    paths = {name: path_of(name) for name in LAYERS}
    paths |= {path.name: path for path in (ROOT / "kernels").iterdir()}
    lines = {name: len(path.read_text().splitlines()) for name, path in paths.items()}
    assert {name for name, number in lines.items() if number > 500} == set(LONG), lines


def test_sentences_are_found_in_code():
    python = '''"""One two. Three
four five: six.

Args:
    count, of: seven `eight nine` [R, E].
"""
# Nine ten
# eleven. Twelve
x = 1  # thirteen
f(f"fourteen {x + 1} fif" "teen")
'''
    found = [num_words(sentence) for _, sentence in sentences_of_python(python)]
    assert sorted(found) == sorted([2, 4, 1, 5, 3, 1, 1, 3])
    (found,) = sentences_of_python('x = "#define A 1  // One two"')
    assert found[1] == "One two"
    cuda = "/* One\n * two. */\nint x; // three\n// Four\n// five.\n"
    assert [sentence for _, sentence in sentences_of_cuda(cuda)] == [
        "One two.",
        "three",
        "Four five.",
    ]
    text = "# Title\n\nOne [two](three.md)\nfour.\n\n```sh\ncode\n```\n| a | b |\n\nFive."
    assert [s for _, s in sentences_of_markdown(text)] == ["One two four.", "Five."]


@pytest.mark.parametrize("path", PLAIN)
def test_sentences_are_short_and_plain(path):
    assert list(faults(ROOT / path)) == []


def test_only_settings_reads_the_environment():
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                assert name == "settings", f"{name}.py line {node.lineno} reads the environment"


def test_only_the_drop_in_names_deep_ep():
    names = {name for name in LAYERS if "deep_ep" in path_of(name).read_text()}
    others = {name for name in names if name.split(".")[0] not in ("deepep", "embedded")}
    assert others == set(NAMES_DEEP_EP)
    for name, tree in trees():
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert name.startswith("deepep") or "deep_ep" not in "".join(map(ast.dump, imports)), name


def test_asserts_say_what_broke():
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                assert node.msg is not None, f"{name}.py line {node.lineno}"


def test_sizes_stay_readable():
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
                lines = node.end_lineno - node.lineno + 1 - docstring
                assert lines <= 70, f"{name}.{node.name} has {lines} lines beside its docstring"


def test_everything_public_is_documented():
    for name in lplb_ep.__all__:
        if name in ("__version__", "EPHandle", "topk_idx_t"):  # plain values, or DeepEP's own
            continue
        thing = getattr(lplb_ep, name)
        assert inspect.getdoc(thing), name


def test_every_public_function_says_what_it_does():
    for name, tree in trees():
        named = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        public = [n for n in named if not n.name.startswith("_")]
        methods = [n for c in public if isinstance(c, ast.ClassDef) for n in c.body]
        for node in public + [m for m in methods if isinstance(m, ast.FunctionDef)]:
            if not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name}, line {node.lineno}"


def test_type_checkers_see_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = [a.asname for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    declared = [n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)]
    classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    assert sorted({*imported, *declared, *classes} - {None}) == sorted(lplb_ep.__all__)


def test_import_is_light():
    heavy = ["torch", "numpy", "scipy", "cupy", "deep_ep", "matplotlib", "nvshmem", "logging"]
    code = (
        "import sys\n"
        f"before = set(sys.modules)\n"
        "import lplb_ep\n"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])\n"
        "print('Buffer' in dir(lplb_ep))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\nTrue\n"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Bufer'"):
        lplb_ep.Bufer  # noqa: B018


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LPLB_EP", "on", "LPLB_EP must be one of 0, home, 1; got 'on'"),
        (
            "LPLB_EP_BACKEND",
            "gpu",
            "LPLB_EP_BACKEND must be one of auto, deep_ep, embedded; got 'gp",
        ),
        (
            "LPLB_EP_COUNTS",
            "given",
            f"LPLB_EP_COUNTS must be one of {', '.join(COUNTS)}; got 'given'",
        ),
        (
            "LPLB_EP_SOLVER",
            "lp",
            f"LPLB_EP_SOLVER must be one of {', '.join(SOLVERS)}; got 'lp'",
        ),
        ("LPLB_EP_OBJECTIVE", "time", "must be one of tokens, experts, cost, auto; got 'time'"),
        ("LPLB_EP_INDICES", "both", "LPLB_EP_INDICES must be one of logical, physical; got 'both'"),
        ("LPLB_EP_REPLICAS", "1", "LPLB_EP_REPLICAS must be one of tracked, valid; got '1'"),
        ("LPLB_EP_NUM_PHYSICAL_EXPERTS", "-3", "_EXPERTS must be a whole number; got '-3'"),
        ("LPLB_EP_CHECK", "yes", "LPLB_EP_CHECK must be one of 0, 1; got 'yes'"),
        ("LPLB_EP_TIMEOUT_S", "0", "LPLB_EP_TIMEOUT_S must be a whole number of at least 1, below"),
        ("LPLB_EP_TIMEOUT_S", "99999999999", "of at least 1, below 2**31; got 99999999999"),
        ("LPLB_EP_PUSH_SMS", "0", "LPLB_EP_PUSH_SMS must be a whole number of at least 1, at most"),
        ("LPLB_EP_REFRESH", "1", "_REFRESH must be a whole number that is 0 or at least 2; got 1"),
        ("LPLB_EP_REFRESH_CHANGES", "0", "_CHANGES must be a whole number of at least 1; got 0"),
        ("LPLB_EP_REFRESH", "often", "LPLB_EP_REFRESH must be a whole number; got 'often'"),
        ("LPLB_EP_REFRESH_CHANGES", "1.5", "_CHANGES must be a whole number; got '1.5'"),
        ("LPLB_EP_REFRESH_THRESHOLD", "low", "_THRESHOLD must be a number; got 'low'"),
        ("LPLB_EP_REFRESH_THRESHOLD", "0.9", "_THRESHOLD must be a number of at least 1; got 0.9"),
        ("LPLB_EP_REFRESH_THRESHOLD", "inf", "_THRESHOLD must be a number of at least 1; got inf"),
        ("LPLB_EP_REFRESH_SECONDS", "0", "_SECONDS must be a number more than 0; got 0.0"),
        ("LPLB_EP_REFRESH_SECONDS", "nan", "_SECONDS must be a number more than 0; got nan"),
        ("LPLB_EP_BALANCE", "1", "unknown setting LPLB_EP_BALANCE; known ones: LPLB_EP, LPLB_EP_"),
    ],
)
def test_bad_settings_name_themselves(variable, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings.from_env({variable: value})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("refresh", 4.5, "a whole number"),
        ("refresh", True, "a whole number"),
        ("refresh", "4", "a whole number"),
        ("refresh_seconds", "2", "a number"),
        ("refresh_threshold", True, "a number"),
        ("check", 1, "True or False"),
    ],
)
def test_settings_of_another_type_name_their_field(name, value, kind):
    message = f"{name} (LPLB_EP_{name.upper()}) must be {kind}; got {value!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        Settings(**{name: value})


def test_settings_have_defaults_and_ignore_empty_values():
    assert Settings.from_env({}) == Settings.from_env({"LPLB_EP": " "}) == Settings()
    chosen = Settings.from_env(
        {"LPLB_EP": "1", "LPLB_EP_CHECK": "1", "LPLB_EP_NUM_PHYSICAL_EXPERTS": "72"}
    )
    assert Settings.from_env({"LPLB_EP_REFRESH_SECONDS": "inf"}).refresh_seconds == math.inf
    assert Settings(refresh=0) == Settings()
    assert Settings(refresh=2, refresh_seconds=1).refresh == 2
    assert (chosen.mode, chosen.check, chosen.num_physical_experts) == ("1", True, 72)


README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def test_the_settings_are_documented_as_they_are():
    assert SETTINGS.read_text() == settings(), "run `make docs`"


def test_readme_names_only_files_that_exist():
    tree = re.findall(r"^(?:\w|\.)[\w./]*(?:/|\.py|\.md|\.toml)(?=\s)", README, re.MULTILINE)
    assert tree
    for path in tree:
        assert (ROOT / path).exists(), path


def anchors(document):
    """The fragments of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_of_documents_lead_somewhere():
    lost, num_links = [], 0
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text()):
            path, _, fragment = link.partition("#")
            target = (document.parent / path) if path else document
            num_links += 1
            if not target.exists() or (fragment and fragment not in anchors(target)):
                lost.append(f"{document.relative_to(ROOT)}: {link}")
    assert num_links > 100
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_documents_name_only_files_and_targets_that_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`([\w./]+/[\w.]*|[\w./]+\.(?:py|toml|txt|cuh?|md))`", text))
    assert named
    for path in named:
        # The table of modules names them within the package.
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", text)) <= set(targets)


def test_readme_is_short_and_begins_with_what_is_gained():
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert headings == [
        "See it run",
        "Switch it on",
        "How it works",
        "Where to read on",
        "Limitations",
        "Files",
    ]
    lines = README.splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("| DeepEP alone |") for line in lines[:30])
    limitations = README.split("## Limitations\n")[1].split("\n## ")[0]
    assert len(limitations.strip().splitlines()) <= 6
    assert not re.findall(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7}\b", README), "commits"


def test_kernel_sources_are_found_from_the_source_tree():
    """By a link, which an editable install follows too. A source distribution has copies."""
    names = sorted(path.name for path in KERNELS.iterdir())
    assert names
    assert names == sorted(path.name for path in (ROOT / "kernels").iterdir())
    for name in names:
        assert (KERNELS / name).read_bytes() == (ROOT / "kernels" / name).read_bytes()


def test_every_module_of_the_tests_has_a_name_of_its_own():
    """They are imported by their names alone, from whatever folder."""
    modules = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    names = [path.name for path in modules]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_a_layer_or_placement_is_passed_by_one_name():
    """Programs pass it by name, too."""
    view = lplb_ep.Buffer.view
    takers = [lplb_ep.Planner, lplb_ep.Replicas, lplb_ep.use, lplb_ep.attach, view]
    takers += [lplb_ep.mark_valid, lplb_ep.mark_stale, lplb_ep.Layer]
    assert all("placement" in inspect.signature(taker).parameters for taker in takers)
