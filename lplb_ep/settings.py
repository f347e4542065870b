"""Every environment variable of the package, in one frozen record.

No other file reads the environment (a test holds this), so this one is the whole list of switches.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

GPU_SOLVERS = ("flow", "cusolverdx")
"""Solvers on the GPU; `planning.solvers` has a record of each."""
SOLVERS = ("auto", "cpu", *GPU_SOLVERS)
"""Requests for a solver."""
COUNTS = ("auto", "nvshmem", "ipc", "torch")
"""Requests for an exchange of counts; `comm.connect` makes each."""

MAX_ONE_LAUNCH = 2048
"""Picks of a batch that one block can plan, at most; any that it has shared memory for."""
OBJECTIVES = ("tokens", "experts", "cost", "auto")
"""What plans minimise on the largest rank; `problem.Problem` says what each is."""

_Range = tuple[str, Callable[[float], bool]]
"""In words, and whether a number lies in it."""
_AT_LEAST_0: _Range = ("of at least 0", lambda number: 0 <= number < math.inf)


def _setting(  # type: ignore[no-untyped-def]
    variable: str,
    default: object,
    meaning: str,
    choices: tuple[str, ...] = (),
    within: _Range = _AT_LEAST_0,
    ends_in: str = "",
):
    metadata = {"variable": variable, "meaning": meaning, "choices": choices, "within": within}
    metadata["ends_in"] = ends_in
    return field(default=default, metadata=metadata)


_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
}


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; `Settings.from_env()` is read once, when a buffer is made.

    Raises:
        TypeError: a value is not of its field's type; field and variable are named.
        ValueError: a value is not one of its variable's; the variable is named.
    """

    mode: str = _setting(
        "LPLB_EP",
        "0",
        "`0`: every call is passed on unchanged. `home`: every token goes to its expert's home "
        "slot. `1`: balance every batch.",
        ("0", "home", "1"),
    )
    backend: str = _setting(
        "LPLB_EP_BACKEND",
        "auto",
        "The buffer underneath: DeepEP's, or the embedded one on `torch.distributed`. `auto` takes "
        "DeepEP where it can be imported and there is a CUDA device.",
        ("auto", "deep_ep", "embedded"),
    )
    counts: str = _setting(
        "LPLB_EP_COUNTS",
        "auto",
        "How the ranks' counts are exchanged. Kernels do it themselves in NVSHMEM's symmetric "
        "memory (`nvshmem`), or in memory that CUDA IPC shares within a node (`ipc`). `torch` is a "
        "collective of `torch.distributed`. `auto` takes the first that works on all ranks, and "
        "`torch` between nodes. `nvshmem` and `ipc` need a solver on the GPU.",
        COUNTS,
    )
    timeout_s: int = _setting(
        "LPLB_EP_TIMEOUT_S",
        60,
        "How many seconds a rank waits for another's counts; then the missing ranks are named. "
        "Kernels that wait give up: that batch goes to the home slots, and the next call raises. "
        "A collective of gloo raises at once. A collective of NCCL goes on waiting, and so do "
        "transfers of replica weights and gradients.",
        within=("of at least 1, below 2**31", lambda seconds: 1 <= seconds < 2**31),
    )
    on_timeout: str = _setting(
        "LPLB_EP_ON_TIMEOUT",
        "raise",
        "`abort`: end the process when a rank is missing after `LPLB_EP_TIMEOUT_S`. `raise`: the "
        "next call raises, but a program that DeepEP or NCCL blocks may never reach it.",
        ("raise", "abort"),
    )
    solver: str = _setting(
        "LPLB_EP_SOLVER",
        "auto",
        "Which solver finds the quotas. `auto` takes `flow`, on the GPU, where there is a GPU and "
        "the placement fits `flow`.",
        SOLVERS,
    )
    objective: str = _setting(
        "LPLB_EP_OBJECTIVE",
        "tokens",
        "Whose largest value over ranks a plan minimises: `tokens`, active slots and then tokens "
        "(`experts`), or nanoseconds by the cost model (`cost`). `auto` is `cost` without "
        "searches that take longer than they gain. A layer's `Problem` overrules it.",
        OBJECTIVES,
    )
    cost: str = _setting(
        "LPLB_EP_COST",
        "",
        "A file of `lplb-ep calibrate`: the cost of rows on this GPU. The default is an H200's "
        "built-in table. A layer's `Problem` overrules it.",
    )
    indices: str = _setting(
        "LPLB_EP_INDICES",
        "logical",
        "The numbers in callers' `topk_idx`: the router's experts (`logical`), or slots that an "
        "engine chose (`physical`: vLLM, SGLang).",
        ("logical", "physical"),
    )
    placement: str = _setting(
        "LPLB_EP_PLACEMENT",
        "",
        "A file of placements, in force on every buffer made without `placement=`: one for all MoE "
        "layers (`Placement.save`), or those of modules by name (`lplb-ep place --names`).",
    )
    replicas: str = _setting(
        "LPLB_EP_REPLICAS",
        "tracked",
        "`tracked`: balance only while the replica weights are known to equal the home weights. "
        "`valid`: the program keeps them equal itself, and is trusted.",
        ("tracked", "valid"),
    )
    refresh: int = _setting(
        "LPLB_EP_REFRESH",
        0,
        "Every so many steps, at least 2, a `Refresher` looks at their loads. It moves replicas "
        "where that lowers an imbalance; 0: never.",
        # Replicas are chosen by some of the steps, and judged on others.
        within=("that is 0 or at least 2", lambda steps: steps == 0 or steps >= 2),
    )
    refresh_threshold: float = _setting(
        "LPLB_EP_REFRESH_THRESHOLD",
        1.01,
        "A layer is refreshed only if T* / mean rank load exceeded this in three of four of those "
        "steps.",
        within=("of at least 1", lambda threshold: 1 <= threshold < math.inf),
    )
    refresh_changes: int = _setting(
        "LPLB_EP_REFRESH_CHANGES",
        16,
        "The most replicas of a layer that a refresh moves, at least 1.",
        within=("of at least 1", lambda changes: changes >= 1),
    )
    refresh_seconds: float = _setting(
        "LPLB_EP_REFRESH_SECONDS",
        2.0,
        "How many seconds a process in the background may search the new replicas of a layer, "
        "more than 0; `inf`: until its search ends.",
        within=("more than 0", lambda seconds: seconds > 0),
    )
    guest_tolerance: float = _setting(
        "LPLB_EP_GUEST_TOLERANCE",
        0.01,
        "A batch takes guests where T* of the other copies exceeds the mean rank load by more than "
        "this part of it. A layer's `Problem` overrules it.",
        within=("in [0, 1]", lambda tolerance: 0 <= tolerance <= 1),
    )
    guest_min_tokens: int = _setting(
        "LPLB_EP_GUEST_MIN_TOKENS",
        32,
        "The least number of tokens that a guest is chosen for, at least 1. A layer's `Problem` "
        "overrules it.",
        within=("of at least 1, below 2**31", lambda tokens: 1 <= tokens < 2**31),
    )
    min_gain: int = _setting(
        "LPLB_EP_MIN_GAIN",
        0,
        "A batch keeps its slots where no plan could take so many tokens off its fullest rank. "
        "These are its homes, or the slots of an engine. 0: every batch is balanced. It needs the "
        "objective `tokens`, and no guest slots. A layer's `Problem` overrules it.",
        within=("of at least 0, below 2**31", lambda tokens: 0 <= tokens < 2**31),
    )
    one_launch: int = _setting(
        "LPLB_EP_ONE_LAUNCH",
        0,
        "A rank's batch of at most so many picks (tokens times top-k) is planned on the GPU in one "
        f"launch, not three. The largest value is {MAX_ONE_LAUNCH}; 0: always three launches. "
        "Where no kernel can, the log and `lplb-ep doctor` say why.",
        within=(
            f"of at least 0, at most {MAX_ONE_LAUNCH}",
            lambda picks: 0 <= picks <= MAX_ONE_LAUNCH,
        ),
    )
    every: int = _setting(
        "LPLB_EP_EVERY",
        1,
        "Only one in so many batches of a layer is exchanged and solved. In the others each rank "
        "splits its picks in proportion to the last quotas, which is not optimal ([its cost]("
        "objectives.md#quotas-of-an-earlier-batch)). It is for inference with static copies alone, "
        "and needs `LPLB_EP_REPLICAS=valid`. 1: every batch.",
        within=("of at least 1, below 2**31", lambda batches: 1 <= batches < 2**31),
    )
    push_sms: int = _setting(
        "LPLB_EP_PUSH_SMS",
        16,
        "How many SMs push guests' weights to other GPUs. Their gradients are fetched by four "
        "times as many where nothing runs beside that.",
        within=("of at least 1, at most 1024", lambda number: 1 <= number <= 1024),
    )
    num_physical_experts: int = _setting(
        "LPLB_EP_NUM_PHYSICAL_EXPERTS",
        0,
        "The least number of slots P for size hints of low-latency buffers. Set it where a hint is "
        "computed before any placement is known; 0: no such number.",
    )
    check: bool = _setting(
        "LPLB_EP_CHECK",
        False,
        "`1`: verify every batch and its plan at once (slow; for debugging).",
    )
    log: str = _setting(
        "LPLB_EP_LOG",
        "program",
        "`info`, `debug`: the package's messages go to standard error from that level on. "
        "`program`: the program's set-up of Python's `logging` decides.",
        ("program", "info", "debug"),
    )
    log_every: int = _setting(
        "LPLB_EP_LOG_EVERY",
        1000,
        "Every so many batches of a layer, and at the end, the first rank of its group logs their "
        "statistics at INFO (docs/metrics.md); 0: never.",
    )
    metrics: str = _setting(
        "LPLB_EP_METRICS",
        "",
        "A file that ends in `.jsonl`. Every `LPLB_EP_LOG_EVERY` batches of a layer, and at the "
        "end, the first rank of each group adds their statistics, as `lplb-ep report` draws them.",
        ends_in=".jsonl",
    )
    record: str = _setting(
        "LPLB_EP_RECORD",
        "",
        "A file that ends in `.npz`: the first rank of each group writes loads of its layers "
        "there, as `lplb-ep replay` and `place` read them.",
        ends_in=".npz",
    )
    record_every: int = _setting(
        "LPLB_EP_RECORD_EVERY",
        16,
        "The loads of one in so many batches are recorded, at least 1; fewer in long runs. With "
        "`LPLB_EP_EVERY` it is one in so many that are exchanged.",
        within=("of at least 1", lambda batches: batches >= 1),
    )
    cache_dir: str = _setting(
        "LPLB_EP_CACHE_DIR",
        "",
        "Where compiled kernels are kept; by default `lplb_ep` in `XDG_CACHE_HOME` or `~/.cache`.",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value, variable = getattr(self, f.name), f.metadata["variable"]
            choices, (words, lies_within) = f.metadata["choices"], f.metadata["within"]
            if choices and value not in choices:
                raise ValueError(f"{variable} must be one of {', '.join(choices)}; got {value!r}")
            if value and f.metadata["ends_in"] and not value.endswith(f.metadata["ends_in"]):
                end = f.metadata["ends_in"]
                raise ValueError(f"{variable} must be a file that ends in {end}; got {value}")
            if type(f.default) not in _TYPES:
                continue
            kind, a_kind = _TYPES[type(f.default)]
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise TypeError(f"{f.name} ({variable}) must be {a_kind}; got {value!r}")
            if not lies_within(value):
                raise ValueError(f"{variable} must be {a_kind} {words}; got {value}")
        if self.metrics and not self.log_every:
            raise ValueError("LPLB_EP_METRICS needs LPLB_EP_LOG_EVERY above 0: it says how often")
        if self.every > 1 and self.mode == "1" and self.replicas != "valid":
            raise ValueError(
                f"LPLB_EP_EVERY={self.every} needs LPLB_EP_REPLICAS=valid: between two exchanges "
                "no rank can tell the others that its replicas are stale"
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Reads the environment (or `environ`); empty values count as unset.

        Raises:
            ValueError: names the variable, the value and what it may be. An unknown variable that
                begins with `LPLB_EP` is refused too: most often it is a misspelt one.
        """
        environ = os.environ if environ is None else environ
        known = {f.metadata["variable"]: f for f in fields(cls)}
        unknown = sorted(v for v in environ if v.startswith("LPLB_EP") and v not in known)
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]}; known ones: {', '.join(known)}")
        values: dict[str, object] = {}
        for variable, f in known.items():
            text = environ.get(variable, "").strip()
            if not text:
                continue
            if isinstance(f.default, bool):
                if text not in ("0", "1"):
                    raise ValueError(f"{variable} must be one of 0, 1; got {text!r}")
                values[f.name] = text == "1"
            elif isinstance(f.default, int):
                if not text.isdecimal():
                    raise ValueError(f"{variable} must be a whole number; got {text!r}")
                values[f.name] = int(text)
            elif isinstance(f.default, float):
                try:
                    values[f.name] = float(text)
                except ValueError:
                    raise ValueError(f"{variable} must be a number; got {text!r}") from None
            else:
                values[f.name] = text
        return cls(**values)  # type: ignore[arg-type]


def cache_directory() -> Path:
    """Where compiled kernels are kept.

    Raises:
        ValueError: as `Settings.from_env`.
    """
    chosen = Settings.from_env().cache_dir
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else (Path(base) if base else Path.home() / ".cache") / "lplb_ep"


def cuda_home() -> Path | None:
    """The CUDA toolkit that the user points to, as other programs understand it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(home) if home else None


def has_part_of_gpu() -> bool:
    """Whether CUDA's multi-process service gives this process a part of a GPU for itself."""
    return "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" in os.environ


def save_for_nvshmem() -> None:
    """Lets NVSHMEM take less where it is started for counts within a node.

    It then needs no polling thread on any rank, and grows its heap by 2 MiB instead of 512 MiB.
    """
    os.environ.setdefault("NVSHMEM_DISABLE_LOCAL_ONLY_PROXY", "1")
    os.environ.setdefault("NVSHMEM_CUMEM_GRANULARITY", str(2 << 20))


def environment_for_one_core() -> dict[str, str]:
    """The environment of a process that takes one core, unless the user sets a number of cores.

    By default the libraries under NumPy take all cores.
    """
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}


def put_in_environment(name: str, value: str) -> None:
    """Sets the variable of a setting for this process and those that it starts."""
    (variable,) = (f.metadata["variable"] for f in fields(Settings) if f.name == name)
    os.environ[variable] = value


def put_first_on_python_path(directory: Path) -> None:
    """Puts a directory first on the module path of Python processes that this one starts."""
    rest = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{directory}{os.pathsep}{rest}" if rest else str(directory)


def settings_table() -> str:
    """The settings as a Markdown table; docs/settings.md is written from it."""
    rows = ["| variable | values | default | meaning |", "| --- | --- | --- | --- |"]
    for f in fields(Settings):
        default = f.default
        if isinstance(default, bool):
            values, shown = "`0`, `1`", f"`{int(default)}`"
        elif isinstance(default, int):
            values, shown = "whole number", f"`{default}`"
        elif isinstance(default, float):
            values, shown = "number", f"`{default}`"
        else:
            values = ", ".join(f"`{c}`" for c in f.metadata["choices"]) or "path"
            shown = f"`{default}`" if default else "none"
        rows.append(
            f"| `{f.metadata['variable']}` | {values} | {shown} | {f.metadata['meaning']} |"
        )
    return "\n".join(rows) + "\n"
