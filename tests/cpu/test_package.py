"""The package as it is built and installed: wheel, source distribution, types, entry points."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from layers import PACKAGE, ROOT

import lplb_ep
from lplb_ep import embedded

BUILD = "from setuptools import build_meta as b; print(b.build_{}({!r}))"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy: setuptools builds in the tree, and takes up what an earlier build left there."""
    tree = tmp_path_factory.mktemp("tree") / "tree"
    skip = shutil.ignore_patterns(".*", "build", "out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skip)
    return tree


def build(kind, tree, folder):
    """Builds a "wheel", "sdist" or "editable" of a tree, and returns its file."""
    code = BUILD.format(kind, str(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def test_the_wheel_holds_the_package(tree, tmp_path):
    wheel = zipfile.ZipFile(build("wheel", tree, tmp_path))
    names = set(wheel.namelist())
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    sources |= {f"lplb_ep/kernels/{path.name}" for path in (ROOT / "kernels").iterdir()}
    assert sources | {"lplb_ep/py.typed", "lplb_ep/__init__.pyi"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("METADATA"))
    assert f"\nVersion: {lplb_ep.__version__}\n" in metadata
    for field in ("Classifier", "Keywords", "Project-URL"):
        assert f"\n{field}: " in metadata
    page = metadata.split("\n\n", 1)[1]
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links
    assert all(link.startswith("https://") for link in links), "the registry's page has no files"


def test_the_source_distribution_runs_its_tests(tree, tmp_path):
    archive = build("sdist", tree, tmp_path)
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    inside = tmp_path / archive.name.removesuffix(".tar.gz")
    kept = {"build", "out", "lplb_ep.egg-info"}
    for folder in ("tests", "kernels", "docs", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.*"):
            if "__pycache__" not in path.parts and not kept & set(path.parts) and path.is_file():
                assert (inside / path.relative_to(ROOT)).exists(), path
    tests = ["test_project.py", "test_placement.py", "deepep/test_contract.py", "test_abi.py"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *(f"tests/cpu/{t}" for t in tests),
        ],
        cwd=inside,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(inside), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_editable_install_is_a_path_that_type_checkers_follow(tree, tmp_path):
    wheel = zipfile.ZipFile(build("editable", tree, tmp_path))
    (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
    assert wheel.read(name).decode().strip() == str(tree)


def test_the_command_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "lplb_ep", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"lplb-ep {lplb_ep.__version__}\n"


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not on the path")
def test_pyright_finds_every_mistake_and_no_other(tmp_path):
    lines = (ROOT / "tests" / "user_program.py").read_text().splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if "# type: ignore[" in line]
    program = tmp_path / "program.py"
    program.write_text("\n".join(line.split("  # type: ignore[")[0] for line in lines))
    command = ["env", f"PYTHONPATH={ROOT}", "pyright", "--pythonpath", sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = re.findall(r"program\.py:(\d+):\d+ - error", done.stdout)
    assert [int(line) for line in dict.fromkeys(found)] == wrong, done.stdout


@pytest.mark.parametrize("name", ["Buffer", "ElasticBuffer"])
def test_types_have_the_arguments_that_the_classes_have(name):
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    (stub,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    (init,) = (n for n in stub.body if n.name == "__init__")
    typed = [a.arg for a in init.args.args]
    real = list(inspect.signature(getattr(embedded, name).__init__).parameters)
    assert [argument for argument in typed if argument != "enable_shrink"] == real
    own = {"placement", "num_local_slots", "indices"}
    assert {a.arg for a in init.args.kwonlyargs} == own
    made = inspect.signature(getattr(lplb_ep, name).__init__, follow_wrapped=False)
    assert own < set(made.parameters)
    for method in ("view", "stats"):
        assert hasattr(getattr(lplb_ep, name), method)
