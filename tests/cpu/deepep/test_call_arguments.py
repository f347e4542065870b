"""Arguments of a call by name."""

import pytest

from lplb_ep import ContractError
from lplb_ep.deepep.calls import Original, is_inside


def method(self, x, topk_idx=None, *, num_experts=4, **others):
    return self, x, topk_idx, num_experts, others, is_inside.get()


ORIGINAL = Original(method)


def call(owner, *args, **kwargs):
    return ORIGINAL.call((owner,), args, kwargs)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (call("s", 1), (1, None, 4)),
        (call("s", 1, 2), (1, 2, 4)),
        (call("s", 1, topk_idx=2, num_experts=3), (1, 2, 3)),
        (call("s", topk_idx=2, x=1), (1, 2, 4)),
        (call("s"), (None, None, 4)),
    ],
)
def test_arguments_are_read_by_name(made, expected):
    assert tuple(made[name] for name in ("x", "topk_idx", "num_experts")) == expected


def test_arguments_are_replaced_where_they_stand():
    positional, named, absent = (
        call("s", 1, 2, num_experts=3),
        call("s", 1, topk_idx=2),
        call("s", 1),
    )
    for made in (positional, named, absent):
        made["topk_idx"], made["num_experts"] = "slots", 6
        assert made["topk_idx"] == "slots"
        assert made.forward() == ("s", 1, "slots", 6, {}, True)
    assert not is_inside.get()


def test_unknown_names_raise():
    made = call("s", 1)
    message = "method has no argument 'topk_ids', on which lplb_ep relies"
    with pytest.raises(ContractError, match=message):
        made["topk_ids"]
    assert made.get("num_experts") is None  # it was not passed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call("s"), "missing a required argument: 'x'"),
        (call("s", 1, x=1), "multiple values for argument 'x'"),
        (call("s", 1, 2, 3), "too many positional arguments"),
    ],
)
def test_arguments_that_the_method_does_not_take_are_refused(wrong, message):
    for refuses in (wrong.check, wrong.forward):
        with pytest.raises(TypeError):
            refuses()
    with pytest.raises(TypeError, match=message):
        wrong.check()
