# SPDX-License-Identifier: Apache-2.0
"""5,000 generated requests through Ray Serve: none breaks the server, its document or its door."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.serving.site import MODEL, Server, keys
from tests.unit.test_serve_openapi import hold

pytestmark = [pytest.mark.serving, pytest.mark.soak, pytest.mark.timeout(1500)]
KEY = {"Authorization": "Bearer sg4v-all"}


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    scopes = ["inference", "metrics", "admin"]
    auth = keys(server.folder, {"name": "all", "key": "sg4v-all", "scopes": scopes})
    server.deploy(auth=auth, models=[MODEL])
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=KEY)


def test_five_thousand_requests_are_answered_as_the_document_says(schema: Any) -> None:
    # Operations without parameters have one example each; nine have something to vary.
    statuses = hold(schema, examples=600, headers=KEY)
    print(dict(statuses))
    assert sum(statuses.values()) >= 5000
    assert statuses[200] and statuses[400]
    assert not {500, 502, 503} & statuses.keys()


def test_none_gets_in_without_a_key(schema: Any) -> None:
    for found in schema.get_all_operations():

        @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=found.ok().as_strategy())
        def refused(case: Any) -> None:
            assert case.call().status_code == 401

        refused()
