"""Definitions shared with the kernels: statuses, an exchanged row's head, structs, arguments.

Each is declared here, once. `python -m lplb_ep.planning.structs` writes `kernels/abi.cuh` from it.
"""

from __future__ import annotations

import enum

from ..gpu.abi import Signature, Struct, constant_text, enum_text, header, table_text
from ..gpu.jit import KERNELS
from ..problem import GUEST_PARTS, MAX_TOTAL
from .fill_rules import CHOICE_RULES, CLOSE, NUM_CHOICES, NUM_ROUNDS, NUM_TARGETS, RULES, Rule
from .search_rules import SEARCH_CONSTANTS, Aim
from .tallies import Tally


class Status(enum.IntEnum):
    """How a batch ends; where its parts differ, the largest holds."""

    OPTIMAL = 0
    """No plan on this placement has a smaller maximum rank load."""
    STAYED = 1
    """No plan could gain `min_gain` tokens: tokens stay at home, or in slots of an engine."""
    STALE = 2
    """Replica weights are out of date on some rank: every token goes home."""
    NOT_CONVERGED = 3
    """The solver on the GPU ran out of rounds: every token goes home."""
    INFEASIBLE = 4
    """The copies' capacities do not suffice for the load: every token goes home."""
    BAD_COUNTS = 5
    """The exchanged counts are invalid: every token goes home, and there are no quotas."""
    REFUSED = 6
    """On the GPU: a rank refused its input. There are no quotas, and every rank raises at a later
    call, or in `Planner.raise_errors`."""
    OUT_OF_STEP = 7
    """On the GPU: ranks plan different batches. As REFUSED."""
    TIMED_OUT = 8
    """On the GPU: a rank's counts did not come in time. As REFUSED, on the ranks that waited."""
    REUSED = 9
    """Not exchanged: each rank splits its picks in proportion to the quotas of an earlier batch."""


class Head(enum.IntEnum):
    """The integers that an exchanged row begins with; the counts follow."""

    STATUS = 0
    """The sender's `Status`."""
    PLACEMENT = 1
    """A tag of the placement that it plans with."""
    SLOT = 2
    """The slot of its channel."""
    PLANNER = 3
    """Which of the group's planners it is."""
    BATCH = 4
    """The number of the batch."""


class ErrorFlag(enum.IntEnum):
    """Flags in the host's memory that a kernel sets; behind those of each `Status`."""

    OUT_OF_RANGE = len(Status)
    """A pick was neither -1 nor an id that stands for an expert."""
    REPEATED_PICK = OUT_OF_RANGE + 1
    """A token picked an expert twice."""
    MISCOUNTED = OUT_OF_RANGE + 2
    """Given counts were not those of the picks."""


MAX_EXPERTS = 512
"""Of one component: their tables lie in shared memory, and with guest slots a thread has each."""
MAX_PLACES = 544
"""Slots of a rank, where there are guest slots: a multiple of 32."""

NUM_TALLIES = len(Tally)
NUM_TOTALS = NUM_TALLIES + len(Status)
"""Words of a planner's statistics: each `Tally`, then how many batches ended with each `Status`."""
NUM_WORDS = 2 * NUM_TOTALS + 1
"""Words that a GPU keeps: the totals, the window, and the totals when they were marked last."""
HEAD = len(Head)
"""Integers before the counts of an exchanged row."""
NUM_ERROR_FLAGS = len(Status) + len(ErrorFlag)

ENDING = Struct(
    "Ending",
    "The status and sums of a component of the replica graph.",
    ("int", "status", "a Status"),
    ("int", "total", "tokens of its experts, and base loads"),
    ("int", "home", "where `least_gain` is asked for: the most tokens of a rank, if it stays"),
    ("int", "bound", "and a lower bound of every plan"),
    align=16,
)
COUNTS = Struct(
    "Counts",
    "Counts of each rank for each expert, in rows; several batches of them lie one after another.",
    ("const int*", "rows", "[num_rows] of head + E integers"),
    ("int", "num_rows", "ranks, or 1 where the counts are added up already"),
    ("int", "stride", "integers from one row to the next"),
    ("int", "batch_stride", "integers from one batch to the next"),
    ("int", "head", "HEAD, or 0 where rows are counts alone"),
    ("int", "rank", "this rank, which is its row's number"),
)
PICKS = Struct(
    "Picks",
    "A rank's picks in row-major order, cut into chunks. Each kernel leaves more for the next.",
    ("short*", "experts", "[num_picks] logical experts, -1: none"),
    ("int*", "positions", "[num_picks] how many earlier picks are of the same expert"),
    ("int*", "histograms", "[num_chunks, E] picks of each expert in each chunk"),
    ("int", "num_picks", "T times K"),
    ("int", "num_chunks", "blocks that share the picks"),
    ("int", "chunk", "picks of a chunk"),
    ("int", "num_experts", "E"),
)
EXCHANGE = Struct(
    "Exchange",
    "State of the exchange between one batch and the next; all 0 before the first.",
    ("int", "num_done", "blocks of `count` that have counted"),
    ("int", "unread", "1 where the rows of the last batch were not waited for"),
    ("long long", "start", "when this rank sent its row, in ns"),
)
WINDOW = Struct(
    "Window",
    "Where ranks write each other's rows.",
    ("Word* const*", "peers", "[R] each rank's [2, R, size] words, null on other nodes; or null"),
    ("Exchange*", "state", "of this rank"),
    ("int*", "rows", "[R, size] what was received"),
    ("volatile int*", "missing", "[R] in the host's memory: 1 where a row did not come in time"),
    ("long long", "limit_ns", "how long to wait"),
    ("int", "num_ranks", "R"),
    ("int", "rank", "this rank"),
    ("int", "waits", "1: waits for the rows of all ranks"),
    ("int", "every", "batches from one that is exchanged to the next, where `turn` is given"),
    ("int*", "turn", "[1] batches since the last that was exchanged; or null: all are"),
    ("int", "size", "integers of a row: HEAD + E, and R more where `least_gain` is asked for"),
)
RELAY = Struct(
    "Relay",
    "Memory of the first rank of a node for rows to and from other nodes, by NVSHMEM.",
    ("Word*", "sent", "[2, node_size, size] the node's rows, for even and odd batches"),
    ("const Word*", "received", "[nodes, 2, node_size, size] those of each node"),
    ("const Word*", "signals", "[nodes] how many batches each node has sent"),
    ("int", "node", "this one"),
    ("int", "node_size", "ranks of a node"),
)
ARC = Struct(
    "Arc",
    "A copy of an expert that has several.",
    (
        "unsigned long long",
        "ranks",
        "local ranks with a copy, as bits; of sizes above 64: copies, lower ones << 32",
    ),
    ("int", "quota", "its place in [E, C]"),
    ("short", "place", "where the expert's arcs begin in `copies`; the expert's number, too"),
    ("short", "rank", "its own local rank"),
    align=16,
)
EDGE = Struct(
    "Edge",
    "From one copy of an expert to another, along which tokens may move.",
    ("short", "arc", "the copy that tokens leave; -1: no edge"),
    ("short", "to", "the copy that they reach"),
    ("unsigned char", "target", "the local rank of the second"),
    ("unsigned char", "nth", "edges of the same copy that come before"),
    ("unsigned char", "number", "edges of the same copy in all"),
    align=8,
)
SHAPE = Struct(
    "Shape",
    "How large a component is.",
    ("int", "ranks", "0: there is none, behind the last"),
    ("int", "arcs", "copies of its experts with several"),
    ("int", "most_edges", "of a rank"),
    ("int", "most_nth", "the largest `nth` of an edge"),
    align=16,
)
NETWORK = Struct(
    "Network",
    "Tables of each component, at fixed strides so that all are read at once.",
    ("const Shape*", "shape", "[G] of each"),
    ("const Arc*", "arcs", "[G, max_arcs] by local rank, then expert"),
    ("const short*", "copies", "[G, max_arcs] arcs by expert, then local rank"),
    ("const short*", "first_arc", "[G, SIZE + 1] of each local rank"),
    ("const Edge*", "edges", "[G, SIZE, max_edges] of each local rank"),
    ("const int*", "experts", "[G, max_experts] see `Tables.experts`"),
    ("const int*", "ranks", "[G, SIZE] local rank to rank"),
    ("int", "max_arcs", "of a component"),
    ("int", "max_edges", "of a rank"),
    ("int", "max_experts", "of a component"),
)
PROBLEM = Struct(
    "Problem",
    "The input and the output of a solver's kernel.",
    (COUNTS, "counts", "the load"),
    (NETWORK, "net", "the placement"),
    (PICKS, "picks", "that further blocks number meanwhile"),
    ("int*", "quota", "[B, E, C] tokens of each copy"),
    ("int*", "rank_load", "[B, R] tokens of each rank, base loads not included"),
    ("Ending*", "endings", "[B, G] of each component"),
    ("int*", "counted", "[R, E] a copy of the counts, or null"),
    ("volatile int*", "error_flags", "[NUM_ERROR_FLAGS] in the host's memory"),
    ("const int*", "base", "[R] load that stays on each rank, or null: none"),
    ("const int*", "speed", "[R] of each rank, or null: all the same"),
    ("const int*", "cap", "[E, C] the most tokens of each copy, or null: no limit"),
    ("int", "num_components", "G"),
    ("int", "num_ranks", "R"),
    ("int", "num_experts", "E"),
    ("int", "max_replicas", "C"),
    ("int", "max_rounds", "of the flow"),
    ("int", "status", "of the batch, as known without the counts"),
    ("int", "least_gain", "tokens off the fullest rank for which a batch leaves home; 0: any"),
    ("const int*", "turn", "as the struct Window has it: not 0, and nothing is solved; or null"),
    ("int*", "given_load", "[R] by given slots, which rows have behind their counts; or null"),
)
OBJECTIVE = Struct(
    "Objective",
    "The objective of a plan, and the costs of rows.",
    (
        "const int*",
        "costs",
        "[2, MAX_COST_STEPS + 1] by tiles: of a slot, and the least of an expert over any copies",
    ),
    ("int", "kind", "an Aim"),
    ("int", "num_steps", "of the table"),
    ("int", "tile", "rows of a step"),
    ("int", "slope", "of each tile beyond the last step"),
    ("int", "least_cost", "of an expert beyond the table, for `least_tiles`"),
    ("int", "least_tiles", "tiles that cost that"),
    ("int", "free_rows", "of a slot, that cost no more than one"),
    (
        "int",
        "most_rows",
        "of an expert with tokens in the mean, up to which a plan is searched for",
    ),
    ("int", "least_gap", "above the bound from which it is, for each rank; 0: any, and home first"),
)
COPY = Struct(
    "Copy",
    "A copy of an expert that has several, for rewriting.",
    ("short", "rank", "where it is"),
    ("short", "node", "of that rank"),
    ("int", "slot", "its physical id"),
    ("int", "expert", "its logical id"),
    ("int", "quota", "its place in [E, C]"),
    align=16,
)
TABLE = Struct(
    "Table",
    "The placement, for rewriting. Copies that can get no tokens are left out.",
    (
        "const int*",
        "lookup",
        "[E] the slot of an only copy, or ~m for the m-th expert with several",
    ),
    ("const int*", "experts", "[M] which that is"),
    ("const int*", "first", "[M + 1] where its copies begin, home first"),
    ("const Copy*", "copies", "[N] of those experts"),
    ("const int*", "home_rank", "[E] the rank of each home"),
    ("int", "num_several", "M"),
    ("int", "num_copies", "N"),
    ("int", "num_ranks", "R"),
    ("int", "num_ranks_per_node", "a divisor of R"),
    ("int", "num_experts", "E"),
    ("int", "max_replicas", "C"),
)
STATISTICS = Struct(
    "Statistics",
    "Memory of a planner's statistics.",
    ("long long*", "totals", "[NUM_WORDS] totals; the window, which the host sets; marked totals"),
    ("int*", "samples", "[num_samples, E] loads of sampled batches"),
    ("int*", "sampled", "[num_samples] how many batches came before each; -1: none is there"),
    ("const int*", "base", "[R] load that stays on each rank, or null: none"),
    ("const int*", "speed", "[R] of each rank, or null: all the same"),
    ("int", "num_samples", "kept at once; 0: none are taken"),
    ("int", "every", "batches from one sample to the next"),
    ("int", "by_tokens", "1: a planned batch has the least largest load"),
    ("int", "mark_every", "batches from one whose totals are marked to the next; 0: none are"),
)
BATCH = Struct(
    "Batch",
    "The solution of a batch, and where its status is written.",
    ("int*", "counts", "[R, E] of all ranks"),
    ("int*", "quota", "[E, C] tokens of each copy"),
    ("int*", "rank_load", "[R] tokens of each rank"),
    ("const Ending*", "endings", "[G] of each component"),
    ("int*", "status", "[1] how the batch ends"),
    ("int*", "guests", "[num_guests] the expert in each guest slot, -1: none"),
    (STATISTICS, "statistics", "which one more block of the grid keeps"),
    ("volatile int*", "error_flags", "[NUM_ERROR_FLAGS] in the host's memory"),
    ("int*", "row", "[HEAD + E] (and R) to be zeroed for the next count, or null"),
    ("int", "num_components", "G"),
    ("int", "rank", "this rank"),
    ("int", "num_guests", "guest slots of all ranks"),
    ("int", "least_gain", "as the struct Problem has it"),
    ("const int*", "turn", "as the struct Window has it: not 0, and quotas are reused; or null"),
    ("const int*", "own", "[E] this rank's counts, where `turn` is given"),
    ("int", "again", "1: a backward pass plans a batch again"),
    ("const int*", "given_load", "as the struct Problem has it; picks may keep their slots"),
)
RESIDENT = Struct(
    "Resident",
    "An expert, and its resident copies: those that it has in every batch.",
    ("unsigned long long", "ranks", "local ranks that hold one, as bits"),
    ("int", "slot", "the physical id of its home"),
    ("short", "expert", "its logical id; -1: none, behind the last"),
    ("unsigned char", "home", "the local rank of its home"),
    ("unsigned char", "columns", "the column of its first guest"),
    align=16,
)
REPLICA = Struct(
    "Replica",
    "A resident copy that is no home.",
    ("int", "slot", "its physical id"),
    ("short", "expert", "the number of its expert in the component; -1: none, behind the last"),
    ("unsigned char", "rank", "its local rank"),
    ("unsigned char", "column", "in [0, C)"),
    ("unsigned char", "nth", "copies of its expert that come before and may get tokens"),
    align=4,
)
GUESTS = Struct(
    "Guests",
    "Residents and guest slots of each component, and where guests are written.",
    ("const Resident*", "residents", "[G, max_experts] of each component"),
    ("const Replica*", "replicas", "[G, max_replicas] of each component"),
    ("const int*", "num_experts", "[G] of each component"),
    ("const short*", "places", "[G, SIZE, residents of a rank] numbers of experts, or -1"),
    ("int*", "chosen", "[B, R, num_slots] the expert in each guest slot, -1: none"),
    ("int*", "lookup", "[E] as the struct Table has them; or null, and so the next three"),
    ("int*", "experts", "[M]"),
    ("int*", "first", "[M + 1]"),
    ("Copy*", "copies", "[N]"),
    ("int", "num_slots", "guest slots of a rank: its last ones"),
    ("int", "num_local_slots", "slots of a rank"),
    ("int", "num_ranks_per_node", "a guest comes from its own node"),
    ("int", "max_replicas", "replicas of a component that are no guests"),
    ("int", "max_several", "of a component: M is G times as many"),
    ("int", "max_copies", "of a component: N is G times as many"),
    ("int", "tolerance", "above the mean, in GUEST_PARTS of it, that needs no guests"),
    ("int", "min_tokens", "the least tokens that a guest is chosen for"),
)
CHOICES = Struct(
    "Choices",
    "The choices of guests for a plan by cost, and memory for their plans.",
    ("int*", "plans", "[B, G, NUM_CHOICES, 4 + SIZE * (num_slots + num_local_slots)]"),
    ("int*", "num_done", "[B, G] choices that are planned; all 0 before and after a launch"),
    ("int", "push", "nanoseconds that a rank waits for one guest"),
    ("int", "worth", "rows that cost as much, but no fewer than `min_tokens`"),
)
COUNT = Signature(
    "count",
    ("const Index*", "topk_idx", "[num_picks] ids in [0, num_ids), -1: none"),
    (PICKS, "picks", "what it leaves for the next kernels"),
    (
        "const int*",
        "logical",
        "[num_ids] the expert of each id, -1: none; or null, ids are experts",
    ),
    ("int", "num_ids", "E, or the slots where ids are physical"),
    ("int", "num_topk", "picks of a token, where no two may be of one expert; or 0"),
    ("int*", "row", "[HEAD + E] zeroed, R more with `num_local`; or null"),
    ("int4*", "head", "of the row, behind its status"),
    ("volatile int*", "error_flags", "[NUM_ERROR_FLAGS] in the host's memory"),
    (WINDOW, "window", "where rows are exchanged, if its peers are given"),
    ("int", "status", "of this rank"),
    ("int", "num_local", "slots of a rank, where picks are counted by rank, too; or 0"),
)
GATHER = Signature(
    "gather",
    (WINDOW, "window", "of this rank, the first of its node"),
    (RELAY, "relay", "where the rows go"),
    ("const int*", "num_batches", "[1] the number of the batch"),
)
BROADCAST = Signature("broadcast", *GATHER.arguments)
SOLVE = Signature("solve", (PROBLEM, "problem", "and where its solution goes"))
SOLVE_GENERAL = Signature("solve_general", *SOLVE.arguments)
SOLVE_GUESTS = Signature(
    "solve_guests",
    (PROBLEM, "problem", "and where its solution goes"),
    (GUESTS, "guests", "and where they are written"),
)
SOLVE_GUESTS_GENERAL = Signature("solve_guests_general", *SOLVE_GUESTS.arguments)
SOLVE_BY_OBJECTIVE = Signature(
    "solve_by_objective",
    (PROBLEM, "problem", "and where its solution goes"),
    (OBJECTIVE, "objective", "and what rows cost"),
)
SOLVE_GUESTS_BY_COST = Signature(
    "solve_guests_by_cost",
    *SOLVE_GUESTS.arguments,
    (OBJECTIVE, "objective", "and what rows cost"),
    (CHOICES, "choices", "and what pushes cost"),
)
SPLIT = Signature(
    "split",
    (TABLE, "table", "the placement"),
    ("const int*", "counts", "[R, E] of all ranks"),
    ("const int*", "quota", "[E, C] tokens of each copy"),
    ("int*", "shares", "[R, E, C] zeroed"),
)
ROUTE = Signature(
    "route",
    (PICKS, "picks", "numbered"),
    (TABLE, "table", "the placement"),
    (BATCH, "batch", "what was solved"),
    ("const Index*", "given", "[num_picks] the slots that a batch may keep, by `given_load`"),
    ("Index*", "physical", "[num_picks] slots, -1: none"),
)
ROUTE_GENERAL = Signature("route_general", *ROUTE.arguments)
PLAN = Signature(
    "plan",
    ("const void*", "topk_idx", "[num_picks] ids in [0, num_ids), -1: none"),
    (PICKS, "picks", "of one chunk; where they are laid out is not asked for"),
    ("const int*", "logical", "as of COUNT, and so the next two"),
    ("int", "num_ids", "E, or the slots where ids are physical"),
    ("int", "num_topk", "picks of a token, where no two may be of one expert; or 0"),
    ("int4*", "head", "of the row, behind its status"),
    (WINDOW, "window", "where rows are exchanged, if its peers are given"),
    ("int", "status", "of this rank"),
    (PROBLEM, "problem", "and where its solution goes"),
    (TABLE, "table", "the placement"),
    (BATCH, "batch", "where to say how it ends"),
    ("void*", "physical", "[num_picks] slots, -1: none"),
    ("int", "wide", "1: ids and slots are of 8 bytes, not 4"),
)
PLAN_GENERAL = Signature("plan_general", *PLAN.arguments)
PLAN_BY_OBJECTIVE = Signature(
    "plan_by_objective", *PLAN.arguments, (OBJECTIVE, "objective", "and what rows cost")
)
MASK = Signature(
    "mask",
    ("const Index*", "given", "[num_picks] -1: none"),
    ("const Index*", "planned", "[num_picks] what takes the place of the others"),
    ("Index*", "out", "[num_picks] may be either of them"),
    ("int", "num_picks", "T times K"),
)
SIGNATURES = {
    one.name: one
    for one in (
        *(COUNT, GATHER, BROADCAST, SOLVE, SOLVE_GENERAL, SOLVE_GUESTS, SOLVE_GUESTS_GENERAL),
        *(
            SOLVE_BY_OBJECTIVE,
            SOLVE_GUESTS_BY_COST,
            SPLIT,
            ROUTE,
            ROUTE_GENERAL,
            PLAN,
            PLAN_GENERAL,
        ),
        *(PLAN_BY_OBJECTIVE, MASK),
    )
}
"""Of every kernel of a plan, by name."""


def _word_of(rule: Rule) -> int:
    """A rule as `kernels/fill.cuh` reads it."""
    flags = rule.by_excess | rule.widest << 1 | rule.largest << 2
    return flags | rule.shift << 3 | rule.noise << 8


def abi_header() -> str:
    """The text of `kernels/abi.cuh`."""
    structs = [ENDING, COUNTS, PICKS, EXCHANGE, WINDOW, RELAY, ARC, EDGE, SHAPE, NETWORK, PROBLEM]
    structs += [COPY, TABLE, STATISTICS, BATCH, RESIDENT, REPLICA, GUESTS, OBJECTIVE, CHOICES]
    parts = [
        "typedef unsigned long long Word;  // an integer of a row, and the number of its batch",
        enum_text(Status),
        constant_text("int", "NUM_STATUSES", len(Status), "of a batch"),
        enum_text(Head, "HEAD_"),
        constant_text("int", "HEAD", HEAD, "integers before the counts of an exchanged row"),
        enum_text(ErrorFlag, "FLAG_"),
        enum_text(Tally, "TALLY_"),
        constant_text("int", "NUM_TALLIES", NUM_TALLIES, "sums over batches"),
        constant_text("int", "NUM_TOTALS", NUM_TOTALS, "tallies, then batches of each status"),
        constant_text("int", "NUM_WORDS", NUM_WORDS, "totals, the window, and marked totals"),
        constant_text("int", "NUM_ERROR_FLAGS", NUM_ERROR_FLAGS, "statuses, then the others"),
        constant_text("int", "GUEST_PARTS", GUEST_PARTS, "of 1, in which a tolerance is counted"),
        enum_text(Aim, "AIM_"),
        *(constant_text(*one) for one in SEARCH_CONSTANTS),
        constant_text("int", "MAX_EXPERTS", MAX_EXPERTS, "of a component"),
        constant_text("int", "MAX_PLACES", MAX_PLACES, "slots of a rank that has guest slots"),
        constant_text("int", "NUM_ROUNDS", NUM_ROUNDS, "of fills, at most"),
        constant_text("int", "NUM_TARGETS", NUM_TARGETS, "limits of fills in a later round"),
        constant_text("int", "CLOSE", CLOSE, "levels within 2 to the minus this are equal"),
        constant_text("int", "FILLS", len(RULES), "of a round"),
        table_text("rule_of", [_word_of(rule) for rule in RULES], "How fill i decides: a `Rule`."),
        constant_text("int", "NUM_CHOICES", NUM_CHOICES, "of guests, for a plan by cost"),
        table_text(
            "choice_rule_of",
            [rule.tolerance << 1 | rule.is_worth for rule in CHOICE_RULES],
            "Of choice i + 1: its tolerance << 1 | whether a guest is worth its push.",
        ),
        constant_text("unsigned", "MAX_TOTAL", MAX_TOTAL, "tokens of a batch; and its number"),
        *(one.text for one in structs),
    ]
    return header("python -m lplb_ep.planning.structs", parts)


if __name__ == "__main__":
    (KERNELS / "abi.cuh").write_text(abi_header(), "utf-8")
