"""Definitions shared with kernels that push guests: structs, arguments, faults.

Each is declared here, once. `python -m lplb_ep.weights.structs` writes `kernels/travel.cuh`.
"""

from __future__ import annotations

import enum

from ..gpu.abi import Signature, Struct, constant_text, enum_text, header
from ..gpu.jit import KERNELS


class Sum(enum.IntEnum):
    """How a guest's gradient is added to its home's: the types of the home's and the guest's."""

    FLOATS = 0
    """Of 32 bits both."""
    BFLOATS = 1
    """bfloat16 both; each sum is rounded."""
    BFLOATS_TO_FLOATS = 2
    """The guest's is bfloat16, its home's of 32 bits."""


class Missing(enum.IntEnum):
    """Why a rank's guests are missing, in the host's memory; 0: they are not."""

    LATE = 1
    """It did not come in time."""
    REFUSES = 2
    """It came, to say that it does not push the batch again."""


MAX_GUESTS = 512
"""Guest slots of the ranks of a node."""
PARAMETER = Struct(
    "Parameter",
    "A parameter of experts that is copied to guest slots, or its gradient.",
    ("const Word*", "homes", "[num_local_slots] where those of this rank lie; or of its guests"),
    ("long long", "offset", "where guest slot 0 has it in a rank's guest memory, in bytes"),
    ("long long", "bytes", "of a home; the guest slots' follow one another"),
    ("int", "first_chunk", "its first among the chunks of an expert"),
    ("int", "sum", "a Sum; of weights FLOATS"),
)
TRAVEL = Struct(
    "Travel",
    "A batch's guests, and the memory of the ranks that they travel between.",
    ("const int*", "guests", "[R, num_guests] the expert of each guest slot, -1: none; or null"),
    ("const int*", "status", "[1] how the batch ends, or null: OPTIMAL"),
    ("const Word*", "batch", "[1] a number that no other batch has, or null: `num_used` counts"),
    ("Word*", "num_used", "[1] tables with guests that travelled without a number"),
    ("int*", "met", "[1] whether the last meeting was complete"),
    ("const int*", "homes", "[E] the slot of each home"),
    ("const Parameter*", "parameters", "[num_parameters]"),
    ("char* const*", "memory", "[R] each rank's guest memory, null on other nodes"),
    ("Word* const*", "arrived", "[R] each rank's [R]: the ticket of the last push from each rank"),
    ("Word* const*", "present", "[R] each rank's [2, R]: where each came last, and what it left"),
    ("Word*", "last", "[R] the last meeting, if that rank came to it, or 0"),
    ("Word*", "refused", "[1] the number of the last batch that a rank refused"),
    ("int*", "num_done", "[1] blocks that have pushed, 0 between launches"),
    ("volatile int*", "missing", "[R] in the host's memory: a Missing, or 0"),
    ("long long", "limit_ns", "how long to wait for it"),
    ("int", "use", "uses of the batch's number that came before"),
    ("int", "has_met", "1: the ranks met instead of exchanging rows"),
    ("int", "refuses", "1: this rank meets to refuse the batch"),
    ("int", "num_parameters", "of an expert"),
    ("int", "num_chunks", "of an expert's parameters"),
    ("int", "num_guests", "guest slots of a rank"),
    ("int", "num_local_slots", "of a rank, guest slots included"),
    ("int", "num_ranks", "R"),
    ("int", "first_rank", "of this rank's node"),
    ("int", "node_size", "ranks of a node"),
    ("int", "rank", "this rank"),
)
PUSH_GUESTS = Signature("push_guests", (TRAVEL, "travel", "of the weights"))
AWAIT_GUESTS = Signature("await_guests", *PUSH_GUESTS.arguments)
MEET = Signature("meet", *PUSH_GUESTS.arguments)
LAY_GRADIENTS = Signature("lay_gradients", (TRAVEL, "travel", "of what guests have"))
ADD_GRADIENTS = Signature("add_gradients", (TRAVEL, "travel", "of the gradients"))
SIGNATURES = {
    one.name: one for one in (PUSH_GUESTS, AWAIT_GUESTS, MEET, LAY_GRADIENTS, ADD_GRADIENTS)
}
"""Of every kernel that moves guests' weights, by name."""


def travel_header() -> str:
    """The text of `kernels/travel.cuh`."""
    parts = [
        constant_text("int", "MAX_GUESTS", MAX_GUESTS, "guest slots of the ranks of a node"),
        enum_text(Sum, "SUM_"),
        enum_text(Missing, "MISSING_"),
        *(one.text for one in (PARAMETER, TRAVEL)),
    ]
    return header("python -m lplb_ep.weights.structs", parts)


if __name__ == "__main__":
    (KERNELS / "travel.cuh").write_text(travel_header(), "utf-8")
