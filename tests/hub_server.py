"""
A Hub of one's own: the endpoints that the real `huggingface_hub` and `hf` clients use for model and data set repos,
over HTTP on a free local port, standard library only.

Users, private and gated repos, branches, tags, pull requests, LFS uploads, commits, trees in pages, file ranges, and
the error codes the client knows. Git is not spoken; a commit is a mapping of paths to stored blobs. Faults can be
ordered in advance (`HubServer.fail`), and every request is on record (`HubServer.requests`).

    hub = HubServer().start()                # hub.url, hub.token("alice"); users alice and bob, alice in the org acme
    python tests/hub_server.py --port 8080   # the same, to try things by hand

The client must be told before it is imported: HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET=1 (Xet storage is not
served, and the client does not fall back to LFS by itself).
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".png", ".parquet", ".zip")
LFS_BYTES = 10 * 2**20
PAGE = 1000


class HubError(Exception):
    """An answer that is no success: status, the `X-Error-Code` that the client maps to an exception, a message."""

    def __init__(self, status: int, code: str, message: str, **extra):
        super().__init__(message)
        self.status, self.code, self.extra = status, code, extra


@dataclass(frozen=True)
class Entry:
    """One file of one commit: git blob id, size, and the SHA-256 of the content if it is stored as LFS."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Commit:
    """One commit, its files complete: path → [`Entry`]."""

    sha: str
    title: str
    message: str
    author: str
    files: dict[str, Entry]
    parent: "Commit | None" = None
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repo:
    """A repo, its refs by kind. Pull requests are branches named `refs/pr/<number>`."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[str, Commit] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit:
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for refs in (self.branches, self.tags, self.pulls, self.commits):
            if revision in refs:
                return refs[revision]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add(self, files: dict[str, Entry], title: str, message: str, author: str, parent: Commit | None) -> Commit:
        content = json.dumps([title, message, author, parent and parent.sha, time.time_ns(), sorted(files)])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, message, author, files, parent)
        return self.commits[sha]


@dataclass
class Fault:
    """What shall go wrong: requests whose method and path match, `after` the first so many, `times` times."""

    method: str
    path: str
    how: int | str
    times: int
    after: int


class HubServer:
    """
    The server and its state.

    Args:
        users (`dict[str, list[str]]`, *optional*):
            User names and the organisations each is a member of. The token of a user is `hf_<name>`.
        page (`int`, *optional*, defaults to 1000):
            Entries of a tree that are listed at once.
    """

    def __init__(self, users: dict[str, list[str]] | None = None, page: int = PAGE):
        self.users = {"alice": ["acme"], "bob": []} if users is None else users
        self.page = page
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.release = threading.Event()
        self.storage = Path(tempfile.mkdtemp(prefix="hub-server-"))
        self.http = None

    def start(self, port: int = 0) -> "HubServer":
        """Serves from a thread of its own; returns itself."""
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        """Stops serving and deletes what was uploaded."""
        self.http.shutdown()
        self.http.server_close()
        shutil.rmtree(self.storage, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def token(self, user: str) -> str:
        """The access token of a user."""
        return f"hf_{user}"

    def repo(self, id: str, kind: str = "models") -> Repo:
        """A repo, to look at in a test."""
        return self.repos[kind, id]

    def content(self, id: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        """Bytes of a file as stored."""
        return self.blob(self.repo(id, kind).commit(revision).files[path]).read_bytes()

    def fail(self, method: str, path: str, how: int | str, times: int = 1, after: int = 0) -> None:
        """
        Orders a fault.

        Args:
            method (`str`):
                HTTP method to hit.
            path (`str`):
                Regular expression searched in the request's path.
            how (`int` or `str`):
                Status to answer with; `"drop"` cuts the connection in the middle of the body; `"hold"` waits, before
                anything is stored, until `release` is set; `"corrupt"` flips bits of the content sent or served.
            times (`int`, *optional*, defaults to 1):
                How many requests to hit.
            after (`int`, *optional*, defaults to 0):
                How many matching requests to let pass first.
        """
        with self.lock:
            self.faults.append(Fault(method, path, how, times, after))

    def fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault.method != method or not re.search(fault.path, path) or not fault.times:
                    continue
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault.how
        return None

    # Storage.

    def blob(self, entry: Entry) -> Path:
        return self.storage / (entry.sha256 or entry.oid)

    def store(self, content: bytes) -> Entry:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.storage / oid).write_bytes(content)
        return Entry(oid, len(content))

    def store_pointer(self, sha256: str, size: int) -> Entry:
        if not (self.storage / sha256).is_file():
            raise HubError(400, "LfsMissing", f"LFS object {sha256} was not uploaded.")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), size, sha256)

    # Permissions.

    def owns(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or namespace in self.users[user])

    def find(self, kind: str, id: str, user: str | None, write: bool = False) -> Repo:
        repo = self.repos.get((kind, id))
        owner = self.owns(user, id.split("/")[0])
        # A private repo looks to strangers as if it did not exist.
        if repo is None or repo.private and not owner:
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not owner:
            raise HubError(403, "", f"You don't have the rights to write to {id}")
        return repo


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `ROUTES` names the method behind every endpoint."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def answer(self) -> None:
        self.close_connection = False
        parts = urlsplit(self.path)
        path, self.query = parts.path, parse_qs(parts.query, keep_blank_values=True)
        self.hub.requests.append((self.command, self.path))
        try:
            how = self.hub.fault(self.command, path)
            if how == "drop":
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                self.close_connection = True
                return
            if how == "hold":
                self.hub.release.wait(60)
                self.close_connection = True
                return
            self.body = self.read_body()
            self.corrupt = how == "corrupt"
            if self.corrupt and self.body:
                self.body = flip(self.body)
            if isinstance(how, int):
                raise HubError(how, "", "Ordered by the test")
            self.user = self.read_user()
            method = "GET" if self.command == "HEAD" else self.command
            for verb, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path) if verb == method else None
                if match:
                    return action(self, *(group and unquote(group) for group in match.groups()))
            raise HubError(404, "", f"No such endpoint: {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Error-Message": str(error)} | error.extra.pop("headers", {})
            self.send(error.status, {"error": str(error), **error.extra}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def read_user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        for user in self.hub.users:
            if token == self.hub.token(user):
                return user
        raise HubError(401, "", "Invalid credentials in Authorization header")

    def send(self, status: int, value: object, headers: dict | None = None) -> None:
        self.send_bytes(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, status: int, content: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def repo(self, kind: str, id: str, write: bool = False) -> Repo:
        return self.hub.find(kind, id, self.user, write)

    # Users and repos.

    def whoami(self) -> None:
        if self.user is None:
            raise HubError(401, "", "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in self.hub.users[self.user]]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.send(200, {"type": "user", "name": self.user, "orgs": orgs, "auth": auth})

    def create(self) -> None:
        asked = self.json()
        kind = asked.get("type", "model") + "s"
        namespace = asked.get("organization") or self.user
        if not self.hub.owns(self.user, namespace):
            raise HubError(403 if self.user else 401, "", f"You don't have the rights to create under {namespace}")
        id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{id}"
        with self.hub.lock:
            if (kind, id) in self.hub.repos:
                raise HubError(409, "", "You already created this repo", url=url)
            repo = self.hub.repos[kind, id] = Repo(kind, id, private=asked.get("visibility") == "private")
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            files = {".gitattributes": self.hub.store(attributes.encode())}
            repo.branches["main"] = repo.add(files, "initial commit", "", self.user, None)
        self.send(200, {"url": url, "name": id, "id": id})

    def delete(self) -> None:
        asked = self.json()
        kind, id = asked.get("type", "model") + "s", f"{asked.get('organization') or self.user}/{asked['name']}"
        self.repo(kind, id, write=True)
        del self.hub.repos[kind, id]
        self.send(200, {})

    def settings(self, kind: str, id: str) -> None:
        repo, asked = self.repo(kind, id, write=True), self.json()
        repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
        repo.gated = bool(asked.get("gated", repo.gated))
        self.send(200, {"private": repo.private, "gated": repo.gated})

    def validate_yaml(self) -> None:
        match = re.match(r"---\s*\n.*?\n---", self.json()["content"], re.DOTALL)
        errors = [] if match else [{"message": "No YAML metadata block"}]
        self.send(200 if match else 400, {"errors": errors, "warnings": []})

    def nothing(self, *_) -> None:
        self.send(200, {})

    # Reading.

    def listing(self, kind: str) -> None:
        author = self.query.get("author", [None])[0]
        repos = [
            {"_id": id, "id": id, "private": repo.private, "sha": repo.branches["main"].sha, "tags": []}
            for (of_kind, id), repo in self.hub.repos.items()
            if of_kind == kind and author in (None, id.split("/")[0])
            if not repo.private or self.hub.owns(self.user, id.split("/")[0])
        ]
        self.send(200, repos)

    def info(self, kind: str, id: str, revision: str | None = None) -> None:
        repo = self.repo(kind, id)
        commit = repo.commit(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            siblings = [{"rfilename": path, **describe(commit.files[path], "blobId")} for path in sorted(commit.files)]
        answer = {"_id": id, "id": id, "author": id.split("/")[0], "sha": commit.sha, "private": repo.private}
        answer |= {"gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0}
        self.send(200, answer | {"tags": [], "siblings": siblings, "lastModified": commit.date})

    def tree(self, kind: str, id: str, revision: str, folder: str | None) -> None:
        commit = self.repo(kind, id).commit(revision)
        prefix = folder.strip("/") + "/" if folder else ""
        below = {path: entry for path, entry in commit.files.items() if path.startswith(prefix)}
        if prefix and not below:
            raise missing_entry(commit, folder)
        folders = sorted(
            {path[: m.start()] for path in below for m in re.finditer("/", path) if m.start() > len(prefix)}
        )
        rows = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        rows += [{"type": "file", "path": path, **describe(below[path])} for path in sorted(below)]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            rows = [row for row in rows if "/" not in row["path"][len(prefix) :]]
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if len(rows) > start + self.hub.page:
            query = "&".join(f"{name}={value[0]}" for name, value in self.query.items() if name != "cursor")
            target = f"{self.hub.url}{urlsplit(self.path).path}?{query}&cursor={start + self.hub.page}"
            headers["Link"] = f'<{target}>; rel="next"'
        self.send(200, rows[start : start + self.hub.page], headers)

    def paths_info(self, kind: str, id: str, revision: str) -> None:
        commit = self.repo(kind, id).commit(revision)
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        paths = parse_qs(self.body.decode()).get("paths", []) if form else self.json()["paths"]
        rows = [
            {"type": "file", "path": path, **describe(commit.files[path])} for path in paths if path in commit.files
        ]
        folders = [path for path in paths if any(name.startswith(path.rstrip("/") + "/") for name in commit.files)]
        self.send(200, rows + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders])

    def refs(self, kind: str, id: str) -> None:
        repo = self.repo(kind, id)
        names = {"branches": ("refs/heads/", repo.branches), "tags": ("refs/tags/", repo.tags)}
        names |= {"converts": ("", {}), "pullRequests": ("", repo.pulls)}
        answer = {}
        for key, (prefix, refs) in names.items():
            answer[key] = [{"name": n, "ref": prefix + n, "targetCommit": c.sha} for n, c in refs.items()]
        self.send(200, answer)

    def commits(self, kind: str, id: str, revision: str) -> None:
        commit, rows = self.repo(kind, id).commit(revision), []
        while commit:
            row = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            rows.append(row | {"authors": [{"user": commit.author}]})
            commit = commit.parent
        self.send(200, rows)

    def resolve(self, kind: str | None, id: str, revision: str, path: str) -> None:
        repo = self.repo(kind.strip("/") if kind else "models", id)
        commit = repo.commit(revision)
        if repo.gated and not self.hub.owns(self.user, id.split("/")[0]):
            raise HubError(403, "GatedRepo", f"Access to {id} is restricted and you are not in the authorized list.")
        if path not in commit.files:
            raise missing_entry(commit, path)
        entry = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if entry.sha256:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": entry.size}
        content = self.hub.blob(entry).read_bytes()
        if self.corrupt:
            content = flip(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.send_bytes(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or entry.size - 1), entry.size - 1)
        if first > last:
            raise HubError(416, "", "Range not satisfiable", headers={"Content-Range": f"bytes */{entry.size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{entry.size}"
        self.send_bytes(206, content[first : last + 1], headers)

    # Writing.

    def preupload(self, kind: str, id: str, revision: str) -> None:
        repo = self.repo(kind, id, write="create_pr" not in self.query)
        known = repo.commit(revision).files
        answer = []
        for file in self.json()["files"]:
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES or binary
            entry = known.get(file["path"])
            oid = entry and (entry.sha256 or entry.oid)
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answer})

    def lfs_batch(self, kind: str | None, id: str) -> None:
        self.repo(kind.strip("/") if kind else "models", id)
        rows = []
        for wanted in self.json()["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.hub.storage / wanted["oid"]).is_file():
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            rows.append(row)
        self.send(200, {"transfer": "basic", "objects": rows})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "", f"The content does not hash to {oid}")
        (self.hub.storage / oid).write_bytes(self.body)
        self.send(200, {})

    def make_commit(self, kind: str, id: str, revision: str) -> None:
        pull = "create_pr" in self.query
        repo = self.repo(kind, id, write=not pull)
        if self.user is None:
            raise HubError(401, "", "Log in to commit")
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line]
        with self.hub.lock:
            parent = repo.commit(revision)
            wanted = header["value"].get("parentCommit")
            if wanted and not parent.sha.startswith(wanted):
                raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for operation in operations:
                self.apply(files, operation["key"], operation["value"])
            title, message = header["value"]["summary"], header["value"].get("description", "")
            commit = repo.add(files, title, message, self.user, parent)
            answer = {
                "success": True,
                "commitOid": commit.sha,
                "commitUrl": f"{self.hub.url}/{id}/commit/{commit.sha}",
            }
            if pull:
                number = len(repo.pulls) + 1
                repo.pulls[f"refs/pr/{number}"] = commit
                answer["pullRequestUrl"] = f"{self.hub.url}/{id}/discussions/{number}"
            else:
                refs = repo.pulls if revision in repo.pulls else repo.branches
                refs[revision.removeprefix("refs/heads/")] = commit
        self.send(200, answer)

    def apply(self, files: dict[str, Entry], key: str, value: dict) -> None:
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise HubError(400, "", f"Invalid path: {path}")
        if key == "file":
            files[path] = self.hub.store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = self.hub.store_pointer(value["oid"], value["size"])
        elif key == "deletedFile":
            if path not in files:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]

    def merge(self, kind: str, id: str, number: str) -> None:
        repo = self.repo(kind, id, write=True)
        repo.branches["main"] = repo.commit(f"refs/pr/{number}")
        self.send(200, {})

    def add_ref(self, kind: str, id: str, which: str, name: str) -> None:
        repo, asked = self.repo(kind, id, write=True), self.json()
        refs = repo.tags if which == "tag" else repo.branches
        target, ref = (name, asked["tag"]) if which == "tag" else (asked.get("startingPoint", "main"), name)
        if ref in refs:
            raise HubError(409, "", f"Reference {ref} exists already")
        refs[ref] = repo.commit(target)
        self.send(200, {})

    def drop_ref(self, kind: str, id: str, which: str, name: str) -> None:
        repo = self.repo(kind, id, write=True)
        if (repo.tags if which == "tag" else repo.branches).pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"There is no {which} {name}")
        self.send(200, {})


def describe(entry: Entry, oid: str = "oid") -> dict:
    row = {oid: entry.oid, "size": entry.size}
    if entry.sha256:
        row["lfs"] = {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": 130}
    return row


def flip(content: bytes) -> bytes:
    middle = len(content) - 5
    return content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]


def missing_entry(commit: Commit, path: str) -> HubError:
    return HubError(404, "EntryNotFound", f"{path} does not exist", headers={"X-Repo-Commit": commit.sha})


API = r"/api/(models|datasets)/([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", r"/api/(?:agent-harnesses|telemetry/.*)", Handler.nothing),
    ("PUT", API + "/settings", Handler.settings),
    ("GET", r"/api/(models|datasets)", Handler.listing),
    ("GET", API, Handler.info),
    ("GET", API + "/revision/(.+)", Handler.info),
    ("GET", API + "/tree/([^/]+)(/.+)?", Handler.tree),
    ("POST", API + "/paths-info/([^/]+)", Handler.paths_info),
    ("GET", API + "/refs", Handler.refs),
    ("GET", API + "/commits/([^/]+)", Handler.commits),
    ("POST", API + "/preupload/([^/]+)", Handler.preupload),
    ("POST", API + "/commit/([^/]+)", Handler.make_commit),
    ("POST", API + r"/discussions/(\d+)/merge", Handler.merge),
    ("POST", API + "/(tag|branch)/(.+)", Handler.add_ref),
    ("DELETE", API + "/(tag|branch)/(.+)", Handler.drop_ref),
    ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a Hub of one's own until interrupted.")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    hub = HubServer().start(parser.parse_args().port)
    # Set outright: a shell's background job starts with interrupts ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token('alice')} HF_HUB_DISABLE_XET=1", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        hub.stop()


if __name__ == "__main__":
    main()
