"""The API against its own document: schemathesis sends what that allows and what it does not, without a port."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lamella.service.app import make_app
from support.service import new_run, service_in

pytestmark = pytest.mark.slow
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 6
LEFT_OUT = "stream$|^/readyz|^/v1/plans"
"""Streams do not end; no scheduler runs here; plans of what nobody has made take seconds, and have their own tests."""


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_one_that_the_document_has(
    mode: GenerationMode, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    service = service_in(tmp_path / "home")
    run = service.store.create(new_run())[0].id
    app = make_app(service, hosts=(), rate=1e6, schedule=False)
    document = schemathesis.openapi.from_asgi("/openapi.json", app).exclude(path_regex=LEFT_OUT)
    tried = 0

    def check(case: schemathesis.Case) -> None:
        nonlocal tried
        if "run_id" in case.path_parameters and tried % 2:
            case.path_parameters["run_id"] = run
        tried += 1
        case.call_and_validate(checks=CHECKS)

    for found in document.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (list(operation.iter_parameters()) or operation.body):
            continue
        cases = operation.as_strategy(generation_mode=mode)
        settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate], database=None,
        )(given(cases)(check))()  # fmt: skip
    assert tried > 15 * EXAMPLES
