"""A Hugging Face Hub on the loopback, for the tests: what huggingface_hub needs to push a model and to read it back.

It can misbehave: `broken` routes answer 500, `sizes` lie about a file, `down` and `down_after` hang up."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """User "tester" has two tokens. Commits: {"oid", "message", "files": {path: (git oid, sha256 or None, bytes)}}."""

    daemon_threads = True

    def __init__(self, lfs=True):  # lfs=False: every file is "regular", as a client with Xet enabled needs it
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.lfs = f"http://127.0.0.1:{self.server_port}", lfs
        self.tokens = {"hf_sentinel_write": ("tester", "write"), "hf_sentinel_read": ("tester", "read")}
        self.repos, self.private, self.blobs = {}, set(), {}  # {id: [commit, ...]}, {id, ...}, {sha256: bytes}
        self.log = []  # (method, path) of every request
        self.heal()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def heal(self):
        self.down, self.down_after = False, None  # hang up on everybody, at once or after the named route
        self.broken = set()  # names of routes
        self.sizes = {}  # {(id, path): what a HEAD request is told}

    def commit(self, repo_id, files, message=""):
        oid = hashlib.sha1(f"{repo_id}{time.time_ns()}".encode()).hexdigest()
        self.repos.setdefault(repo_id, []).append({"oid": oid, "message": message, "files": files})
        return oid

    def put(self, repo_id, files):
        """A commit with these files, {path: bytes}, and no others; returns its hash."""
        return self.commit(repo_id, {path: (git_oid(data), None, data) for path, data in files.items()})

    def files(self, repo_id):
        """{path: bytes} of the newest commit."""
        return {path: data for path, (_, _, data) in self.repos[repo_id][-1]["files"].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, code, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content_Length": len(data), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status, message, code="", **headers):  # the client reads X-Error-Code and X-Error-Message
        self.reply(status, {"error": message}, X_Error_Message=message, X_Error_Code=code, **headers)

    def read_body(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while "chunked" in self.headers.get("Transfer-Encoding", ""):
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return body

    def handle_any(self):
        hub, path, body = self.server, unquote(urlsplit(self.path).path), self.read_body()
        if hub.down:
            self.close_connection = True
            return None
        hub.log.append((self.command, path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in hub.tokens:
            return self.error(401, "Invalid credentials in Authorization header")
        self.user, self.role = hub.tokens.get(token, (None, None))
        for method, pattern, route in ROUTES:
            if self.command.replace("HEAD", "GET") == method and (match := re.fullmatch(pattern, path)):
                if route.__name__ in hub.broken:
                    return self.error(500, "Internal Server Error")
                route(self, *match.groups(), body=body)
                hub.down = route.__name__ == hub.down_after
                return None
        return self.error(404, f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def writable(self, repo_id):
        if self.user is None:
            return self.error(401, "Invalid username or password.")
        if self.role == "write" and repo_id.split("/")[0] == self.user:
            return True
        return self.error(403, f"You don't have the rights to write under the namespace {repo_id.split('/')[0]!r}")

    def find(self, repo_id, rev):
        if repo_id not in self.server.repos:
            return self.error(404 if self.user else 401, "Repository not found", "RepoNotFound")
        found = [c for c in self.server.repos[repo_id] if rev in (None, "main", c["oid"])]
        return found[-1] if found else self.error(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def create(self, body):
        args = json.loads(body)
        repo_id = f"{args['organization'] or self.user}/{args['name']}"
        if self.writable(repo_id):
            new = repo_id not in self.server.repos
            if new:
                self.server.commit(repo_id, {}, "initial commit")
                if args.get("private") or args.get("visibility") == "private":
                    self.server.private.add(repo_id)
            self.reply(200 if new else 409, {"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def validate_yaml(self, body):
        good = json.loads(body)["content"].startswith("---\n")
        self.reply(200 if good else 400, {"errors": [] if good else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, repo_id, rev, body):
        if self.writable(repo_id) and (commit := self.find(repo_id, rev)):
            files = []
            for f in json.loads(body)["files"]:
                lfs = self.server.lfs and (b"\0" in base64.b64decode(f["sample"]) or f["path"].endswith(".safetensors"))
                oid, sha, _ = commit["files"].get(f["path"], (None, None, None))
                mode = "lfs" if lfs else "regular"
                files.append({"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": sha or oid})
            self.reply(200, {"files": files})

    def lfs_batch(self, repo_id, body):
        if self.writable(repo_id):
            objects = json.loads(body)["objects"]
            for o in objects:
                if o["oid"] not in self.server.blobs:  # without "actions" the client takes it for already uploaded
                    o["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}
            self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid, body):  # arrives without Authorization: a presigned URL on the real Hub
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        self.reply(200 if oid in self.server.blobs else 400)

    def push(self, repo_id, rev, body):
        if self.writable(repo_id) and (parent := self.find(repo_id, rev)):
            files, message = dict(parent["files"]), None
            for key, value in (json.loads(line).values() for line in body.splitlines()):
                if key == "header":
                    message = value["summary"]
                elif key == "file":
                    data = base64.b64decode(value["content"])
                    files[value["path"]] = (git_oid(data), None, data)
                elif key == "lfsFile":
                    oid = value["oid"]
                    files[value["path"]] = (git_oid(oid.encode()), oid, self.server.blobs[oid])
                elif key == "deletedFile":
                    del files[value["path"]]
            oid = self.server.commit(repo_id, files, message)
            url = f"{self.server.url}/{repo_id}/commit/{oid}"
            self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def info(self, repo_id, rev, body):
        if commit := self.find(repo_id, rev):
            siblings = [{"rfilename": path} for path in commit["files"]]
            self.reply(200, {"id": repo_id, "sha": commit["oid"], "siblings": siblings,
                             "private": repo_id in self.server.private})  # fmt: skip

    def tree(self, repo_id, rev, body):
        if commit := self.find(repo_id, rev):
            entries = []
            for path, (oid, sha, data) in commit["files"].items():
                lfs = {"lfs": {"oid": sha, "size": len(data), "pointerSize": 130}} if sha else {}
                entries.append({"type": "file", "path": path, "oid": oid, "size": len(data), **lfs})
            self.reply(200, entries)

    def resolve(self, repo_id, rev, path, body):
        if commit := self.find(repo_id, rev):
            if path not in commit["files"]:
                return self.error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit["oid"])
            oid, sha, data = commit["files"][path]
            size = self.server.sizes.get((repo_id, path), len(data))
            self.reply(200, data, X_Repo_Commit=commit["oid"], ETag=f'"{sha or oid}"', Content_Length=size)

    def auth_check(self, repo_id, write, body):
        if self.find(repo_id, "main") and (not write or self.writable(repo_id)):
            self.reply(200)


REPO = r"([\w.-]+/[\w.-]+?)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
    ("POST", f"/api/models/{REPO}/commit/(.+)", Handler.push),
    ("GET", f"/api/models/{REPO}/auth-check(/write)?", Handler.auth_check),
    ("GET", f"/api/models/{REPO}/tree/(.+)", Handler.tree),
    ("GET", f"/api/models/{REPO}(?:/revision/(.+))?", Handler.info),
    ("GET", f"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]
