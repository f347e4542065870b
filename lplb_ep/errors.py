"""The exceptions that the package raises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class PlacementError(ValueError):
    """An invalid placement: the message names the expert, slot or rank at fault."""


class InfeasibleError(ValueError):
    """A load that no plan can serve, such as an expert whose copies' limits sum below its load."""


class ContractError(RuntimeError):
    """A call that breaks the drop-in contract; the message says how to call instead."""


class RankError(RuntimeError):
    """Ranks of one group disagree, or a peer refused its input; the message names the ranks."""


class MissingPackageError(ImportError):
    """An optional package is needed and absent; the message says what to install."""


class CompileError(RuntimeError):
    """A kernel that does not compile.

    Attributes:
        stage: the tool and the step that failed.
        log: the tool's output.
        options: the tool's options.
        source: where source and headers were saved, for another try; None where they were not.
    """

    def __init__(self, stage: str, log: str, options: Sequence[str], source: Path | None = None):
        super().__init__(stage, log, options, source)
        self.stage, self.log, self.options, self.source = stage, log, options, source

    def __str__(self) -> str:
        options = " ".join(self.options)
        return f"{self.stage}: {self.log}\noptions: {options}\nsource: {self.source}"
