"""The gateway against its own /openapi.json: whatever the document allows is answered as the document says."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from fuzz.conftest import SLOW_CASES, Neighbour
from server.conftest import Server

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
LOOSE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
LEAST_OPERATIONS = 8


def try_all(url: str, *, count: int) -> None:
    """So many cases of every operation."""
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= LEAST_OPERATIONS
    for operation in operations:

        @settings(
            max_examples=count, deadline=None, derandomize=count < 100, database=None, suppress_health_check=LOOSE
        )
        @given(case=operation.as_strategy())
        def keeps_its_word(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        keeps_its_word()


def test_every_operation_keeps_its_word(fuzzed: Server, neighbour: Neighbour) -> None:
    try_all(fuzzed.gateway, count=12)


@pytest.mark.slow
def test_every_operation_keeps_its_word_many_times(fuzzed: Server, neighbour: Neighbour) -> None:
    try_all(fuzzed.gateway, count=SLOW_CASES // 20)
