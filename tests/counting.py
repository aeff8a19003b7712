"""How many functions a piece of work calls: the same on every machine, as seconds are not."""

import sys


def calls_of(work):
    """Count the functions that a piece of work enters on this thread, Python's own included."""
    calls = 0

    def count(_frame, event, _argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls
