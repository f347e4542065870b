"""The order of the package's modules: `test_project.py` holds it, docs/architecture.md shows it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lplb_ep"

# A module imports only from those above it; a folder's modules stand together.
LAYERS = [
    "",
    "errors",
    "settings",
    "gpu",
    "gpu.abi",
    "gpu.toolchain",
    "gpu.jit",
    "gpu.device",
    "gpu.launch",
    "comm",
    "comm.watchdog",
    "comm.collectives",
    "comm.exchange",
    "comm.nvshmem",
    "comm.reachability",
    "comm.peers",
    "comm.stalls",
    "comm.torch_exchange",
    "comm.connect",
    "comm.copies",
    "comm.alltoall",
    "placement.inputs",
    "placement.copies",
    "placement.homes",
    "placement.optimum",
    "placement.guests",
    "placement.value",
    "placement.files",
    "placement.eplb",
    "placement.topology",
    "placement.optimize",
    "placement.optimize.scenarios",
    "placement.optimize.starts",
    "placement.optimize.bounds",
    "placement.optimize.objective",
    "placement.optimize.moves",
    "placement.optimize.cuts",
    "placement.optimize.search",
    "placement.optimize.build",
    "placement.table",
    "placement.layer_files",
    "placement",
    "problem",
    "layer",
    "planning",
    "planning.structs",
    "planning.inputs",
    "planning.reference",
    "planning.layout",
    "planning.solvers",
    "planning.kernels",
    "planning.device_tables",
    "planning.guests",
    "planning.solve",
    "planning.plan",
    "planning.check",
    "planning.backend",
    "planning.host",
    "planning.home",
    "planning.error_flags",
    "planning.launches",
    "planning.device",
    "planning.planner",
    "weights",
    "weights.slots",
    "weights.transfers",
    "weights.gradients",
    "weights.validity",
    "weights.replicas",
    "weights.proposals",
    "weights.background",
    "weights.refresh",
    "embedded.events",
    "embedded.rows",
    "embedded.checks",
    "embedded.config",
    "embedded.fp8",
    "embedded.low_latency",
    "embedded.legacy",
    "embedded.handles",
    "embedded.elastic",
    "embedded.utils",
    "embedded",
    "deepep",
    "deepep.calls",
    "deepep.limits",
    "deepep.contract",
    "deepep.channels",
    "deepep.context",
    "deepep.checks",
    "deepep.plans",
    "deepep.hooks",
    "deepep.drop_in",
    "deepep.patch",
    "deepep.startup.sitecustomize",
    "tools",
    "tools.tables",
    "tools.recordings",
    "tools.replay",
    "tools.timeline",
    "tools.plots",
    "tools.bench",
    "tools.calls",
    "tools.commands",
    "tools.commands.options",
    "tools.commands.inputs",
    "tools.commands.doctor",
    "tools.commands.replay",
    "tools.commands.place",
    "tools.commands.bench",
    "tools.commands.compile",
    "tools.commands.run",
    "tools.cli",
]


def path_of(name):
    """The file of a module of LAYERS."""
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules_table():
    """Each module and its job, the first paragraph of its docstring, as a Markdown table."""
    rows = ["| module | its one job |", "| --- | --- |"]
    for name in LAYERS[1:]:
        path = path_of(name)
        shown = str(path.relative_to(PACKAGE)).replace("__init__.py", "")
        job = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].replace("\n", " ")
        rows.append(f"| `{shown}` | {job} |")
    return "\n".join(rows) + "\n"
