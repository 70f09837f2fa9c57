"""Requests to a server that speaks OpenAI's protocol; whatever goes wrong with one is a UserError of one line."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import httpx

from lamella.errors import UserError
from lamella.evaluate.served.names import address_of
from lamella.jsons import Json

CONNECT_S = 10
ANSWER_S = 3600
KEY = "OPENAI_API_KEY"


class Endpoint:
    """One model of a server; a context manager that closes the connections.

    `name` is how the user calls it, in messages. $OPENAI_API_KEY is sent where it is set.
    """

    def __init__(self, url: str, name: str | None = None):
        """Ask the server for its models.

        Raises:
            UserError: nothing answers there, or it serves no such model.
        """
        self.name, (self.root, model) = name or url, address_of(url)
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        try:
            self.client = httpx.Client(base_url=self.root, headers=headers, timeout=timeout)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{self.name} is no address of an endpoint ({error}); pass http://HOST:PORT/v1") from None
        try:
            self.about = self._only(self._models(), model)
        except UserError:
            self.client.close()
            raise
        self.model: str = self.about["id"]

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.client.close()

    @property
    def is_llama_cpp(self) -> bool:
        """Whether llama.cpp's server says that it is one."""
        return self.about.get("owned_by") == "llamacpp"

    @property
    def positions(self) -> int | None:
        """Tokens that the server takes of a sequence, where it says so."""
        meta = self.about.get("meta") or {}
        found = [self.about.get("max_model_len"), meta.get("n_ctx"), meta.get("n_ctx_train")]
        return min((int(value) for value in found if value), default=None)

    @property
    def vocab_size(self) -> int | None:
        """Tokens that the model has, where the server says so."""
        return (self.about.get("meta") or {}).get("n_vocab")

    def post(self, path: str, asked: Json) -> Json:
        """The answer to a request; UserError with the server's own words where it refuses."""
        answer = self._request("POST", path, asked)
        if answer.status_code != 200:
            raise UserError(f"{self.name} refuses {path}: {_words(answer)}")
        return _object(answer, self.name)

    def supports(self, path: str, asked: Json) -> Json | None:
        """The answer to a request, or None where the server does not know it."""
        answer = self._request("POST", path, asked)
        return _object(answer, self.name) if answer.status_code == 200 else None

    def get(self, path: str) -> Json | None:
        """What is there, or None."""
        answer = self._request("GET", path)
        return _object(answer, self.name) if answer.status_code == 200 else None

    def _models(self) -> list[Json]:
        listed = self.get("/v1/models")
        models = (listed or {}).get("data")
        return [row for row in models if isinstance(row, dict) and "id" in row] if isinstance(models, list) else []

    def _only(self, models: list[Json], name: str | None) -> Json:
        ids = [model["id"] for model in models]
        if name is None:
            if len(models) == 1:
                return models[0]
            few = f"serves {len(models)} models ({', '.join(ids[:5])})" if models else "names no model at /v1/models"
            raise UserError(f"{self.name} {few}; put the one to measure behind the address: {self.name}#NAME")
        if models and name not in ids:
            raise UserError(f"{self.name} serves no model {name!r}; it has {', '.join(ids[:5])}")
        return next((model for model in models if model["id"] == name), {"id": name})

    def _request(self, method: str, path: str, asked: Json | None = None) -> httpx.Response:
        try:
            return self.client.request(method, path, json=asked)
        except (httpx.TransportError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"nothing answers at {self.name} ({reason}); is the server running there?") from None


def _object(answer: httpx.Response, name: str) -> Json:
    try:
        found: Any = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{name} does not speak OpenAI's protocol: {_words(answer)}")
    return found


def _words(answer: httpx.Response) -> str:
    text = " ".join(answer.text.split())
    return f"{answer.status_code} {text[:300]}".strip()
