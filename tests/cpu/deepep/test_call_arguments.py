"""Arguments of a call by name, found by position."""

import pytest

from lplb_ep import ContractError
from lplb_ep.deepep.calls import Call, Original, is_inside


def method(self, x, topk_idx=None, *rest, num_experts=4, **others):
    return self, x, topk_idx, rest, num_experts, others, is_inside.get()


ORIGINAL = Original(method)


def call(*args, **kwargs):
    return Call(ORIGINAL, [*args], kwargs)


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
        assert made.forward() == ("s", 1, "slots", (), 6, {}, True)
    assert not is_inside.get()


def test_unknown_names_raise():
    made = call("s", 1)
    message = "method has no argument 'topk_ids', on which lplb_ep relies"
    with pytest.raises(ContractError, match=message):
        made["topk_ids"]
    with pytest.raises(ContractError, match=message):
        made["topk_ids"] = 1
    assert made.get("topk_ids") is None
    assert made.get("num_experts") == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call("s"), "missing a required argument: 'x'"),
        (call("s", 1, x=1), "multiple values for argument 'x'"),
    ],
)
def test_arguments_that_the_method_does_not_take_are_refused(wrong, message):
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            wrong.check()


def test_a_number_of_arguments_with_names_is_bound_once(monkeypatch):
    original, bound = Original(method), []
    bind = original._signature.bind
    monkeypatch.setattr(
        original,
        "_signature",
        type("", (), {"bind": lambda _, *a, **k: bound.append(bind(*a, **k))})(),
    )
    for x in range(3):
        Call(original, ["s", x], {"num_experts": x}).check()
        Call(original, ["s", x, x], {}).check()
    assert len(bound) == 2
