"""Generated tests on every backend: many examples where a call takes microseconds, fewer where it is emulated."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = {"cpu": 2000, "cuda": 1000, "triton": 500, "sim": 500, "interpret": 60}


def generated(*strategies: st.SearchStrategy) -> Callable:
    """Decorates `body(backend, *values)`; makes a pytest test that draws the values EXAMPLES[backend] times."""

    def decorate(body):
        def test(backend):
            @settings(max_examples=EXAMPLES[backend.name])
            @given(st.tuples(*strategies))
            def examples(values):
                body(backend, *values)

            examples()

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        return test

    return decorate
