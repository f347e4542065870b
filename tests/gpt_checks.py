"""How runs of the small GPT of `gpt.py` are compared: plain, with all at home, and balanced."""

import ranks
import torch
from gpt import train

OFF = {"LPLB_EP": "0"}
HOME = {"LPLB_EP": "home"}
ON = {"LPLB_EP": "1", "LPLB_EP_GUEST_MIN_TOKENS": "1", "LPLB_EP_CHECK": "1"}
# Sums of float32 in another order. Adam makes much of small gradients: its steps are of 0.01.
CLOSE = dict(rtol=2e-4, atol=2e-4)
COARSE = dict(rtol=0.05, atol=0.02)


def compare(plain, other, **tolerance):
    """Losses, norms, first gradients and last weights of runs, by rank."""
    for want, got in zip(plain, other, strict=True):
        for part, expected in zip(got[:4], want[:4], strict=True):
            torch.testing.assert_close(part, expected, **tolerance)


def check_balanced(results, replicas=False):
    reports = [row for result in results for row in result[4]]
    assert reports
    assert all(set(row.by_status) == {"OPTIMAL"} for row in reports)
    assert (sum(row.guests for row in reports) > 0) != replicas
    assert max(row.home_imbalance for row in reports) > 1.3
    assert all(row.imbalance < 1.1 for row in reports)


def check_run(num_ranks, run):
    """Trains plain, with all at home and balanced. Home is plain bit for bit, balanced nearly."""
    plain = ranks.run(num_ranks, train, run, environ=OFF)
    compare(plain, ranks.run(num_ranks, train, run, environ=HOME), rtol=0, atol=0)
    balanced = ranks.run(num_ranks, train, run, environ=ON)
    compare(plain, balanced, **(COARSE if run.config.get("bf16") else CLOSE))
    check_balanced(balanced, replicas="replicas" in run.balance)
