"""A server that speaks the Hugging Face hub's protocol, as far as huggingface_hub asks for it.

Repositories, their revisions, trees of files, and files by range, with the hub's headers; and
uploads with a token that may write: a repository, a branch, large files by LFS, a commit.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

WRITER = "hf_writer"  # the token that may write to all but `forbidden` repositories
LARGE = (".safetensors", ".npz")  # what the hub wants by LFS
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
CHANGE = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
LFS = re.compile(r"/lfs/([0-9a-f]{64})")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """Repositories by (kind, name), each with commits and branches; what was asked; faults."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str], dict[str, str]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []  # "GET path", with a range if there was one
        self.cut: dict[str, int] = {}  # file -> bytes after which it is cut off, once
        self.private: set[str] = set()
        self.forbidden: set[str] = set()  # repositories to which the token may not write
        self.large: dict[str, bytes] = {}  # files that were uploaded by LFS, by their SHA-256
        self.cards: list[str] = []  # those that the hub was asked to check
        self.failing: dict[str, int] = {}  # "preupload", "commit", ... -> the status it answers
        self.meanwhile: dict[str, dict] = {}  # repository -> what somebody commits before the user

    def push(self, kind: str, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files to a branch; return its hash."""
        digest = hashlib.sha1(name.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        self.commits.setdefault((kind, name), {})[commit] = files
        self.branches.setdefault((kind, name), {})[branch] = commit
        return commit

    def push_folder(
        self, kind: str, name: str, folder: str | Path, branch: str = "main", **others: bytes
    ) -> str:
        """Add a commit with the files of a folder and others, named with __ for a dot."""
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
        files |= {name.replace("__", "."): content for name, content in others.items()}
        return self.push(kind, name, files, branch)


def start(hub: Hub) -> ThreadingHTTPServer:
    """Serve a hub on a free port, in threads; shut it down with shutdown()."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def refuse(self, status: int, code: str, message: str = "") -> None:
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message or code})

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def find(self, kind: str, name: str, revision: str) -> str | None:
            """Return the commit of a revision; None where the refusal is sent."""
            if (kind, name) not in hub.commits:
                return self.refuse(404, "RepoNotFound")
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            commit = hub.branches[kind, name].get(revision, revision)
            return commit if commit in hub.commits[kind, name] else self.refuse(
                404, "RevisionNotFound"
            )  # fmt: skip

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked = self.headers.get("Range", "")
            hub.asked.append(f"{self.command} {path} {asked}".strip())
            if match := API.fullmatch(path):
                kind, name, what, revision = match.groups()
                self.describe(kind, name, what, revision or "main")
            elif match := FILE.fullmatch(path):
                self.send_file(match[1] or "models", *match.groups()[1:], asked)
            else:
                self.refuse(404, "EntryNotFound")

        do_HEAD = do_GET

        def describe(self, kind: str, name: str, what: str | None, revision: str) -> None:
            commit = self.find(kind, name, revision)
            if commit is None:
                return
            files = hub.commits[kind, name][commit]
            tree = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for path, data in files.items()
            ]
            info = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            info["private"] = name in hub.private
            content = json.dumps(tree if what == "tree" else info).encode()
            self.answer(200, content, {"Content-Type": "application/json"})

        def send_file(self, kind: str, name: str, revision: str, path: str, asked: str) -> None:
            commit = self.find(kind, name, revision)
            if commit is None:
                return
            content = hub.commits[kind, name][commit].get(path)
            if content is None:
                return self.refuse(404, "EntryNotFound")
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
            }
            status, start = 200, 0
            if begin := re.fullmatch(r"bytes=(\d+)-", asked):
                status, start = 206, int(begin[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if self.command == "GET" and path in hub.cut:
                headers["Content-Length"] = str(len(content) - start)
                content = content[: hub.cut.pop(path)]
                self.close_connection = True
            self.answer(status, content[start:], headers)

        def do_PUT(self) -> None:
            hub.large[LFS.fullmatch(self.path)[1]] = self.body()
            self.answer(200, b"", {})

        def do_POST(self) -> None:
            path, content = unquote(urlsplit(self.path).path), self.body()
            hub.asked.append(f"POST {path}")
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if given != WRITER:
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            if path == "/api/validate-yaml":
                return self.check_card(json.loads(content)["content"])
            if path == "/api/repos/create":
                return self.create(json.loads(content))
            if BATCH.fullmatch(path):
                return self.offer(json.loads(content)["objects"])
            name, what, branch = CHANGE.fullmatch(path).groups()
            if what in hub.failing:
                return self.refuse(hub.failing[what], "", f"{what} is not possible")
            if ("models", name) not in hub.commits:
                return self.refuse(404, "RepoNotFound")
            {"preupload": self.modes, "commit": self.commit, "branch": self.fork}[what](
                name, branch, content
            )

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def send(self, value: object, status: int = 200) -> None:
            self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def check_card(self, card: str) -> None:
            hub.cards.append(card)
            wrong = [{"message": '"license" must be one of [...]'}] * ("license: nonsense" in card)
            self.send({"errors": wrong, "warnings": []}, 400 if wrong else 200)

        def create(self, asked: dict) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.forbidden:
                return self.refuse(403, "", "You don't have the rights to create a model")
            place = {"url": f"http://{self.headers['Host']}/{name}"}
            if ("models", name) in hub.commits:
                return self.send(place | {"error": "You already created this model repo"}, 409)
            hub.push("models", name, {".gitattributes": b""})
            if asked.get("visibility") == "private":
                hub.private.add(name)
            self.send(place)

        def fork(self, name: str, branch: str, _: bytes) -> None:
            branches = hub.branches["models", name]
            if branch in branches:
                return self.refuse(409, "", "Reference already exists")
            branches[branch] = branches["main"]
            self.send({})

        def modes(self, name: str, branch: str, content: bytes) -> None:
            paths = [file["path"] for file in json.loads(content)["files"]]
            modes = [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for path in paths
            ]
            self.send({"files": modes})

        def offer(self, objects: list[dict]) -> None:
            place = f"http://{self.headers['Host']}/lfs/"
            for each in objects:
                if each["oid"] not in hub.large:
                    each["actions"] = {"upload": {"href": place + each["oid"]}}
            self.send({"transfer": "basic", "objects": objects})

        def commit(self, name: str, branch: str, content: bytes) -> None:
            if name in hub.meanwhile:
                hub.push("models", name, hub.meanwhile.pop(name), branch)
            before = hub.branches["models", name][branch]
            files = dict(hub.commits["models", name][before])
            for line in content.splitlines():
                change = json.loads(line)
                kind, value = change["key"], change["value"]
                if kind == "header" and value.get("parentCommit", before) != before:
                    return self.refuse(412, "", "A commit has happened since")
                if kind == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                elif kind == "deletedFile":
                    del files[value["path"]]
            commit = hub.push("models", name, files, branch)
            place = f"http://{self.headers['Host']}/{name}/commit/{commit}"
            self.send({"commitUrl": place, "commitOid": commit})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
