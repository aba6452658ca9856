"""A small hub on the loopback interface: models are directories, and uploads are stored in them.

python -m tests.hub ROOT     serves the models ORG/MODEL below ROOT until it is ended; prints its address
"""

import argparse
import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import validate_repo_id

if TYPE_CHECKING:  # not where the hub is a program of its own
    import pytest

TOKEN = "hf_writer"
OWNER = "acme"
CUT_BYTES = 10_000  # bytes sent of a file whose download is cut


@dataclass
class Hub:
    """A local server with the contents of a hub, and a log of its requests.

    root     a directory with ORG/MODEL below it
    gated, hidden  ids that need an account with access, that need an account at all
    cuts     answers to requests for a file, by name, before it is sent whole: "cut" in the middle, or "broken" (500)
    private  visibility of the repositories that were made
    asked    every request: method, path, and the range that was asked for
    """

    root: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    cuts: dict[str, list[str]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def models(self) -> list[str]:
        return sorted("/".join(path.parts[-2:]) for path in self.root.glob("*/*"))

    def commit(self, repo: str) -> str:
        """The commit of a repository: a hash of what it holds."""
        text = "".join(f"{path.name}{path.stat().st_size}" for path in self.files(repo))
        return hashlib.sha1(f"{repo}{text}".encode()).hexdigest()

    def files(self, repo: str) -> list[Path]:
        return sorted(path for path in (self.root / repo).rglob("*") if path.is_file())


@contextmanager
def serving(root: Path, monkeypatch: "pytest.MonkeyPatch", cache: Path) -> Iterator[Hub]:
    """A hub with the models below `root`, which huggingface_hub talks to in this block, with its cache in `cache`."""
    hub = Hub(root)
    server = listening(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def errors_in(card: str) -> list[str]:
    """The faults that the hub finds in a card's front matter: its keys, and their values as far as they are checked."""
    try:
        data = ModelCard(card).data
        if data.base_model is not None:
            validate_repo_id(data.base_model)
    except ValueError as error:
        return [str(error)]
    known = {
        "license": bool(data.license) and re.fullmatch(r"[a-z0-9.-]+", str(data.license)),
        "base_model_relation": data.get("base_model_relation") in (None, "quantized"),
        "pipeline_tag": data.pipeline_tag in ("text-generation", "image-text-to-text"),
        "library_name": data.library_name == "transformers",
        "tags": all(isinstance(tag, str) and 0 < len(tag) < 100 for tag in data.tags or ()),
        "model-index": all(
            isinstance(each.metric_value, float) and each.dataset_type for each in data.eval_results or ()
        ),
    }
    return [f"{key!r} is not valid" for key, holds in known.items() if not holds]


def listening(hub: Hub) -> ThreadingHTTPServer:
    """A server of `hub`, which gets its address, on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    return server


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that downloads and uploads of models use."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """No log: `Hub.asked` has the requests."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Find the requested file, and check the account's access to it."""
        self.hub.asked.append((self.command, unquote(self.path), self.headers.get("Range")))
        parts = urlsplit(unquote(self.path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, handle in ROUTES.items():
            if found := re.fullmatch(pattern, parts.path):
                repo = found.groupdict().get("repo")
                if repo is None or handle is Handler.preupload or self.allowed(repo, handle is Handler.send_file):
                    handle(self, parse_qs(parts.query), **found.groupdict())
                return
        self.refuse(404, "EntryNotFound", f"no {parts.path}")

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def allowed(self, repo: str, wants_file: bool) -> bool:
        if repo not in self.hub.models() or (repo in self.hub.hidden and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
            return False
        if wants_file and repo in self.hub.gated:
            self.refuse(403 if self.known else 401, "GatedRepo", f"Access to model {repo} is restricted")
            return False
        return True

    def refuse(self, code: int, kind: str, message: str) -> None:
        self.reply({"error": message}, code, {"X-Error-Code": kind, "X-Error-Message": message})

    def reply(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        for key, text in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        ).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def list_models(self, query: dict[str, list[str]]) -> None:
        author, search = query.get("author", [""])[0], query.get("search", [""])[0]
        shown = [repo for repo in self.hub.models() if repo not in self.hub.hidden]
        self.reply([{"id": repo} for repo in shown if repo.startswith(author) and search in repo])

    def info(self, query: dict[str, list[str]], repo: str, revision: str = "main") -> None:
        commit = self.hub.commit(repo)
        if revision not in ("main", "v1", commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        names = [{"rfilename": str(path.relative_to(self.hub.root / repo))} for path in self.hub.files(repo)]
        self.reply({"id": repo, "sha": commit, "siblings": names, "private": self.hub.private.get(repo, False)})

    def tree(self, query: dict[str, list[str]], repo: str, revision: str) -> None:
        files = {str(path.relative_to(self.hub.root / repo)): path for path in self.hub.files(repo)}
        self.reply(
            [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in files.items()
            ]
        )

    def refs(self, query: dict[str, list[str]], repo: str) -> None:
        commit = self.hub.commit(repo)
        main, tag = (
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
            for name, kind in (("main", "heads"), ("v1", "tags"))
        )
        self.reply({"branches": [main], "tags": [tag], "converts": []})

    def send_file(self, query: dict[str, list[str]], repo: str, revision: str, name: str) -> None:
        path = self.hub.root / repo / name
        if not path.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        cuts = self.hub.cuts.get(name, [])
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        if cut == "broken":
            self.refuse(500, "", "out of order")
            return
        content, start = path.read_bytes(), 0
        if (asked := self.headers.get("Range")) and (found := re.match(r"bytes=(\d+)-", asked)):
            start = int(found[1])
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", self.hub.commit(repo))
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(rest if cut is None else rest[:CUT_BYTES])
            self.close_connection = cut is not None

    def whoami(self, query: dict[str, list[str]]) -> None:
        if self.known:
            self.reply({"name": OWNER, "type": "user", "orgs": []})
        else:
            self.refuse(401, "", "Invalid credentials in Authorization header")

    def create(self, query: dict[str, list[str]]) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if repo in self.hub.models():
            self.reply({"error": "exists", "url": f"{self.hub.url}/{repo}"}, 409)
            return
        (self.hub.root / repo).mkdir(parents=True)
        self.hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.reply({"url": f"{self.hub.url}/{repo}"})

    def validate(self, query: dict[str, list[str]]) -> None:
        errors = errors_in(json.loads(self.body)["content"])
        self.reply({"errors": [{"message": each} for each in errors], "warnings": []}, 400 if errors else 200)

    def preupload(self, query: dict[str, list[str]], repo: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        kinds = {True: "lfs", False: "regular"}
        rows = [
            {
                "path": file["path"],
                "uploadMode": kinds[file["path"].endswith(".safetensors")],
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self.reply({"files": rows})

    def lfs_batch(self, query: dict[str, list[str]], repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.blobs:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{each['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def put_blob(self, query: dict[str, list[str]], oid: str) -> None:
        self.hub.blobs[oid] = self.body
        self.reply({})

    def take_commit(self, query: dict[str, list[str]], repo: str, revision: str) -> None:
        for line in self.body.splitlines():
            row = json.loads(line)
            if row["key"] in ("file", "lfsFile"):
                value = row["value"]
                path = self.hub.root / repo / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    base64.b64decode(value["content"]) if row["key"] == "file" else self.hub.blobs[value["oid"]]
                )
        commit = self.hub.commit(repo)
        self.reply({"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "success": True})


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES: dict[str, Any] = {
    r"/api/models": Handler.list_models,
    r"/api/whoami-v2": Handler.whoami,
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.validate,
    rf"/api/models/{REPO}": Handler.info,
    rf"/api/models/{REPO}/refs": Handler.refs,
    rf"/api/models/{REPO}/revision/(?P<revision>.+)": Handler.info,
    rf"/api/models/{REPO}/tree/(?P<revision>.+)": Handler.tree,
    rf"/api/models/{REPO}/preupload/(?P<revision>.+)": Handler.preupload,
    rf"/api/models/{REPO}/commit/(?P<revision>.+)": Handler.take_commit,
    rf"/{REPO}\.git/info/lfs/objects/batch": Handler.lfs_batch,
    r"/blobs/(?P<oid>\w+)": Handler.put_blob,
    rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)": Handler.send_file,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="a hub on the loopback interface")
    parser.add_argument("root", type=Path)
    alone = Hub(parser.parse_args().root)
    server = listening(alone)
    sys.stdout.write(f"{alone.url}\n")
    sys.stdout.flush()
    server.serve_forever()
