"""Plants faults in copies of the kernels, one after the other, and says which the tests find.

    python tests/emulator/faults.py [PART-OF-A-NAME ...]

By hand (`make faults`), since all of them take half an hour. docs/kernels.md has the result.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Fault(NamedTuple):
    """A change of one place in a source."""

    name: str
    source: str
    old: str
    new: str
    survives: str = ""
    """Why no test finds it; empty: one must."""


FAULTS = [
    # What host and device share
    Fault(
        "two pointers swapped",
        "abi.cuh",
        "    const int* experts;      // [M] which that is\n"
        "    const int* first;        // [M + 1] where its copies begin, home first\n",
        "    const int* first;\n    const int* experts;\n",
    ),
    Fault("a head without its planner", "abi.cuh", "HEAD = 5;", "HEAD = 4;"),
    # Counting
    Fault("one id too many", "count.cuh", "id >= num_ids ?", "id > num_ids ?"),
    Fault("-1 is out of range", "count.cuh", "expert < 0 && id != -1", "expert < 0"),
    Fault("a last pick is not compared", "count.cuh", "later > 0; --later", "later > 1; --later"),
    Fault("picks of the next token are compared", "count.cuh", "num_topk - 1 - n", "num_topk - n"),
    Fault("the number of the batch stays", "count.cuh", "(words.w + 1) &", "words.w &"),
    Fault(
        "a status lowers another",
        "count.cuh",
        "atomicMax(&row[HEAD_STATUS], status);",
        "row[HEAD_STATUS] = status;",
    ),
    Fault(
        "a chunk behind the last pick",
        "number.cuh",
        "min(picks.num_picks, chunk * picks.chunk)",
        "chunk * picks.chunk",
    ),
    # Numbering
    Fault("a chunk counts itself as earlier", "number.cuh", "0, chunk, 1, E", "0, chunk + 1, 1, E"),
    Fault(
        "a pick counts itself as earlier", "number.cuh", "((1u << lane) - 1)", "((2u << lane) - 1)"
    ),
    Fault(
        "tiles forget earlier ones",
        "number.cuh",
        "            before[e] = sum;\n        });\n        __syncthreads();",
        "        });\n        __syncthreads();",
    ),
    Fault("no one compares given counts", "number.cuh", "before[e] != own_counts[e]", "false"),
    # Exchange
    Fault("one window for all batches", "exchange.cuh", "size_t(batch & 1)", "size_t(0)"),
    Fault(
        "words of any batch are taken",
        "exchange.cuh",
        "int(word >> 32) == batch",
        "word >> 32 != 0",
    ),
    Fault("unread rows are overwritten", "exchange.cuh", "if (unread)", "if (false)"),
    Fault(
        "the row is not zeroed",
        "exchange.cuh",
        "        row[i] = 0;\n        if (turn",
        "        if (turn",
    ),
    Fault("a block that is not the last sends", "exchange.cuh", "gridDim.x) - 1", "gridDim.x) - 2"),
    Fault(
        "no one waits", "exchange.cuh", "if (window.waits) receive", "if (!window.waits) receive"
    ),
    Fault(
        "a late row keeps what came", "exchange.cuh", "        row[HEAD_STATUS] = TIMED_OUT;\n", ""
    ),
    Fault("a late rank is not named", "exchange.cuh", "        window.missing[source] = 1;\n", ""),
    Fault(
        "waits for ever",
        "exchange.cuh",
        "late = nanoseconds() > deadline",
        "late = nanoseconds() > deadline && false",
    ),
    Fault(
        "rows are sent at this rank's place of the first",
        "exchange.cuh",
        "place_of(window, batch, window.rank, size) + i",
        "place_of(window, batch, 0, size) + i",
    ),
    Fault(
        "no fence before the last block reads",
        "exchange.cuh",
        "    __threadfence();  // what the other",
        "    // what the other",
        "memory is seen in the order of execution",
    ),
    Fault(
        "a late row of a node is sent as it is",
        "relay.cuh",
        "        if (is_late) row[HEAD_STATUS]",
        "        if (false) row[HEAD_STATUS]",
    ),
    Fault("signals are not waited for", "relay.cuh", "> MAX_TOTAL / 2 &&", "> MAX_TOTAL &&"),
    Fault(
        "rows of a node go to the place of another",
        "relay.cuh",
        "place_of(window, batch, node * count, size)",
        "place_of(window, batch, relay.node * count, size)",
    ),
    Fault(
        "a barrier lets the number before pass",
        "barrier.cu",
        "} while (seen < number);",
        "} while (seen + 1 < number);",
    ),
    Fault(
        "a missing rank is waited for no longer",
        "barrier.cu",
        "limit_ns = 0x7fffffffffffffff;",
        "return;",
    ),
    # Adding up
    Fault("an unknown status is taken", "rows.cuh", ">= NUM_STATUSES", "> 1000"),
    Fault(
        "heads are not compared",
        "rows.cuh",
        "if (word > HEAD_STATUS && value",
        "if (word > HEAD && value",
    ),
    Fault("signs are not looked at", "rows.cuh", "if (signs < 0 || ", "if ("),
    Fault("sums of 32 bits", "rows.cuh", "long long sum = 0;", "int sum = 0;"),
    Fault(
        "totals lose their high part",
        "counts.cuh",
        "    atomicAdd(&high, high_sum);\n".replace("    ", "        ", 1),
        "",
    ),
    Fault(
        "base loads are not in the total",
        "rows.cuh",
        "    if (p.base != nullptr) total.add(base);\n",
        "",
    ),
    Fault("an only copy has no limit", "rows.cuh", "sum > p.cap[", "false && sum > p.cap["),
    Fault(
        "the host's status is dropped",
        "component.cuh",
        "max(ending.status, p.status);",
        "ending.status;",
    ),
    Fault("an even split loses its rest", "component.cuh", "(place < total % number)", "0"),
    # Sets of several words
    Fault(
        "a rank is one of the first word",
        "sets.cuh",
        "set.word[i] = rank / 32 == i ?",
        "set.word[i] = i == 0 ?",
    ),
    Fault(
        "a vote fills the first word",
        "sets.cuh",
        "{ set.word[i] = word; }",
        "{ set.word[0] = word; }",
    ),
    Fault(
        "lanes show each other the first word",
        "sets.cuh",
        "__shfl_xor_sync(~0u, set.word[i], bit)",
        "__shfl_xor_sync(~0u, set.word[0], bit)",
    ),
    Fault(
        "a set with no rank in the first word is empty",
        "sets.cuh",
        "all |= set.word[i];",
        "all |= set.word[0];",
    ),
    Fault(
        "ranks of the first word are counted",
        "sets.cuh",
        "number += __popc(set.word[i]);",
        "number += __popc(set.word[0]);",
    ),
    Fault(
        "the first copies of many ranks get the rest",
        "component.cuh",
        "return int(arc.ranks >> 32);",
        "return 0;",
    ),
    Fault(
        "copies of many ranks are counted with lower ones",
        "component.cuh",
        "int(arc.ranks & 0xffffffff)",
        "int(arc.ranks >> 32)",
    ),
    Fault(
        "edges of a copy on many ranks do not share",
        "push.cuh",
        "return unsigned((1ull << max(first, end)) - (1ull << first));",
        "return 0;",
    ),
    Fault("missing copies go unannounced", "component.cuh", "lacks |= total > 0;", ""),
    # The flow
    Fault(
        "K begins below the mean",
        "flow.cuh",
        "(total % c.shape.ranks != 0)), limits",
        "0), limits",
        "the bound of the first cut makes up for it",
    ),
    Fault(
        "the cut's bound is rounded down",
        "flow.cuh",
        "(cut_load + size - 1) / size",
        "cut_load / size",
    ),
    Fault(
        "loads miss what K rose by",
        "flow.cuh",
        "c.load()[rank] += limit - rise;",
        "c.load()[rank] += limit;",
    ),
    Fault(
        "ranks of the first layer take more than their deficit",
        "push.cuh",
        "usable[i] && lowest ?",
        "false ?",
        "later rounds push it on",
    ),
    Fault(
        "each edge may take all of a copy",
        "push.cuh",
        "last ? rest : rest - (rest >> 1)",
        "available[i]",
    ),
    Fault(
        "the last edge takes half",
        "push.cuh",
        "last ? rest :",
        "false ? rest :",
        "the next round pushes the rest",
    ),
    Fault("a rank's threads push alike", "push.cuh", "excess - (sum - total)", "excess"),
    Fault(
        "edges of another copy share",
        "push.cuh",
        "edges[i].same, lower",
        "~0u, lower",
        "less is pushed at a time, and the next round pushes the rest",
    ),
    Fault(
        "the next chunk begins too late",
        "push.cuh",
        "chunk + V::chunk, edges",
        "chunk + V::chunk + 1, edges",
    ),
    Fault(
        "edges beyond the first chunk have no targets",
        "flow.cuh",
        "V::more && i < c.end_of_edges()",
        "false",
    ),
    Fault(
        "capacities do not limit a push",
        "push.cuh",
        "limit[i] = min(limit[i], c.capacity(edges[i].to));",
        ";",
    ),
    Fault(
        "two ranks fill one copy",
        "flow.cuh",
        "general && c.cap != nullptr ? c.shape.ranks : 1",
        "1",
    ),
    Fault(
        "what speeds round down is lost",
        "speeds.cuh",
        "for (; short_of > 0; --short_of)",
        "for (; false;)",
    ),
    Fault("rounds do not end", "flow.cuh", "return rounds > 0;", "return true;"),
    Fault("rank loads have base loads", "flow.cuh", "(p.base == nullptr ? 0 : p.base[rank])", "0"),
    Fault(
        "counts of the first rank only are copied",
        "flow.cuh",
        "counts_of(p.counts, i / p.num_experts)",
        "counts_of(p.counts, 0)",
    ),
    # Objectives
    Fault("a tile begins a row late", "search.cuh", "+ tile.number - 1)", "+ tile.number)"),
    Fault(
        "the slope is that of rows",
        "search.cuh",
        "Amount(slope) * (tiles - inside)",
        "Amount(slope) * tiles",
    ),
    Fault(
        "a step too few may stay",
        "search.cuh",
        "steps[min(tiles + i * width, number)] <= most",
        "steps[min(tiles + i * width, number)] < most",
    ),
    Fault(
        "quotients may be one short",
        "search.cuh",
        "quotient + (dividend - quotient * number >= number)",
        "quotient",
    ),
    Fault(
        "amounts have 42 bits",
        "search.cuh",
        "amount >> 21 * part != 0 && part < 3",
        "amount >> 21 * part != 0 && part < 2",
    ),
    Fault(
        "what ranks count is compared to the bit",
        "search.cuh",
        "unit = max(0, ",
        "unit = min(0, ",
    ),
    Fault(
        "rows go on along the arc by which they came",
        "search.cuh",
        " && reach.entered()[rank] != a",
        "",
        "one in five hundred random instances differs, none of the tests'",
    ),
    Fault("experts are always split", "search.cuh", "load[arc.place] <= splits_above", "false"),
    Fault("full ranks keep a part", "search.cuh", " || active > most_active ? 0", " ? 0"),
    Fault("all that is kept costs the last step", "search.cuh", "last + slope * more", "last"),
    Fault(
        "a crowded target ends a chain",
        "search.cuh",
        "if (crowds || count > aim)",
        "if (count > aim)",
    ),
    Fault(
        "crowded targets are as good",
        "search.cuh",
        "if (crowds) key |= CROWDS;",
        "",
        "one in 850 random instances differs by the CPU's flow, none of the tests' by the kernel's",
    ),
    Fault(
        "auto searches large batches",
        "objective.cuh",
        "bool searches = tokens <= Amount(o.most_rows) * num_active",
        "bool searches = true",
    ),
    Fault(
        "auto searches near the bound",
        "objective.cuh",
        "searches &= min(of_home, of_tokens) - least > Amount(o.least_gap) * c.shape.ranks;",
        "searches &= true;",
    ),
    Fault(
        "auto does not search batches of just the table's rows",
        "objective.cuh",
        "tokens <= Amount(o.most_rows)",
        "tokens < Amount(o.most_rows)",
    ),
    Fault(
        "auto searches just at the gap",
        "objective.cuh",
        "- least > Amount(o.least_gap)",
        "- least >= Amount(o.least_gap)",
    ),
    Fault("auto searches before the flow", "objective.cuh", " && o.least_gap == 0", ""),
    Fault("chains do not close", "search.cuh", "moves > 1) != NONE", "false) != NONE"),
    Fault(
        "a chain closes by its own expert",
        "search.cuh",
        " &&\n                    arc_on(leaves, first) != reach.left()[reach.via()[leaves.rank]]",
        "",
        "none of three thousand random instances has such a chain",
    ),
    Fault(
        "the first rank is as before",
        "search.cuh",
        "closes ? reach.rest()[reach.via()[from]]",
        "closes ? amount[rank]",
    ),
    Fault("chains are a move shorter", "search.cuh", "moves <= CHAIN", "moves < CHAIN"),
    Fault("steps shrink faster", "search.cuh", "- 1] >> SHRINK)", "- 1] >> (SHRINK + 1))"),
    Fault(
        "steps shrink faster between rounds",
        "search.cuh",
        "max(finest, step >> SHRINK)",
        "max(finest, step >> (SHRINK + 1))",
        "the aims of one round come to the last step in all of 480 random instances",
    ),
    Fault("there is one aim in a round", "search.cuh", "= steps[i - 1] > finest ?", "= false ?"),
    Fault(
        "attempts give up without a reason",
        "search.cuh",
        "known, 0) < place_of(moves, attempt)) return 0;",
        "known, 0) <= NO_CHAIN) return 0;",
    ),
    Fault(
        "chains that meet are both made",
        "search.cuh",
        "if ((other & taken) != 0) continue;",
        "",
    ),
    Fault(
        "the chain of the first aim comes first",
        "search.cuh",
        "return moves * NUM_AIMS + attempt;",
        "return attempt * CHAIN + moves;",
    ),
    Fault(
        "longer chains of others are made",
        "search.cuh",
        " && their_moves <= best / NUM_AIMS",
        "",
    ),
    Fault("any move to a rank is recorded", "search.cuh", " && reach.keys()[rank] == key", ""),
    Fault(
        "rows that came count as before",
        "search.cuh",
        "own[to] = measure.of(c.tokens[to] += rows);",
        "c.tokens[to] += rows;",
    ),
    Fault("others begin with the first", "search.cuh", "others &= others - 1;", ";"),
    Fault("the last move alone is made", "search.cuh", "rank != first; rank =", "false; rank ="),
    Fault(
        "a chain that closes counts its first rank twice",
        "search.cuh",
        "!(closes && reach.from()[rank] == first)",
        "true",
    ),
    Fault("an emptied slot is active", "search.cuh", "active -= keep == 0;", ""),
    Fault(
        "base loads cost nothing",
        "objective.cuh",
        "sum = costs.of(base) + stays.wait();",
        "sum = stays.wait();",
    ),
    Fault("base loads are not active", "objective.cuh", "number = base > 0;", "number = 0;"),
    Fault("experts without tokens are active", "objective.cuh", "load[arc.place] > 0 && ", ""),
    Fault(
        "the bound of costs is of slots",
        "objective.cuh",
        "sum += least_of(load[arc.place], per);",
        "sum += costs.of(load[arc.place]);",
    ),
    Fault("means round down", "objective.cuh", "total.at(0) + c.shape.ranks - 1)", "total.at(0))"),
    Fault(
        "mean slots round down",
        "objective.cuh",
        "unsigned(num_active + c.shape.ranks - 1)",
        "unsigned(num_active)",
    ),
    Fault("home is never taken", "objective.cuh", "if (of_home <= min(", "if (false && min("),
    Fault("searches begin at home", "objective.cuh", "2 * by_slots >= least", "true"),
    Fault("no search begins at home", "objective.cuh", "2 * by_slots >= least", "false"),
    Fault("home is too dear in any case", "objective.cuh", "2 * of_home <= 3 * of_tokens", "false"),
    Fault(
        "the tokens' plan is never taken",
        "objective.cuh",
        "(of_best <= of_tokens) == is_near",
        "is_near",
    ),
    Fault(
        "loads without what stays",
        "objective.cuh",
        "place.load()[r] = c.staying()[r]",
        "(place.load()[r] = 0) + c.staying()[r]",
    ),
    # The interior-point method
    Fault(
        "the last copy gets nothing",
        "interior.cu",
        "before), tokens) : tokens;",
        "before), tokens) : before;",
    ),
    Fault(
        "steps out of the bounds",
        "interior.cu",
        "0.99 / ",
        "1.3 / ",
        "the flow makes any start exact",
    ),
    # Shares and slots
    Fault(
        "a copy's own rank is no earlier one",
        "shares.cuh",
        "if (rank[c] <= source) end",
        "if (rank[c] < source) end",
    ),
    Fault(
        "overlaps are one too long",
        "shares.cuh",
        "min(b, d) - max(a, c)",
        "min(b, d) - max(a, c) + 1",
    ),
    Fault("nodes take all of their tokens", "shares.cuh", "max(0, tokens - demand)", "tokens"),
    Fault(
        "other nodes' copies are full",
        "shares.cuh",
        "remote[c] - overlap(filled",
        "remote[c] - remote[c] - 0 * overlap(filled",
    ),
    Fault(
        "the last pick of a share goes on",
        "rewrite.cuh",
        "position >= ends[c]",
        "position > ends[c]",
    ),
    Fault(
        "only the worst component of a thread counts",
        "rewrite.cuh",
        "worst = max(worst, batch.endings[g].status)",
        "worst = batch.endings[g].status",
        "a thread has one, with 1,024 components or fewer",
    ),
    Fault(
        "a total of 2**31 - 1 is too large",
        "rewrite.cuh",
        "total.value() > MAX_TOTAL ?",
        "total.value() >= MAX_TOTAL ?",
    ),
    Fault(
        "INFEASIBLE batches have no counts",
        "route.cu",
        "(table, batch, status < BAD_COUNTS",
        "(table, batch, status < INFEASIBLE",
    ),
    Fault(
        "the row is not zeroed behind a plan",
        "route.cu",
        "batch.row[i] = 0;",
        "(void)batch.row[i];",
    ),
    # Plans in one launch
    Fault(
        "what a launch refuses is sent as good",
        "plan.cuh",
        "if (refused) atomicMax(&row[HEAD_STATUS], REFUSED);",
        "(void)refused;",
    ),
    Fault(
        "a launch takes the place of rows that were not read",
        "plan.cuh",
        "send_row<V::threads>(window, row, unread)",
        "send_row<V::threads>(window, row, false)",
    ),
    Fault(
        "rows of a launch lie without their heads",
        "plan.cuh",
        "p.counts.stride = exchanges ? size : E;",
        "p.counts.stride = E;",
    ),
    Fault(
        "a launch leaves its last warp's picks",
        "plan.cuh",
        "n += rewriting)\n            physical",
        "n += V::threads)\n            physical",
    ),
    Fault(
        "arrays end with their first elements",
        "plan.cuh",
        "i < number; i += V::threads) to[i] = from[i];",
        "false; i += V::threads) to[i] = from[i];",
    ),
    Fault(
        "a launch does not keep its quotas",
        "plan.cuh",
        "batch.quota[i] = quota[i];",
        "(void)quota[i];",
    ),
    Fault(
        "a batch that is not counted is sampled",
        "plan.cuh",
        "if (worst < BAD_COUNTS && total <= MAX_TOTAL) {",
        "if (true) {",
    ),
    # Batches that stay at home
    Fault(
        "every copy is a home",
        "component.cuh",
        "c.arcs[a].quota % p.max_replicas == 0) atomicAdd(&at_home",
        "true) atomicAdd(&at_home",
    ),
    Fault(
        "the bound is the mean rounded down",
        "component.cuh",
        "ending.total / ranks + (ending.total % ranks != 0));",
        "ending.total / ranks);",
    ),
    Fault(
        "what stays is no bound", "component.cuh", "max(stays, ending.total", "max(0, ending.total"
    ),
    Fault(
        "a gain as large as is asked for is too little",
        "component.cuh",
        "ending.home - ending.bound < p.least_gain",
        "ending.home - ending.bound <= p.least_gain",
    ),
    Fault(
        "the last component says whether the batch stays",
        "rewrite.cuh",
        "atomicMax(&home, batch.endings[g].home);",
        "home = batch.endings[g].home;",
    ),
    Fault("a batch that stays is a fault", "rewrite.cuh", "status > STAYED", "status != OPTIMAL"),
    # Batches that keep the slots that they came with
    Fault("kept: ranks by turns", "count.cuh", "int(id) / num_local", "int(id) % num_local"),
    Fault("kept: one rank too many", "count.cuh", "id < given.num_ids)", "id <= given.num_ids)"),
    Fault(
        "kept: loads before are not zeroed",
        "route.cu",
        "    block_stride<threads>(num_ranks, [&](int r) { by_rank[r] = 0; });\n",
        "",
    ),
    Fault(
        "kept: a row is left",
        "route.cu",
        "batch.given_load != nullptr ? table.num",
        "batch.given_load != nullptr ? 0 * table.num",
    ),
    Fault("kept: without base loads", "component.cuh", "is_given ? base : c", "is_given ? 0 : c"),
    Fault(
        "kept: with base loads",
        "component.cuh",
        "at_home[threadIdx.x] - base;",
        "at_home[threadIdx.x];",
    ),
    Fault("kept: and homes", "component.cuh", "is_given ? 0 : c.shape.arcs", "c.shape.arcs"),
    Fault("kept: by one rank's row", "component.cuh", "ranks * p.counts.num_rows", "ranks"),
    Fault("kept: not the slots", "rewrite.cuh", "return status == STAYED &&", "return false &&"),
    Fault("kept: at home, too", "rewrite.cuh", "STAYED && batch.given_load != nullptr", "STAYED"),
    Fault(
        "kept: quotas are left",
        "rewrite.cuh",
        "i < table.num_experts * table.max_replicas; i += step",
        "i < 0; ++i",
    ),
    Fault(
        "kept: as at home",
        "statistics.cuh",
        "is_away = is_planned || keeps",
        "is_away = is_planned",
    ),
    Fault(
        "kept: not in one launch",
        "plan.cuh",
        "physical.set(n, int(given.ids[n]));",
        "physical.set(n, routes.slot_of(picks.experts[n], picks.positions[n]));",
    ),
    Fault(
        "kept: not counted in one launch",
        "plan.cuh",
        "    if (p.given_load != nullptr) count_by_rank",
        "    if (false) count_by_rank",
    ),
    Fault(
        "kept: no loads for the statistics",
        "plan.cuh",
        "(keeps ? R : 0,",
        "(0,",
    ),
    Fault(
        "split: a copy without a quota",
        "route.cu",
        "min(counts[size_t(r) * E + e], quota[size_t(e) * C])",
        "counts[size_t(r) * E + e]",
    ),
    # Guests' weights and gradients
    Fault(
        "a stage is loaded before it is stored",
        "weights.cu",
        "bulk_wait_read<STAGES - AHEAD - 1>()",
        "bulk_wait_read<STAGES - AHEAD>()",
    ),
    Fault("pushes are not waited for", "weights.cu", "    bulk_wait();\n}", "}"),
    Fault(
        "a stage is stored before it is loaded",
        "weights.cu",
        "(i - AHEAD) / STAGES % 2",
        "((i - AHEAD) / STAGES + 1) % 2",
    ),
    Fault(
        "ends of rows are not copied", "weights.cu", "i = done; i < bytes", "i = bytes; i < bytes"
    ),
    Fault(
        "a chunk's sums begin in two blocks",
        "weights.cu",
        "return place == 0 ? item : item + same - place;",
        "return place == 0 ? item : item;",
    ),
    Fault("slots in place of their ranks", "weights.cu", "entry / t.num_guests", "entry % 2"),
    Fault("visits in any order", "weights.cu", "&& j < i;", "&& j > i;"),
    Fault(
        "each block sends the tickets",
        "weights.cu",
        "!= int(gridDim.x) - 1) return;",
        "< 0) return;",
    ),
    Fault("blocks are not counted anew", "weights.cu", "    *travel.num_done = 0;\n", ""),
    Fault("a ticket does not count uses", "weights.cu", "*t.batch ^ Word(t.use) << 24", "*t.batch"),
    Fault(
        "tables are not counted",
        "weights.cu",
        "if (threadIdx.x == 0 && counts)",
        "if (false && counts)",
    ),
    Fault("empty tables are counted", "weights.cu", "(alone || has_guests(travel))", "true"),
    Fault("late guests are old weights", "weights.cu", "if (is_void[slot])\n", "if (false)\n"),
    Fault("a rank that is alone is as all", "weights.cu", "== TIMED_OUT;", "== NUM_STATUSES;"),
    Fault(
        "a meeting overwrites the last", "weights.cu", "if (travel.last[other] != 0)", "if (false)"
    ),
    Fault(
        "a meeting is always complete",
        "weights.cu",
        "*travel.met = !late && !refused;",
        "*travel.met = 1;",
    ),
    Fault("a refusal is not seen", "weights.cu", " && word != ~ticket &&", " &&"),
    Fault(
        "a refused batch has further meetings",
        "weights.cu",
        "*travel.refused == *travel.batch",
        "false",
    ),
    Fault(
        "a gradient that is not there is anything",
        "weights.cu",
        "            if (span.home == nullptr) {\n",
        "            if (span.home == nullptr && false) {\n",
    ),
    Fault(
        "gradients of empty slots are laid",
        "weights.cu",
        "slot < t.num_guests && t.guests[t.rank * t.num_guests + slot] >= 0;",
        "slot < t.num_guests;",
    ),
    Fault("sums are not rounded to the even", "weights.cu", " + (bits >> 16 & 1)", " + 1"),
    Fault(
        "gradients are not void without a meeting",
        "weights.cu",
        "    if (!has_met(travel)) {",
        "    if (false) {",
    ),
    Fault(
        "a guest's offset is its home's",
        "weights.cu",
        "((visit.slot * one.bytes + begin) >> narrower)",
        "(visit.slot * one.bytes + begin)",
    ),
    # Guests
    Fault(
        "guests are not added to the holders",
        "guests.cuh",
        "add_to_set(&experts.ranks[expert], rank);",
        ";",
    ),
    Fault(
        "guests come before the residents",
        "guests.cuh",
        "take(expert, rank, one.columns + earlier,",
        "take(expert, rank, earlier,",
    ),
    Fault(
        "guests of one expert by rank alone",
        "guests.cuh",
        "if (num_slots == 1) return",
        "if (num_slots > 0) return",
    ),
    Fault(
        "a guest's slot is its rank's first",
        "guests.cuh",
        "g.num_slots - 1 - slot;",
        "g.num_slots;",
    ),
    Fault(
        "edges begin at the rank itself",
        "guests.cuh",
        "            rest &= rest - 1;\n            int target",
        "            if (nth > 0) rest &= rest - 1;\n            int target",
    ),
    Fault(
        "edges of all warps in one place",
        "guests.cuh",
        "return {before + end - own, total};",
        "return {end - own, total};",
    ),
    Fault(
        "quotas of copies that do not exist stay",
        "guests.cuh",
        "            zero_quotas(p, experts, filling, quota);",
        "            ;",
    ),
    Fault(
        "quotas of copies that do not exist stay where there are replicas",
        "guests.cuh",
        "if (zeroes) zero_quotas(",
        "if (false) zero_quotas(",
    ),
    Fault(
        "words are sent before all blocks have begun",
        "guests.cuh",
        "    if (V::blocks > 1) cluster_wait();",
        "    ",
    ),
    Fault(
        "verdicts are read before they have come",
        "choose.cuh",
        "    else arrivals_wait(&verdicts.arrived[round], 0);",
        "    else __syncthreads();",
    ),
    Fault(
        "the best fill is read before it has come",
        "choose.cuh",
        "    else if (block == 0) arrivals_wait(&verdicts.best, 0);",
        "    else __syncthreads();",
    ),
    Fault(
        "a kept fill is not sent",
        "choose.cuh",
        "        if (is_better) {\n            take_guests(start, fill, put_guest",
        "        if (true) {\n            take_guests(start, fill, put_guest",
    ),
    Fault(
        "the fill's tokens do not count as load",
        "guests.cuh",
        "atomicAdd(&c.movable()[rank], experts.filled[i]);",
        ";",
    ),
    Fault(
        "the least excess does not count",
        "fill.cuh",
        "bool may = excess[i] >= least",
        "bool may = excess[i] > least",
    ),
    Fault(
        "a copy takes more than its slack",
        "fill.cuh",
        "holds ? min(able, fill.slack[w]) : 0;",
        "holds && fill.slack[w] > 0 ? able : 0;",
    ),
    Fault(
        "excess moves to any priority",
        "fill.cuh",
        "lower >= unsigned(best) || ~lower <= key) continue;",
        "~lower <= key) continue;",
    ),
    Fault("guests do not count as copies", "fill.cuh", "= others | Set(1) << to;", "= others;"),
    Fault("slots are not used up", "fill.cuh", "fill.used[i] += lane + 32 * i == to;", ";"),
    Fault(
        "slack to spare is that of all ranks",
        "fill.cuh",
        "fill.slack[i] < 0 || fill.used[i] < num_slots ? fill.slack[i] : 0;",
        "fill.slack[i];",
    ),
    Fault(
        "the last slot fills up always",
        "fill.cuh",
        "slack - need > spare)",
        "true)",
    ),
    Fault(
        "guests suffice by one",
        "fill.cuh",
        "if (x[i] >= aim) chosen",
        "if (x[i] > aim) chosen",
    ),
    Fault(
        "later rounds aim at the target",
        "choose.cuh",
        "if (round > 0) at = low",
        "if (round < 0) at = low",
    ),
    Fault("limits that sufficed are not noted", "choose.cuh", "verdict.limit = at;", ";"),
    Fault(
        "fills with as many guests as the best are given up",
        "fill.cuh",
        "unsigned(fill.copies) > most_copies",
        "unsigned(fill.copies) >= most_copies",
    ),
    Fault(
        "sums of slack are always narrow",
        "fill.cuh",
        "__reduce_max_sync(~0u, highest) <= MAX_TOTAL / start.ranks",
        "__reduce_max_sync(~0u, highest) <= MAX_TOTAL",
        "sums as wide come in later rounds alone; 220 loads of 2 to the 31 had the same guests",
    ),
    Fault(
        "the number of copies does not count",
        "choose.cuh",
        "unsigned(fill.copies) << 20",
        "0u << 20",
    ),
    Fault("senders do not count", "choose.cuh", "unsigned(most_sent(start, fill)) << 8", "0u << 8"),
    Fault(
        "guests that gain little are taken",
        "choose.cuh",
        "high > verdicts.level - g.min_tokens)",
        "high > verdicts.level)",
        "of fills that gain as little the one without guests is the best",
    ),
    Fault(
        "the mean is of this domain alone",
        "choose.cuh",
        "if (p.num_components == 1) {",
        "if (p.num_components > 0) {",
    ),
    Fault(
        "levels without speeds",
        "choose.cuh",
        "return general ? int(((long long)load * largest",
        "return false ? int(((long long)load * largest",
    ),
    Fault(
        "the rest of a split goes to the last",
        "choose.cuh",
        "(number_of<V>(holders & below<V>(rank)) < own % number)",
        "(number_of<V>(holders & ~below<V>(rank)) <= own % number)",
    ),
    # Guests by cost
    Fault(
        "waits cost nothing",
        "objective.cuh",
        "sum = costs.of(base) + stays.wait();",
        "sum = costs.of(base);",
    ),
    Fault(
        "threads have their first place in later rounds, too",
        "guests.cuh",
        "        if (begin > 0) {",
        "        if (false) {",
    ),
    Fault(
        "edges of later rounds overwrite",
        "guests.cuh",
        "        before += sums.total;",
        "        ;",
    ),
    Fault("sums of two rounds share their place", "guests.cuh", "round ^= 1", "round ^= 0"),
    Fault(
        "a thread has one replica",
        "guests.cuh",
        "i < g.max_replicas; i += V::threads) experts.replicas[i]",
        "i < 0; i += V::threads) experts.replicas[i]",
    ),
    Fault(
        "a thread has one place",
        "choose.cuh",
        "i < num_ranks * S; i += V::threads)",
        "i < 0; i += V::threads)",
    ),
    Fault(
        "a rank does not wait for what homes send to others",
        "guests_by_cost.cuh",
        "return max(own, most);",
        "return own;",
    ),
    Fault(
        "guests without tokens are kept", "guests_by_cost.cuh", "if (tokens == 0) {", "if (false) {"
    ),
    Fault(
        "no second search",
        "guests_by_cost.cuh",
        "if (--searches > 0 && trial.dropped) continue;",
        "--searches;",
    ),
    Fault(
        "two searches always",
        "guests_by_cost.cuh",
        "if (--searches > 0 && trial.dropped) continue;",
        "if (--searches > 0) continue;",
        "a search that begins where one with the same waits ended finds nothing more",
    ),
    Fault(
        "dropped guests are waited for",
        "guests_by_cost.cuh",
        "- Amount(push) * fewer",
        "- 0 * fewer",
    ),
    Fault("the last choice is taken", "guests_by_cost.cuh", "its > best ||", "its == NEVER ||"),
    Fault(
        "guests of choices that cost the same do not count",
        "guests_by_cost.cuh",
        "its == best && its_number >= fewest",
        "its == best",
    ),
    Fault(
        "all choices have the problem's tolerance",
        "guests_by_cost.cuh",
        "own.tolerance = max(g.tolerance, rule >> 1);",
        ";",
    ),
    Fault(
        "no guest must be worth its push",
        "guests_by_cost.cuh",
        "if (rule & 1) own.min_tokens = choices.worth;",
        "",
    ),
    Fault(
        "choices are counted once",
        "guests_by_cost.cuh",
        "        if (last) choices.num_done[which] = 0;\n",
        "",
    ),
    Fault(
        "the tokens of a fill are not the start",
        "guests_by_cost.cuh",
        "                if (is_filled) start_filled",
        "                if (false) start_filled",
    ),
    Fault(
        "quotas of copies that do not exist stay, by cost",
        "guests_by_cost.cuh",
        "if (writes) zero_quotas(",
        "if (false) zero_quotas(",
    ),
    Fault(
        "by cost the residents seem to be solved",
        "guests.cuh",
        "has_replicas = V::choices == 1 && g.max_replicas > 0;",
        "has_replicas = g.max_replicas > 0;",
    ),
    Fault(
        "no fence before the last block reads the plans",
        "guests_by_cost.cuh",
        "    __threadfence();  // the plans of the other",
        "    // the plans of the other",
        "memory is seen in the order of execution",
    ),
    # Statistics
    Fault("a sample too few", "statistics.cuh", "before % statistics.every != 0", "before != 0"),
    Fault("samples lie in one place", "statistics.cuh", "% statistics.num_samples;", "% 1;"),
    Fault("threads share all rows", "statistics.cuh", "int part = i / E,", "int part = 0,"),
    Fault(
        "times are rounded down", "statistics.cuh", "* total_speed + speed - 1)", "* total_speed)"
    ),
    Fault("no base loads at home", "statistics.cuh", "(at_home[r] + base)", "(at_home[r])"),
    Fault(
        "T* of every batch",
        "statistics.cuh",
        "is_planned && statistics.by_tokens ? load",
        "true ? load",
    ),
    Fault(
        "samples of batches that are planned again",
        "statistics.cuh",
        "|| batch.again) return",
        ") return",
    ),
    Fault(
        "marked one late",
        "statistics.cuh",
        "num_batches(word) % statistics",
        "(num_batches(word) - 1) % statistics",
    ),
    Fault("the worst batch is the last", "statistics.cuh", "load_before == 0 ||", "true ||"),
    Fault(
        "windows go on",
        "statistics.cuh",
        "begins = of_lane(TALLY_WINDOW) != window",
        "begins = false",
    ),
    Fault(
        "batches with no counts are sampled",
        "route.cu",
        "        if (status < BAD_COUNTS)\n",
        "",
    ),
    # Quotas of an earlier batch
    Fault("reused: a turn late", "exchange.cuh", "turn + 1) %", "turn + 2) %"),
    Fault("reused: sent", "exchange.cuh", "        if (turn != 0) return;\n", ""),
    Fault(
        "reused: blocks of the batch before are done",
        "exchange.cuh",
        "            if (turn != 0) window.state->num_done = 0;\n",
        "",
    ),
    Fault("reused: has a number", "route.cu", " && turn_of(window) == 0", ""),
    Fault("reused: solved", "flow.cuh", "    if (is_reused(p.turn)) return;\n", ""),
    Fault("reused: takes counts", "flow.cuh", "is_reused(p.turn) ? 0 : ", ""),
    Fault("reused: by counts before", "route.cu", "batch.own, batch", "batch.counts, batch"),
    Fault("reused: sent home", "route.cu", "if (!reused && status", "if (status"),
    Fault("reused: a fault", "rewrite.cuh", "STAYED && status != REUSED)", "STAYED)"),
    Fault("reused: ranks round alike", "rewrite.cuh", "(this_rank + expert) % R", "expert % R"),
    Fault("reused: rounded down", "rewrite.cuh", "end - begin + total - 1)", "end - begin)"),
    Fault("a mask keeps all", "route.cu", "given[n] < 0 ? Index(-1)", "false ? Index(-1)"),
]

SURVIVING_BARRIERS = {
    "an aligned arrival wants the whole warp, behind the initialisation": (
        "the emulator lets each thread arrive alone, and the last one has initialised the words"
    ),
    "the plan is written before the block is counted as done": (
        "blocks are not compared with each other, and memory is seen in the order of execution"
    ),
    "this chunk's tokens are subtracted before the next chunk reads a copy's rest": (
        "the barrier before it suffices; it goes when GPUs have run without it"
    ),
}
"""Of barriers that no test misses: the words behind them, and why."""

TESTS = {
    "abi.cuh": "route",
    "barrier.cu": "exchange",
    "component.cuh": "solvers route",
    "count.cuh": "route",
    "counts.cuh": "solvers",
    "exchange.cuh": "exchange",
    "choose.cuh": "guests",
    "fill.cuh": "guests",
    "flow.cuh": "solvers exchange",
    "guests.cuh": "guests guests_by_cost",
    "guests_by_cost.cuh": "guests_by_cost",
    "interior.cu": "solvers",
    "number.cuh": "route",
    "objective.cuh": "objectives guests_by_cost",
    "plan.cuh": "exchange route",
    "push.cuh": "solvers",
    "relay.cuh": "exchange",
    "rewrite.cuh": "route exchange",
    "route.cu": "route exchange",
    "rows.cuh": "solvers",
    "search.cuh": "objectives",
    "sets.cuh": "solvers",
    "shares.cuh": "route",
    "speeds.cuh": "solvers",
    "statistics.cuh": "route",
    "weights.cu": "weights",
}
"""The files of tests for each source."""


def barriers() -> Iterator[Fault]:
    """A fault for each barrier: without it."""
    pattern = r"(?:__sync(?:threads|warp)|sync_pushing<V>|meet)\(\);  // (.*)"
    for path in sorted((ROOT / "kernels").glob("*.cu*")):
        for found in re.finditer(pattern, path.read_text("utf-8")):
            name = f"no barrier: {found[1]}"
            yield Fault(name, path.name, found[0], "", SURVIVING_BARRIERS.get(found[1], ""))


def run(fault: Fault, kept: Path) -> str:
    """What the tests say; empty: they pass.

    Args:
        fault: the change.
        kept: where libraries of unchanged sources are kept.
    """
    with tempfile.TemporaryDirectory() as directory:
        kernels = Path(directory) / "kernels"
        shutil.copytree(ROOT / "kernels", kernels)
        source = kernels / fault.source
        text = source.read_text("utf-8")
        assert text.count(fault.old) == 1, f"{fault.name}: {text.count(fault.old)} places"
        source.write_text(text.replace(fault.old, fault.new), "utf-8")
        tests = [HERE / f"test_emulated_{name}.py" for name in TESTS[fault.source].split()]
        environ = {"LPLB_TEST_KERNELS": str(kernels), "LPLB_TEST_EMULATED": str(kept)}
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "--tb=short",
                "-p",
                "no:cacheprovider",
                *tests,
            ],
            env={**os.environ, **environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    if result.returncode == 0:
        return ""
    errors = re.findall(r"^E +(.*)", result.stdout, re.MULTILINE)
    compiler = re.findall(r"error: (?:static assertion failed: )?(.*)", result.stdout)
    return (compiler or errors or [result.stdout[-300:] + result.stderr[-300:]])[0]


def main(parts: list[str]) -> int:
    """Runs the faults whose name has one of the parts; 1 if one does not fare as recorded."""
    wrong = 0
    with tempfile.TemporaryDirectory() as kept:
        for fault in [*FAULTS, *barriers()]:
            if parts and not any(part in f"{fault.source}: {fault.name}" for part in parts):
                continue
            found = run(fault, Path(kept))
            as_recorded = bool(found) != bool(fault.survives)
            wrong += not as_recorded
            verdict = ("dies" if found else "survives") + (
                "" if as_recorded else " AGAINST ITS RECORD"
            )
            print(f"{fault.source}: {fault.name}: {verdict}: {found or fault.survives}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
