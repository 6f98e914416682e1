"""The contract's properties in both plans of the Triton engine, on cases that strategies draw.

Splits, carried states, truncated backpropagation, packed and padded sequences: the tests of tests/memory in float32 and
float16. The first cases drawn are the smallest: no tokens, one sequence. Without a GPU an example takes about a second.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hope_kernels import available_backends
from tests.cases import Precision, oracle_results, package_results
from tests.memory import test_packed as packed
from tests.strategies import split_problems

STATUS = available_backends()["triton"]
pytestmark = pytest.mark.skipif(not STATUS, reason=f"triton: {STATUS.reason}")

FULL, HALF = Precision(torch.float32, 5e-5), Precision(torch.float16, 2e-2)
FEW, MANY = 6, 40


def property_test(check: Callable, **strategies: st.SearchStrategy) -> Callable:
    """``check(backend, precision, **case)`` of drawn cases: a few in the default tier, many in the slow one."""

    @pytest.mark.parametrize(
        ("plan", "precision", "examples"),
        [
            pytest.param("resident", FULL, FEW, id="resident-float32"),
            pytest.param("tiled", HALF, FEW, id="tiled-float16"),
            pytest.param("resident", FULL, MANY, id="resident-float32-many", marks=pytest.mark.slow),
            pytest.param("resident", HALF, MANY, id="resident-float16-many", marks=pytest.mark.slow),
            pytest.param("tiled", FULL, MANY, id="tiled-float32-many", marks=pytest.mark.slow),
        ],
    )
    def test(plan: str, precision: Precision, examples: int) -> None:
        # To shrink a case takes minutes; a deadline would measure how busy the machine is.
        @settings(max_examples=examples, phases=[Phase.generate], deadline=None)
        @given(**strategies)
        def each(**case: object) -> None:
            check(f"triton:{plan}", precision, **case)

        each()

    return test


def _split(backend: str, precision: Precision, *, case: tuple, bptt_chunks: int | None) -> None:
    problem, lengths = case
    precision.compare(
        backend,
        problem,
        lambda p: package_results(p, backend=backend, lengths=lengths, bptt_chunks=bptt_chunks),
        lambda p: oracle_results(p, bptt_chunks=bptt_chunks),
    )


# Smaller cases than those of tests/memory: what takes time is the number of programs times chunks and calls.
test_any_split_equals_the_token_loop_in_values_and_all_gradients = property_test(
    _split, case=split_problems(max_batch=2, max_heads=1, max_tokens=8), bptt_chunks=st.sampled_from([None, None, 1, 2])
)
test_packed_sequences_equal_separate_ones = property_test(
    packed.assert_packed_sequences_equal_separate_ones,
    **packed.PACKED | {"lengths": st.lists(st.integers(0, 7), min_size=1, max_size=3), "heads": st.just(1)},
)
test_packed_calls_continue_each_sequence_from_its_own_position = property_test(
    packed.assert_packed_calls_continue_each_sequence,
    **packed.PACKED_CALLS
    | {
        "calls": st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=2, max_size=2),
        "heads": st.just(1),
    },
)
test_padded_rows_equal_unpadded_ones_whatever_the_padding_holds = property_test(
    packed.assert_padded_rows_equal_unpadded_ones,
    **packed.PADDED
    | {
        "ranges": st.integers(0, 7).flatmap(lambda t: st.tuples(st.just(t), packed.valid_ranges(2, t))),
        "heads": st.just(1),
    },
)
