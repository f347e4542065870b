"""The modules of the package that a call passes, and the calls from one module into another."""

import sys

PACKAGE = "lplb_ep."


def module_of(frame):
    """The module of a frame, without the package's name; None outside the package."""
    name = frame.f_globals.get("__name__", "")
    return name.removeprefix(PACKAGE) if name.startswith(PACKAGE) else None


def modules_on_stack():
    """The modules of the calls that are under way, outermost first, neighbours once."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        module = module_of(frame)
        if module is not None and module not in found[-1:]:
            found.append(module)
        frame = frame.f_back
    return found[::-1]


def crossings(call):
    """[(module, module)] of each call from one module into another while `call()` runs."""
    found = []

    def trace(frame, event, _):
        into = module_of(frame) if event == "call" else None
        while into is not None and (frame := frame.f_back) is not None:
            if (caller := module_of(frame)) is not None:
                found.append((caller, into))
                break

    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [(caller, into) for caller, into in found if caller != into]
