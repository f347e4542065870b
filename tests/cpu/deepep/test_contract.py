"""The table of the drop-ins' contract, and classes that differ from it."""

import functools
import inspect
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from recording_buffer import OTHER, PLACEMENT, TOPK, E, Event, P, X, arrived, planned, recorder

import lplb_ep
from lplb_ep import ContractError, embedded
from lplb_ep.deepep import contract, drop_in, hooks, patch
from lplb_ep.layer import channels

TABLES = {
    ("1.2.1", "Buffer"): contract.BUFFER_1_2_1,
    ("2.1.0", "Buffer"): contract.BUFFER_2,
    ("2.1.0", "ElasticBuffer"): contract.ELASTIC_BUFFER,
}


def recorded_signatures():
    """What `signatures.txt` says: (version, class) → [(name, whether static, arguments)]."""
    classes = {}
    for line in (Path(__file__).parent / "signatures.txt").read_text().splitlines():
        if line.startswith("["):
            methods = classes.setdefault(tuple(line.strip("[]").split()), [])
        elif line and not line.startswith("#"):
            name, arguments = line.removesuffix(")").split("(")
            static = name.startswith("static ")
            methods.append((name.removeprefix("static "), static, arguments))
    return classes


SIGNATURES = recorded_signatures()


def made(version, class_name, change=lambda name, arguments: arguments):
    """A class with the signatures of a version of DeepEP, after a change: None drops a method."""
    scope, members = {}, {}
    for name, static, arguments in SIGNATURES[version, class_name]:
        arguments = change(name, arguments)
        if arguments is not None:
            exec(f"def {name}({arguments.replace('=', '=None')}): pass", scope)
            members[name] = staticmethod(scope[name]) if static else scope[name]
    cls = type(class_name, (), members)
    cls.__module__ = "deep_ep.buffer"
    return cls


@pytest.fixture
def version_of_deep_ep(monkeypatch):
    def install(version):
        package = types.ModuleType("deep_ep")
        package.__version__ = version
        monkeypatch.setitem(sys.modules, "deep_ep", package)

    return install


# Every argument of the table, and every method: those alone in their group are optional.
ENTRIES = [
    (version, class_name, name, argument)
    for (version, class_name), table in TABLES.items()
    for name, method in table.methods.items()
    for argument in (None, *method.arguments)
    if argument is not None or name not in ("__init__", "internode_dispatch")
]


# --- the classes as they are ----------------------------------------------------------------------


@pytest.mark.parametrize(("version", "class_name"), TABLES)
def test_deep_ep_as_it_is_keeps_the_contract(version_of_deep_ep, version, class_name):
    version_of_deep_ep(version)
    cls, table = made(version, class_name), TABLES[version, class_name]
    found = contract.contract_of(cls)
    assert (found.methods, found.distinct_picks) == (table.methods, table.distinct_picks)
    assert found.limits.owner == f"DeepEP {version}'s {class_name}"
    assert found.limits.low_latency_hidden == table.limits.low_latency_hidden
    assert contract.unknown_methods(cls, table) == []
    assert issubclass(drop_in.drop_in_of(cls), cls)


@pytest.mark.parametrize("cls", [embedded.Buffer, embedded.ElasticBuffer])
def test_the_embedded_buffers_keep_the_contract(cls):
    found = contract.contract_of(cls)
    assert contract.unknown_methods(cls, found) == []
    assert found.limits == contract.NONE


def test_every_hook_is_in_the_table():
    for class_name, of_class in hooks.HOOKS.items():
        (table, *_) = [t for (_, name), t in TABLES.items() if name == class_name]
        called = {"__init__", "capture", "get_low_latency_rdma_size_hint"}
        assert {*of_class} == {*table.methods} - called


def test_the_documents_have_the_table():
    text = (Path(__file__).parents[3] / "docs" / "drop_in.md").read_text()
    for table in TABLES.values():
        for name, method in table.methods.items():
            arguments = ", ".join(f"`{argument}`" for argument in method.arguments)
            assert f"| `{table.class_name}` | `{name}` | {arguments} |" in text


# --- methods and arguments that are missing or new ------------------------------------------------


@pytest.mark.parametrize(("version", "class_name", "name", "argument"), ENTRIES)
def test_what_is_renamed_is_named(version_of_deep_ep, version, class_name, name, argument):
    version_of_deep_ep(version)

    def change(method, arguments):
        if method != name:
            return arguments
        return None if argument is None else re.sub(rf"\b{argument}\b", "renamed", arguments)

    cls = made(version, class_name, change)
    what = f"method {name}" if argument is None else f"argument {argument} of method {name}"
    with pytest.raises(ContractError) as raised:
        drop_in.drop_in_of(cls)
    assert f"deep_ep.buffer.{class_name} (DeepEP {version}) lacks" in str(raised.value)
    assert f": {what}. Use DeepEP 1.2.1 or 2.1" in str(raised.value)


@pytest.mark.parametrize("group", ["low latency", "internode"])
def test_a_class_without_a_group_of_methods_is_served(group):
    methods = contract.BUFFER_1_2_1.methods
    absent = {name for name, method in methods.items() if method.group == group}
    cls = made("1.2.1", "Buffer", lambda name, args: None if name in absent else args)
    assert {name for name in methods if not hasattr(drop_in.drop_in_of(cls), name)} == absent


def test_a_class_of_another_name_has_no_drop_in():
    with pytest.raises(ContractError, match=r"no drop-in for deep_ep.buffer.HybridEPBuffer"):
        drop_in.drop_in_of(type("HybridEPBuffer", (), {"__module__": "deep_ep.buffer"}))


def test_a_patch_of_classes_that_do_not_fit_changes_none(monkeypatch, mode):
    mode("1")
    module = recorder()
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    monkeypatch.setattr(drop_in, "choose_backend", lambda backend: ("deep_ep", "for the test"))
    del module.ElasticBuffer.get_theoretical_num_sms
    before = dict(vars(module.Buffer))
    with pytest.raises(ContractError, match=r"ElasticBuffer .* lacks .*: method get_theoretical_n"):
        patch.patch()
    assert dict(vars(module.Buffer)) == before
    assert drop_in.patched == {}


class Decorated:
    """A method that a decorator has made an object of its own."""

    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args):
        return self.__wrapped__(*args)


class Later(recorder().Buffer):
    """With methods that came later, and an argument."""

    def low_latency_dispatch_v2(self, x, topk_idx, num_experts):
        return topk_idx, num_experts

    def warm_up(self, num_experts):
        return num_experts

    @staticmethod
    def size_hint(num_experts):
        return num_experts

    @classmethod
    def tune(cls, num_experts):
        return cls.size_hint(num_experts)

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, sm_margin=0
    ):
        self.sm_margin = sm_margin
        return super().get_dispatch_layout(topk_idx, num_experts, previous_event, async_finish)

    low_latency_warm_up = functools.partialmethod(warm_up)

    @Decorated
    def decorated_warm_up(self, num_experts):
        return num_experts


Later.__name__ = "Buffer"


def test_a_method_that_takes_experts_and_is_unknown_is_refused_while_a_placement_is_in_force(
    group, mode
):
    mode("1")
    buffer = drop_in.drop_in_of(Later)(group)
    assert buffer.low_latency_dispatch_v2(X, TOPK, E) == (TOPK, E)
    for inside in (buffer.view(PLACEMENT), buffer):
        with lplb_ep.use(OTHER), pytest.raises(ContractError, match=r"Buffer.low_latency_dispatc"):
            inside.low_latency_dispatch_v2(X, TOPK, num_experts=E)
        for warm_up in (inside.warm_up, inside.low_latency_warm_up, inside.decorated_warm_up):
            with lplb_ep.use(OTHER), pytest.raises(ContractError, match=r"warm_up takes experts"):
                warm_up(E)
    with pytest.raises(ContractError, match="no placement is in force"):
        buffer.warm_up(E)
    # Static and class methods know no buffer: these ranks have planned.
    for method in (buffer.size_hint, buffer.tune, type(buffer).size_hint, type(buffer).tune):
        with pytest.raises(ContractError, match=r"Buffer.(size_hint|tune) takes experts"):
            method(E)
    channels.clear()
    with lplb_ep.use(OTHER), pytest.raises(ContractError, match=r"Buffer.tune takes experts"):
        buffer.tune(E)
    assert buffer.size_hint(E) == buffer.tune(E) == E
    mode("0")
    assert drop_in.drop_in_of(Later)(group).low_latency_dispatch_v2(X, TOPK, E) == (TOPK, E)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_new_optional_argument_passes_through(group, mode, by_name):
    mode("1")
    buffer = drop_in.drop_in_of(Later)(group, placement=PLACEMENT, num_local_slots=P)
    layout = (TOPK, E, None, False)
    if by_name:
        buffer.get_dispatch_layout(*layout, sm_margin=7)
    else:
        buffer.get_dispatch_layout(*layout, 7)
    assert buffer.sm_margin == 7
    assert torch.equal(arrived(buffer, "get_dispatch_layout")["topk_idx"], planned())


def test_results_that_are_laid_out_otherwise_are_named(group, mode):
    mode("1")

    def results(cls, method, change):
        def changed(self, *args, **kwargs):
            return change(getattr(super(made_, self), method)(*args, **kwargs))

        members = {method: changed, "__module__": cls.__module__}
        changed.__signature__ = inspect.signature(getattr(cls, method))
        made_ = type(cls.__name__, (cls,), members)
        return drop_in.drop_in_of(made_)(group, num_rdma_bytes=1 << 20).view(PLACEMENT)

    module = recorder()
    swapped = results(
        module.Buffer, "get_dispatch_layout", lambda r: (r[0], r[1], r[3], r[2], r[4])
    )
    with pytest.raises(ContractError, match=r"must return is_token_in_rank as result\[3\]; got T"):
        swapped.get_dispatch_layout(TOPK, E)
    no_tuple = results(module.Buffer, "low_latency_dispatch", lambda r: (r[0], r[1], 5))
    with pytest.raises(ContractError, match=r"handle's first tensor as result\[2\]\[0\]; got None"):
        no_tuple.low_latency_dispatch(X, TOPK, 4, E)
    short = results(module.ElasticBuffer, "dispatch", lambda r: r[:3])
    with pytest.raises(ContractError, match=r"ElasticBuffer.dispatch must return an EPHandle as"):
        short.dispatch(X, TOPK, E)
    event_first = results(
        module.ElasticBuffer, "dispatch", lambda r: (*r[:3], Event([], "of the dispatch"), r[3])
    )
    with pytest.raises(ContractError, match=r"an EPHandle as result\[3\]; got Event in"):
        event_first.dispatch(X, TOPK, E)


def test_a_buffer_without_its_attributes_is_named(group, mode):
    mode("1")
    cls = drop_in.drop_in_of(made("1.2.1", "Buffer"))
    with pytest.raises(ContractError, match="Buffer has no attribute group, on which lplb_ep reli"):
        cls(group)


# --- what must go on as before --------------------------------------------------------------------


def test_classes_pickle_and_instances_are_recognised(deep_ep, mode, group):
    mode("1")
    for _ in range(2):
        cls = lplb_ep.Buffer
        assert pickle.loads(pickle.dumps(cls)) is cls
        view = cls(group).view(PLACEMENT)
        assert isinstance(view, cls)
        assert isinstance(view, deep_ep.Buffer)
        assert type(view).__name__ == "Buffer"
        # After the patch the class pickles as DeepEP's own.
        deep_ep.Buffer.__module__, deep_ep.Buffer.__qualname__ = "deep_ep", "Buffer"
        patch.patch()
