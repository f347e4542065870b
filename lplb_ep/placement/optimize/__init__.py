"""Tables of experts for the linear program: the optimum stays low for possible future loads.

For a set S of ranks, the load of the experts whose copies all lie in S, over |S|, is a lower bound.
The largest over all sets is T*, the optimum of a load. The search minimises its excess over the
mean in scenarios: the samples, and loads at several strengths of drift from them. At each strength
to halve the excess is worth as much. A mean over all scenarios would be that of the far ones, most
of whose excess no table avoids.

- `starts` makes tables: copies by expected load, on ranks that share as few experts as possible.
- `bounds` balances quotas along pairs of copies, in all scenarios at once: coordinate descent on
  the sum of squares. The level sets of the result are the sets S above. So they bound each T* from
  both sides.
- `cuts` keeps the sets found so far (Kelley 1960, Benders 1962). They give the effect of every
  change of a slot and of every swap at once, to first order, by products of matrices.
- `search` balances the best of these moves, which keeps one or brings new cuts.
- `build` lets the exact solver choose among the first and last tables of the searches. The
  gap between the bounds differs by table, and is 0.02 of the mean for some of LPLB's pairs.

The mean rank load is the unit of all loads. The same arguments give the same table on one machine,
whatever its threads, unless a time budget ends the search. Other libraries or instructions may
round a logarithm in another way. So ranks should share a table that one of them made.
"""
