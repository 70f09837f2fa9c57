"""The API against its own document: schemathesis sends what that allows and what it does not, without a port.

More of it: LAMELLA_TEST_EXAMPLES=200 pytest tests/service/test_openapi.py
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lamella.architecture.embedded import embedded_config
from lamella.recipe.training import Recipe
from lamella.service import keys
from lamella.service.app import make_app
from lamella.service.states import State
from support.service import new_run, service_in, training

pytestmark = pytest.mark.slow
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = int(os.environ.get("LAMELLA_TEST_EXAMPLES", "12"))
WAYS: dict[State, tuple[State, ...]] = {
    "validating": (),
    "succeeded": ("queued", "starting", "succeeded"),
    "failed": ("queued", "starting", "failed"),
    "paused": ("paused",),
}
"""The states of the runs that are asked about, and how a new run comes to them."""


class Fuzzed:
    """A service, what it is asked, and what it answered."""

    def __init__(self, home: Path):
        embedded_config()  # read once a process, 4 s of a quiet core; schemathesis waits 10 s for an answer
        self.service = service_in(home)
        self.service.hub.close()  # else streams of events have no end
        token, _ = keys.create(self.service.store, "root", ["admin"])
        self.headers = {"Authorization": f"Bearer {token}"}
        self.states: Iterator[State] = cycle(WAYS)
        self.app = make_app(self.service, hosts=(), rate=1e6, schedule=False)
        self.answers: dict[str, Counter[int]] = defaultdict(Counter)

    def check(self, case: schemathesis.Case) -> None:
        """Send a case, every second one about something that is there; its answer must be as the document says."""
        answers = self.answers[case.operation.label]
        if answers.total() % 2:
            for name in case.path_parameters:
                case.path_parameters[name] = self.key() if name == "key_id" else self.run(case.path)
        self.service.scheduler.ticked = time.time()  # none runs here: what is submitted stays
        response = case.call(headers=self.headers)
        answers[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    def key(self) -> str:
        """The id of a new one."""
        return keys.create(self.service.store, "ada", ["read"])[1].id

    def run(self, path: str) -> str:
        """The id of a new one; each is in another state than the one before."""
        to = "succeeded" if path.endswith("/logs/stream") else next(self.states)  # other logs have no end yet
        if path.endswith("/conversion"):
            spec = {"job": {"kind": "convert", "recipe": {"model": "missing"}}}
            new = new_run(kind="convert", spec=spec, out=f"/missing/moe-{time.monotonic_ns()}")
        else:
            new = new_run(kind="train", spec=training(Path("missing"), Path("text.md"), Path("run")))
        run = self.service.store.create(new)[0]
        for state in WAYS[to]:
            self.service.store.move(self.service.store.get(run.id), state, state)
        return run.id


def say_what_recipes_are(app: FastAPI) -> None:
    """Lay what the service says of recipes (/v1/schemas/train) into its document, beside "any object"."""
    document = app.openapi()  # the app keeps it
    recipe = Recipe.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = document["components"]["schemas"]
    schemas |= recipe.pop("$defs") | {"Recipe": recipe}
    known = schemas["TrainJob"]["properties"]
    known["recipe"] = {"anyOf": [{"$ref": "#/components/schemas/Recipe"}, known["recipe"]]}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_one_that_the_document_has(
    mode: GenerationMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fuzzed = Fuzzed(tmp_path / "home")
    say_what_recipes_are(fuzzed.app)
    for found in schemathesis.openapi.from_asgi("/openapi.json", fuzzed.app).get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (list(operation.iter_parameters()) or operation.body):
            continue  # nothing can be wrong about it
        settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate], database=None,
        )(given(operation.as_strategy(generation_mode=mode))(fuzzed.check))()  # fmt: skip
    operations = {f"{method.upper()} {path}" for path, ways in fuzzed.app.openapi()["paths"].items() for method in ways}
    if mode is GenerationMode.NEGATIVE:
        without_input = {"GET /healthz", "GET /readyz"}
        assert fuzzed.answers.keys() == operations - without_input
    else:
        succeeded = {name for name, answers in fuzzed.answers.items() if any(200 <= status < 300 for status in answers)}
        assert succeeded == operations, fuzzed.answers
