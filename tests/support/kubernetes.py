"""A stand-in for the API server of a Kubernetes cluster, for the real kubectl to talk to, on a port of 127.0.0.1.

It keeps Jobs and TrainJobs, refuses what their published schemas do not have, as strict field validation does, and runs
nothing: tests say what becomes of an object, which pods there are, and what these print.
"""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

KINDS = {("batch/v1", "jobs"): "Job", ("trainer.kubeflow.org/v1alpha1", "trainjobs"): "TrainJob"}
CODES = {"NotFound": 404, "AlreadyExists": 409, "BadRequest": 400, "Forbidden": 403, "InternalError": 500}
OBJECT = re.compile(r"/apis/(?P<api>[^/]+/[^/]+)/namespaces/(?P<space>[^/]+)/(?P<plural>[a-z]+)(/(?P<name>[^/]+))?")
PODS = re.compile(r"/api/v1/namespaces/(?P<space>[^/]+)/pods(/(?P<name>[^/]+)/log)?")


class Refusal(Exception):
    """A Status that is no success."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Cluster:
    """What the stand-in keeps.

    Args:
        folder: gets the kubeconfig.
    """

    def __init__(self, folder: Path):
        self.objects: dict[str, dict] = {}
        self.created: list[str] = []
        self.forbidden = False
        self.pods: dict[str, dict] = {}
        self.logs: dict[str, list[tuple[str, str]]] = {}
        """Pod -> [(time, line), ...]; a pod without an entry has not started."""
        self.server = self.listen(0)
        self.port = self.server.server_address[1]
        self.config = folder / "kubeconfig"
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        config = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}]}
        self.config.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c"} | config))

    def listen(self, port: int) -> ThreadingHTTPServer:
        """Answer from now on."""
        handler = type("Handler", (Handler,), {"cluster": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self.server

    def go_away(self) -> None:
        """Refuse connections."""
        self.server.shutdown()
        self.server.server_close()

    def come_back(self) -> None:
        """At the same address."""
        self.listen(self.port)

    def becomes(self, name: str, **status: object) -> None:
        """What a controller would write into the status of an object."""
        self.objects[name]["status"] = status

    def add_pod(self, name: str, label: str, value: str, container: str) -> None:
        """A pod that has not started."""
        spec = {"containers": [{"name": container, "image": "lamella"}]}
        metadata = {"name": name, "namespace": "default", "labels": {label: value}}
        self.pods[name] = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    # -- requests ----------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, str], body: dict) -> dict | str:
        """A document, or text; Refusal where the API server would."""
        if (known := documents().get(path)) is not None:
            return known
        if (found := PODS.fullmatch(path)) is not None:
            return self._log(found["name"], query) if found["name"] else self._pods(query)
        found = OBJECT.fullmatch(path)
        if found is None or (found["api"], found["plural"]) not in KINDS:
            raise Refusal("NotFound", f"the server could not find the requested resource {path}")
        if self.forbidden:
            raise Refusal("Forbidden", f'{found["plural"]} is forbidden: User "u" cannot {method.lower()} them')
        return self._object(method, found, body)

    def _object(self, method: str, found: re.Match[str], body: dict) -> dict:
        name = found["name"] or body["metadata"]["name"]
        if method == "POST":
            if name in self.objects:
                raise Refusal("AlreadyExists", f'{found["plural"]} "{name}" already exists')
            check(body)
            body["metadata"] |= {"uid": f"uid-{name}", "resourceVersion": "1"}
            self.objects[name] = body
            self.created.append(name)
            return body
        if name not in self.objects:
            raise Refusal("NotFound", f'{found["plural"]}.{found["api"].partition("/")[0]} "{name}" not found')
        if method == "DELETE":
            del self.objects[name]
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if method == "PATCH":
            merge(self.objects[name], body)
        return self.objects[name]

    def _pods(self, query: dict[str, str]) -> dict:
        label, _, value = query["labelSelector"].partition("=")
        items = [pod for pod in self.pods.values() if pod["metadata"]["labels"].get(label) == value]
        return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}

    def _log(self, pod: str, query: dict[str, str]) -> str:
        if pod not in self.logs:
            container = query["container"]
            raise Refusal(
                "BadRequest", f'container "{container}" in pod "{pod}" is waiting to start: ContainerCreating'
            )
        since = query.get("sinceTime", "")  # a metav1.Time: whole seconds
        kept = [(time, line) for time, line in self.logs[pod] if time[:19] >= since[:19]]
        return "".join(f"{time} {line}\n" for time, line in kept)


def merge(target: dict, patch: dict) -> None:
    """RFC 7396."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value


def check(manifest: dict) -> None:
    """Refusal of what the published schema of its kind does not have."""
    if manifest["kind"] == "Job":
        try:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
        except kubernetes_validate.ValidationError as error:
            raise Refusal("BadRequest", f"Job in version v1 cannot be handled: {error.message}") from None
        return
    try:
        read = TrainerV1alpha1TrainJob.from_dict(manifest)
    except ValueError as error:
        raise Refusal("BadRequest", f"TrainJob in version v1alpha1 cannot be handled: {error}") from None
    if read is None or json.loads(read.to_json()) != manifest:
        raise Refusal("BadRequest", "strict decoding error: unknown field in TrainJob")


def documents() -> dict[str, dict]:
    """Path -> what discovery and OpenAPI say there; kubectl leaves validation to a server whose PATCH knows of it."""
    verbs = ["create", "delete", "get", "list", "patch"]
    found: dict[str, dict] = {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/api/v1": {
            "kind": "APIResourceList", "groupVersion": "v1",
            "resources": [
                {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": verbs},
                {"name": "pods/log", "singularName": "", "namespaced": True, "kind": "Pod", "verbs": ["get"]},
            ],
        },
        "/openapi/v3": {"paths": {}},
    }  # fmt: skip
    groups = []
    for (api, plural), kind in KINDS.items():
        group, version = api.split("/")
        place = {"groupVersion": api, "version": version}
        groups.append({"name": group, "versions": [place], "preferredVersion": place})
        resource = {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
        found[f"/apis/{api}"] = {"kind": "APIResourceList", "groupVersion": api, "resources": [resource]}
        found["/openapi/v3"]["paths"][f"apis/{api}"] = {"serverRelativeURL": f"/openapi/v3/apis/{api}"}
        patch = {
            "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
            "responses": {"200": {"description": "OK"}},
        }
        found[f"/openapi/v3/apis/{api}"] = {
            "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.34.0"},
            "paths": {f"/apis/{api}/namespaces/{{namespace}}/{plural}/{{name}}": {"patch": patch}},
        }  # fmt: skip
    found["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    return found


def now() -> str:
    """As the kubelet writes it beside a line."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "000Z")


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def _answer(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(raw) if raw else {}
        status = 201 if self.command == "POST" else 200
        try:
            found = self.cluster.answer(self.command, address.path, query, body)
        except Refusal as error:
            status = CODES[error.reason]
            found = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": str(error)}
            found |= {"reason": error.reason, "code": status}
        text = found if isinstance(found, str) else json.dumps(found)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(found, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Nothing."""
