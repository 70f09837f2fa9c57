"""A service without a port, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lamella.service.app import make_app
from lamella.service.context import Limits, Service
from support.service import service_in


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.chdir(tmp_path)
    return service_in(tmp_path / "home", limits=Limits(runs=5))


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    """The scheduler does not run: what is submitted stays as it is."""
    app = make_app(service, hosts=("testserver",), schedule=False)
    with TestClient(app, raise_server_exceptions=False) as found:
        yield found
