"""What `examples/moe_layer.py` prints, read and judged."""

import re


def check(out, tolerance, *, differs=False):
    """Balanced is as home, and as balanced as can be.

    Args:
        out: what the example printed.
        tolerance: of losses and gradients, relative.
        differs: whether sums are ordered differently at every step that is compared.

    Returns:
        The plans' imbalances, of each layer before copies are placed, then, and after another text.
    """
    steps = re.findall(r"^(\d+) +([\d.]+) +([\d.]+) +([\d.e+-]+)$", out, re.MULTILINE)
    assert [int(step) for step, *_ in steps] == [0, 2, 3]
    for _, balanced, home, difference in steps:
        assert abs(float(balanced) - float(home)) <= tolerance * float(home)
        assert float(difference) < tolerance
        assert float(difference) > 0 or not differs
    plans = []
    for home, plan, bound, *_ in rows(out):
        assert bound <= plan <= home
        assert plan < bound + 0.02  # whole tokens
        plans.append(plan)
    assert len(plans) == 6
    return plans


def rows(out):
    """The table of imbalances: home, plan, bound and, without static copies, what those reach."""
    found = re.findall(r"^layer \d, .*?((?: +\d\.\d{3}){6,8})$", out, re.MULTILINE)
    return [[float(number) for number in row.split()] for row in found]
