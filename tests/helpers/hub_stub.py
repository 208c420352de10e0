"""A small Hub on loopback: enough of its HTTP API for huggingface_hub 1 and 2 to push to it and to load from it.

    with HubStub() as hub:
        HF_ENDPOINT=hub.url HF_TOKEN=HubStub.TOKEN HF_HUB_DISABLE_XET=1 ...
        hub.repos["me/x"].branches["main"]   # {"config.json": b"...", ...}

Weights go through LFS as on the real Hub: asked for first, sent to a storage of their own, then named in the commit.
`hub.fail` makes it refuse or break off; `hub.requests` is what it was asked.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".mp4")


class Repo:
    """Branches with their files, and how often each was committed to."""

    def __init__(self, private: bool):
        self.private = private
        self.branches: dict[str, dict[str, bytes]] = {"main": {".gitattributes": b""}}
        self.commits: list[dict] = []

    def sha(self, branch: str) -> str:
        return hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Of a branch, or of the newest commit of one."""
        for name, files in self.branches.items():
            if revision in (name, self.sha(name)):
                return files
        return None


class HubStub:
    """The server; `fail(method, path)` may return a status with a message, `"drop"`, or None."""

    TOKEN = "hf_stub"

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail: Callable[[str, str], tuple[int, str] | str | None] = lambda method, path: None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    # --- what comes in and goes out ---

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X_Error_Code": code} if code else {}
        self._send(status, {"error": message}, **headers)

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        failure = self.hub.fail(self.command, path)
        if failure == "drop":  # in the midst of what is being sent
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        if failure is not None:
            assert isinstance(failure, tuple)
            self._error(*failure)
        elif self.command == "PUT" and path.startswith("/lfs/"):
            self.hub.lfs[path.removeprefix("/lfs/")] = body
            self._send(200)
        elif self.command == "POST" and self.headers.get("Authorization") != f"Bearer {HubStub.TOKEN}":
            self._error(401, "Invalid credentials in Authorization header")
        else:
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    answer(self, body, **match.groupdict())
                    return
            self._error(404, "Not Found")

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # names of http.server

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._error(404, "Repository not found", "RepoNotFound")
        return repo

    # --- the API ---

    def create_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}
        if name in self.hub.repos:
            self._send(409, {"error": "You already created this model repo", **answer})
            return
        self.hub.repos[name] = Repo(bool(asked.get("private") or asked.get("visibility") == "private"))
        self._send(200, answer)

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        bad = "license: not-a-licence" in content
        errors = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}] if bad else []
        self._send(400 if bad else 200, {"errors": errors, "warnings": []})

    def whoami(self, body: bytes) -> None:
        self._send(200, {"name": "me", "type": "user", "orgs": []})

    def create_branch(self, body: bytes, repo: str, branch: str) -> None:
        if (found := self._repo(repo)) is None:
            return
        if branch in found.branches:
            self._error(409, "Reference already exists")
            return
        found.branches[branch] = dict(found.branches["main"])
        self._send(201, {"ok": True})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._repo(repo)) is None:
            return
        if revision not in found.branches:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        there, answers = found.branches[revision], []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES)
            oid = _oid(file["path"], there[file["path"]]) if file["path"] in there else None
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, answer = asked["oid"], dict(asked)
            if oid not in self.hub.lfs:  # what has arrived is not asked for again
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._repo(repo)) is None:
            return
        pull_request = "create_pr" in self.query
        branch = f"refs/pr/{len(found.commits) + 1}" if pull_request else revision
        files = dict(found.branches[revision])
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    self._error(400, f"LFS object {value['oid']} was never uploaded")
                    return
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        found.branches[branch] = files
        found.commits.append({"branch": branch, "message": lines[0]["value"]["summary"]})
        sha = found.sha(branch)
        page = f"{self.hub.url}/{repo}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": ""}
        answer["pullRequestUrl"] = f"{page}/discussions/{len(found.commits)}" if pull_request else None
        self._send(200, answer)

    def model_info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if (found := self._repo(repo)) is None:
            return
        revision = revision or "main"
        files = found.files(revision)
        if files is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        branch = next(name for name in found.branches if revision in (name, found.sha(name)))
        self._send(
            200,
            {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "sha": found.sha(branch),
                "private": found.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in files],
            },
        )

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        if (found := self._repo(repo)) is None:
            return
        files = found.files(revision)
        if files is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        inside = {name: data for name, data in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            self._error(404, f"{folder} does not exist", "EntryNotFound")
            return
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _git_sha(data)} for name, data in inside.items()
        ]
        self._send(200, entries)

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        if (found := self._repo(repo)) is None:
            return
        # A branch may hold slashes: `refs/pr/1`.
        files = found.files(revision)
        if files is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        branch = next(name for name in found.branches if revision in (name, found.sha(name)))
        headers = {"X_Repo_Commit": found.sha(branch)}
        if file not in files:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers)
            return
        self._send(200, files[file], ETag=f'"{_oid(file, files[file])}"', **headers)


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_sha(data)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}", _Handler.model_info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.model_info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.tree),
    ("GET|HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
]
