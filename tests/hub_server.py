"""A stand-in for the hub: as much of its HTTP API as `huggingface_hub` speaks to make and fill a model's repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from huggingface_hub import ModelCard

TOKEN = "hf_canaryCanaryCANARY0123456789abcdef"
USER, ORGANIZATION = "alice", "kennel"
_LARGE = (".safetensors", ".png", ".webp")


class Hub:
    """Its users' one token, its repositories, and what it is told to refuse.

    Attributes:
        repos: id → its files.
        private: the ids of private ones.
        commits: the messages of all commits.
        requests: method and path of each request.
        failing: part of a path → status, message and the header X-Error-Code of the answer.
        role: of the token.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.failing: dict[str, tuple[int, str, str]] = {}
        self.role = "write"
        self.blobs: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """No line on stderr."""

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append(f"{self.command} {self.path}")
                status, value, code = hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if code:
                    self.send_header("X-Error-Code", code)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer

        return Handler

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, Any, str]:
        """Status, JSON and error code."""
        for part, (status, message, code) in self.failing.items():
            if part in path:
                return status, {"error": message}, code
        if method == "PUT" and path.startswith("/blobs/"):  # of a storage service, which has the token in no header
            assert authorization is None
            oid = path.removeprefix("/blobs/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.blobs[oid] = body
            return 200, {}, ""
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}, ""
        if path == "/api/whoami-v2":
            auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": self.role}}
            return 200, {"type": "user", "name": USER, "orgs": [{"name": ORGANIZATION}], "auth": auth}, ""
        if path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}, ""
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        return self._about_repo(path, body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, str]:
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        if repo.split("/")[0] not in (USER, ORGANIZATION):
            return 403, {"error": f"You don't have the rights to create a model under the namespace {repo}"}, ""
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}, ""
        self.repos[repo] = {}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(repo)
        return 200, {"url": f"{self.url}/{repo}", "name": repo}, ""

    def _about_repo(self, path: str, body: bytes) -> tuple[int, Any, str]:
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repo = f"{owner}/{name.removesuffix('.git')}"
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        files = self.repos[repo]
        match rest:
            case []:
                return 200, {"id": repo, "private": repo in self.private, "siblings": [], "tags": []}, ""
            case ["auth-check", *_]:
                writable = owner in (USER, ORGANIZATION)
                return (200, {}, "") if writable else (403, {"error": "no right to write"}, "")
            case ["preupload", "main"]:
                return 200, {"files": [self._mode(each) for each in json.loads(body)["files"]]}, ""
            case ["info", "lfs", "objects", "batch"]:
                objects = [self._place(each) for each in json.loads(body)["objects"]]
                return 200, {"transfer": "basic", "objects": objects}, ""
            case ["commit", "main"]:
                self._commit(files, [json.loads(line) for line in body.splitlines()])
                oid = hashlib.sha1(body).hexdigest()
                return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}, ""
        raise AssertionError(f"the stand-in knows no {path}")

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _place(self, blob: dict[str, Any]) -> dict[str, Any]:
        if blob["oid"] in self.blobs:
            return blob
        return {**blob, "actions": {"upload": {"href": f"{self.url}/blobs/{blob['oid']}"}}}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    self.commits.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                case other:
                    raise AssertionError(other)


def card_data(text: str) -> dict[str, Any]:
    """A card's YAML."""
    return yaml.safe_load(text.split("---")[1])
