"""A Hub to test against: the part of the Hugging Face Hub's HTTP protocol that push and pull use.

Repositories live in memory. By hand, for a demonstration without a network::

    python tests/hub/server.py --port 8000 --token secret
    export HF_ENDPOINT=http://127.0.0.1:8000 HF_TOKEN=secret
    prufed push REF me/model
    prufed pull me/model

The token belongs to the user ``me``. As on the Hub, ``.gitattributes`` decides which files are
large ones, their bytes come from another host (``localhost`` instead of ``127.0.0.1``), a commit
on a head that has moved is answered 412, and a missing repository 401 without a token. Xet is not
spoken: its token request is answered 404.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs, unquote

import uvicorn

LARGE_FILES: Final = ("*.bin", "*.safetensors", "*.model", "*.h5", "*.pt", "*.zip", "*tfevents*")
ATTRIBUTES: Final = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES
)
LARGE_FROM: Final = 10_000_000
PAGE: Final = 5
"""Entries on one page of a listing: small, so that every test turns pages."""

Headers = dict[str, str]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass
class File:
    """One file at one commit; the bytes served are ``content``, damaged or not.

    Attributes:
        content: what is served.
        blob: git's object id of the file, or of the pointer to it.
        sha256: of a large file; None for one that git itself holds.
    """

    content: bytes
    blob: str
    sha256: str | None

    @classmethod
    def made(cls, content: bytes, *, large: bool) -> File:
        if not large:
            return cls(content, git_hash(content), None)
        digest = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize "
        return cls(content, git_hash(f"{pointer}{len(content)}\n".encode()), digest)

    @property
    def identity(self) -> str:
        return self.sha256 or self.blob


@dataclass
class Commit:
    """A whole tree, what it follows and what its author called it."""

    sha: str
    parent: str | None
    summary: str
    files: dict[str, File]


@dataclass
class Repository:
    """Commits, the head of ``main``, and tags."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    head: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, File], summary: str) -> Commit:
        facts = [sorted((path, file.blob) for path, file in files.items()), summary, self.head]
        sha = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[sha] = Commit(sha, self.head or None, summary, dict(files))
        self.head = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit:
        sha = self.head if revision == "main" else self.tags.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]


@dataclass
class Fault:
    """What goes wrong with requests whose ``METHOD /path`` the pattern finds, a number of times.

    Attributes:
        pattern: a regular expression.
        status: the answer; None breaks the connection off instead.
        times: how often.
        after: bytes of the answer's body that still arrive before the connection breaks.
        page: the HTML that a proxy or a login page would answer instead.
    """

    pattern: str
    status: int | None = 500
    times: int = 1_000
    after: int = 0
    page: bytes | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Headers
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Headers = field(default_factory=dict)


class Refused(Exception):  # noqa: N818
    """An answer other than success, in the form the Hub gives it."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        headers = {"x-error-message": message} | ({"x-error-code": code} if code else {})
        self.answer = _json({"error": message}, status, headers)


class Hub:
    """The server's state, which tests look into and disturb.

    Attributes:
        token: the only one that is accepted; it belongs to ``user``.
        repositories: by ``owner/name``.
        objects: uploaded large files by SHA-256.
        faults: what goes wrong, the first that fits first.
        requests: every request that arrived, oldest first.
        before_commit: called once when the next commit arrives, before it is looked at.
    """

    def __init__(self, token: str, user: str = "me") -> None:
        self.token = token
        self.user = user
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.before_commit: Callable[[], None] | None = None

    def add(
        self, name: str, files: Mapping[str, bytes], *, private: bool = False, summary: str = "add"
    ) -> Repository:
        """Put files on the main branch of a repository, which is created if it is not there."""
        repository = self.repositories.get(name) or self._create(name, private)
        tree = dict(repository.at("main").files)
        tree |= {path: File.made(data, large=_is_large(path, tree)) for path, data in files.items()}
        repository.commit(tree, summary)
        return repository

    def flip(self, name: str, path: str, revision: str = "main", at: int = -9) -> None:
        """Change one bit of what is served, and nothing of what is said about it."""
        file = self.repositories[name].at(revision).files[path]
        content = bytearray(file.content)
        content[at] ^= 1
        file.content = bytes(content)

    def sent(self, pattern: str) -> list[Request]:
        """Return the requests whose ``METHOD /path`` the regular expression finds."""
        return [each for each in self.requests if re.search(pattern, f"{each.method} {each.path}")]

    def answer(self, request: Request) -> Answer:
        """Return the answer to one request."""
        for method, pattern, handler in _ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in method.split("|"):
                try:
                    return handler(self, request, **found.groupdict())
                except Refused as refused:
                    return refused.answer
        return Refused(404, None, "Sorry, we can't find the page you are looking for.").answer

    def fault(self, request: Request) -> Fault | None:
        """Return what shall go wrong with this request, and count it."""
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, f"{request.method} {request.path}"):
                fault.times -= 1
                return fault
        return None

    def _signed_in(self, request: Request) -> bool:
        given = request.headers.get("authorization")
        if given is None:
            return False
        if given != f"Bearer {self.token}":
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return True

    def _visible(self, request: Request, name: str) -> Repository:
        signed_in = self._signed_in(request)
        repository = self.repositories.get(name)
        may_see = signed_in and name.startswith(f"{self.user}/")
        if repository is None or (repository.private and not may_see):
            status = 404 if signed_in else 401
            raise Refused(status, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, request: Request, name: str) -> Repository:
        repository = self._visible(request, name)
        if not self._signed_in(request):
            raise Refused(401, None, "Invalid username or password.")
        if not name.startswith(f"{self.user}/"):
            raise Refused(403, None, "Forbidden: you don't have write access")
        return repository

    def _create(self, name: str, private: bool) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit(
            {".gitattributes": File.made(ATTRIBUTES.encode(), large=False)}, "initial commit"
        )
        return repository

    def whoami(self, request: Request) -> Answer:
        if not self._signed_in(request):
            raise Refused(401, None, "Invalid username or password.")
        return _json({"type": "user", "name": self.user, "orgs": []})

    def create_repository(self, request: Request) -> Answer:
        if not self._signed_in(request):
            raise Refused(401, None, "Invalid username or password.")
        wanted = request.json()
        owner = wanted.get("organization") or self.user
        if owner != self.user:
            raise Refused(403, None, f"You don't have the rights to create a model under {owner}")
        name = f"{owner}/{wanted['name']}"
        url = {"url": f"{_origin(request)}/{name}", "name": name}
        if name in self.repositories:
            return _json(url | {"error": "You already created this model repo"}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self._create(name, bool(private))
        return _json(url)

    def validate_card(self, request: Request) -> Answer:
        import yaml

        header = request.json()["content"].removeprefix("---\n").partition("\n---\n")[0]
        try:
            metadata = yaml.safe_load(header)
        except yaml.YAMLError:
            metadata = None
        relations = {"adapter", "merge", "quantized", "finetune"}
        errors = [] if isinstance(metadata, dict) else [{"message": "the metadata is not YAML"}]
        if not errors and metadata.get("base_model_relation", "merge") not in relations:
            errors = [{"message": "base_model_relation must be one of adapter, merge, ..."}]
        return _json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, request: Request, name: str, revision: str = "main") -> Answer:
        repository = self._visible(request, name)
        commit = repository.at(unquote(revision))
        blobs = "blobs" in request.query
        siblings = [
            {"rfilename": path, **(_blob(file) if blobs else {})}
            for path, file in commit.files.items()
        ]
        return _json(
            {"id": name, "sha": commit.sha, "private": repository.private, "siblings": siblings}
        )

    def refs(self, request: Request, name: str) -> Answer:
        repository = self._visible(request, name)

        def entry(kind: str, ref: str, sha: str) -> dict[str, str]:
            return {"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": sha}

        tags = [entry("tags", tag, sha) for tag, sha in repository.tags.items()]
        heads = [entry("heads", "main", repository.head)]
        return _json({"branches": heads, "converts": [], "tags": tags})

    def tag(self, request: Request, name: str, revision: str) -> Answer:
        repository = self._writable(request, name)
        tag = request.json()["tag"]
        if tag in repository.tags:
            raise Refused(409, None, f"Tag {tag} already exists")
        repository.tags[tag] = repository.at(unquote(revision)).sha
        return _json({})

    def tree(self, request: Request, name: str, revision: str) -> Answer:
        files = self._visible(request, name).at(unquote(revision)).files
        start = int(request.query.get("cursor", ["0"])[0])
        page = [_entry(path, files[path]) for path in list(files)[start : start + PAGE]]
        headers = {}
        if start + PAGE < len(files):
            following = f"{_origin(request)}{request.path}?recursive=true&cursor={start + PAGE}"
            headers["link"] = f'<{following}>; rel="next"'
        return _json(page, 200, headers)

    def paths_info(self, request: Request, name: str, revision: str) -> Answer:
        files = self._visible(request, name).at(unquote(revision)).files
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return _json([_entry(path, files[path]) for path in wanted if path in files])

    def preupload(self, request: Request, name: str, revision: str) -> Answer:
        files = self._writable(request, name).at(unquote(revision)).files
        answers = []
        for each in request.json()["files"]:
            path = each["path"]
            large = _is_large(path, files) or each["size"] > LARGE_FROM
            known = {"oid": files[path].identity} if path in files else {}
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return _json({"files": answers})

    def batch(self, request: Request, name: str) -> Answer:
        self._writable(request, name)
        wanted = request.json()
        if wanted["hash_algo"] != "sha256" or "basic" not in wanted["transfers"]:
            raise Refused(422, None, "only basic transfers of SHA-256 objects")
        origin = _origin(request)
        objects = []
        for each in wanted["objects"]:
            actions = {
                "upload": {"href": f"{origin}/lfs/{each['oid']}"},
                "verify": {"href": f"{origin}/{name}.git/info/lfs/objects/verify"},
            }
            present = each["oid"] in self.objects
            objects.append({**each, **({} if present else {"actions": actions})})
        return _json({"transfer": "basic", "objects": objects})

    def upload(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, None, "the checksum does not match")
        self.objects[oid] = request.body
        return Answer()

    def verify(self, request: Request, name: str) -> Answer:
        self._writable(request, name)
        wanted = request.json()
        if len(self.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, None, "no such object")
        return _json({})

    def commit(self, request: Request, name: str, revision: str) -> Answer:
        repository = self._writable(request, name)
        if self.before_commit is not None:
            disturb, self.before_commit = self.before_commit, None
            disturb()
        if unquote(revision) != "main":
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if header["value"].get("parentCommit", repository.head) != repository.head:
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.at("main").files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        made = repository.commit(files, header["value"]["summary"])
        url = f"{_origin(request)}/{name}/commit/{made.sha}"
        return _json({"commitUrl": url, "commitOid": made.sha, "hookOutput": ""})

    def _apply(self, files: dict[str, File], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File.made(base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            content = self.objects.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise Refused(400, None, f"LFS pointer {path} points to no object")
            files[path] = File.made(content, large=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")

    def resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        commit = self._visible(request, name).at(unquote(revision))
        said = {"x-repo-commit": commit.sha, "accept-ranges": "bytes"}
        file = commit.files.get(unquote(path))
        if file is None:
            refused = Refused(404, "EntryNotFound", "Entry not found").answer
            return Answer(refused.status, refused.body, refused.headers | said)
        if file.sha256 is None:
            return _ranged(file.content, request, said | {"etag": f'"{file.blob}"'})
        large = {"x-linked-etag": f'"{file.sha256}"', "x-linked-size": str(len(file.content))}
        store = _origin(request).replace("127.0.0.1", "localhost")
        place = f"{store}/store/{name}/{commit.sha}/{path}"
        return Answer(302, b"", said | large | {"location": place})

    def stored(self, request: Request, name: str, sha: str, path: str) -> Answer:
        if "authorization" in request.headers:
            raise Refused(400, None, "only one auth mechanism is allowed")
        file = self.repositories[name].commits[sha].files[unquote(path)]
        return _ranged(file.content, request, {"etag": f'"{file.sha256}"'})


_NAME = r"(?P<name>[^/]+/[^/]+?)"
_API = rf"/api/models/{_NAME}"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: Final[tuple[tuple[str, str, Callable[..., Answer]], ...]] = (
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/repos/create", Hub.create_repository),
    ("POST", "/api/validate-yaml", Hub.validate_card),
    ("GET", _API, Hub.info),
    ("GET", f"{_API}/revision/{_REVISION}", Hub.info),
    ("GET", f"{_API}/refs", Hub.refs),
    ("POST", f"{_API}/tag/{_REVISION}", Hub.tag),
    ("GET", f"{_API}/tree/{_REVISION}", Hub.tree),
    ("POST", f"{_API}/paths-info/{_REVISION}", Hub.paths_info),
    ("POST", f"{_API}/preupload/{_REVISION}", Hub.preupload),
    ("POST", f"{_API}/commit/{_REVISION}", Hub.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/verify", Hub.verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Hub.upload),
    ("HEAD|GET", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", Hub.resolve),
    ("HEAD|GET", f"/store/{_NAME}/(?P<sha>[0-9a-f]{{40}})/(?P<path>.+)", Hub.stored),
)


def git_hash(content: bytes) -> str:
    """Return git's object id of a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _is_large(path: str, files: Mapping[str, File]) -> bool:
    attributes = files[".gitattributes"].content.decode() if ".gitattributes" in files else ""
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    return any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)


def _blob(file: File) -> dict[str, Any]:
    large = {"sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
    return {
        "size": len(file.content),
        "blobId": file.blob,
        **({"lfs": large} if file.sha256 else {}),
    }


def _entry(path: str, file: File) -> dict[str, Any]:
    large = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
    plain = {"type": "file", "path": path, "oid": file.blob, "size": len(file.content)}
    return plain | ({"lfs": large} if file.sha256 else {})


def _ranged(content: bytes, request: Request, headers: Headers) -> Answer:
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not found:
        return Answer(200, content, headers)
    start, end = int(found[1]), int(found[2] or len(content) - 1)
    if start >= len(content):
        return Answer(416, b"", headers | {"content-range": f"bytes */{len(content)}"})
    span = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, content[start : end + 1], headers | {"content-range": span})


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    body = json.dumps(value).encode()
    return Answer(status, body, {"content-type": "application/json", **(headers or {})})


def _origin(request: Request) -> str:
    return f"http://{request.headers['host']}"


def application(hub: Hub) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Return the ASGI application of a Hub."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        path = scope["raw_path"].decode()
        query = parse_qs(scope["query_string"].decode())
        request = Request(scope["method"], path, query, headers, body)
        hub.requests.append(request)
        fault = hub.fault(request)
        if fault is not None and fault.page is not None:
            answer = Answer(200, fault.page, {"content-type": "text/html"})
        elif fault is not None and fault.status is not None:
            answer = _json({"error": "Internal Error - We're working on it"}, fault.status)
        else:
            answer = hub.answer(request)
        await _reply(send, request, answer, fault)

    return app


async def _reply(send: Send, request: Request, answer: Answer, fault: Fault | None) -> None:
    broken = fault is not None and fault.status is None
    headers = answer.headers | {"content-length": str(len(answer.body))}
    pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": pairs})
    if fault is not None and broken:
        part = answer.body[: fault.after]
        await send({"type": "http.response.body", "body": part, "more_body": True})
        raise ConnectionAbortedError("broken off in the middle of the answer")
    body = b"" if request.method == "HEAD" else answer.body
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(hub: Hub, port: int = 0) -> Iterator[str]:
    """Serve a Hub on 127.0.0.1 from a thread of this process; give its address."""
    # Said outright, so that asyncio sends without delay.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()  # now: the server's thread may start late, and who comes before it waits
    config = uvicorn.Config(application(hub), log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A Hugging Face Hub in memory, for trying out.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token", default="secret", help="the token of the user `me`")
    options = parser.parse_args()
    hub = Hub(options.token)
    uvicorn.run(application(hub), host="127.0.0.1", port=options.port, lifespan="off", ws="none")


if __name__ == "__main__":
    main()
