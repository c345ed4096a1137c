# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document is what the application does, shown with generated requests.

The engine is fake. `tests/serving` sends 5,000 through Ray Serve.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema_rs import meta
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.config import Auth
from serve.guard import Guard
from serve.openapi import document
from tests.unit.serve_site import routes_over
from tests.unit.test_serve_guard import Books

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


HOST = {"host": "localhost"}


def application(folder: Path, auth: Auth) -> Guard:
    """Return the whole application with a fake engine."""
    return Guard(routes_over(folder).app(), ring=auth.ring(), desk=Books())


def test_the_document_is_valid_and_every_reference_leads_somewhere() -> None:
    made = document("1")
    for schema in made["components"]["schemas"].values():
        meta.validate(schema)
    schemathesis.openapi.from_dict(made)


def hold(schema: Any, *, examples: int, **how: Any) -> Counter[int]:
    """Send so many requests to each operation; return how often each status came back."""
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=found.ok().as_strategy())
        def holds(case: Any) -> None:
            response = case.call(**how)
            case.validate_response(response, checks=CHECKS)
            statuses[response.status_code] += 1

        holds()
    return statuses


def test_no_request_breaks_the_application_or_its_document(tiny_model: Path) -> None:
    schema = schemathesis.openapi.from_asgi(
        "/openapi.json", application(tiny_model, Auth(anonymous=True)), headers=HOST
    )
    statuses = hold(schema, examples=50, headers=HOST)
    assert statuses[200] and statuses[400], "some get through, some do not"
    assert not statuses[503], "one client is no load"


def test_no_generated_request_gets_in_without_a_key(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n  - {{name: one, sha256: '{'0' * 64}'}}\n")
    closed = application(tiny_model, Auth(keys_file=str(file)))
    schema = schemathesis.openapi.from_asgi(
        "/openapi.json", application(tiny_model, Auth(anonymous=True)), headers=HOST
    )
    schema.app = closed
    for found in schema.get_all_operations():

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=found.ok().as_strategy())
        def refused(case: Any) -> None:
            assert case.call().status_code == 401

        refused()
