"""A model hub on loopback: as much of the protocol as `huggingface_hub` needs to download a snapshot."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub:
    """Serves {"organisation/name": {"main": directory, "v2": directory}}; `requests` lists what was asked."""

    def __init__(self, repositories: dict[str, dict[str, Path]]) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def _answer(self, body: bool) -> None:
                path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                status, content, headers = hub._find(path)
                self._send(status, content, headers, body)

        self.repositories = repositories
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _find(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            branches = self.repositories.get(name)
            if branches is None:
                return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
            revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
            found = self._directory(branches, revision)
            if found is None:
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            directory, commit = found
            files = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
            if rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": f, "size": (directory / f).stat().st_size, "oid": "0" * 40} for f in files
                ]
                return 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
            info = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False, "tags": [],
                    "downloads": 0, "likes": 0, "siblings": [{"rfilename": f} for f in files]}  # fmt: skip
            return 200, json.dumps(info).encode(), {"Content-Type": "application/json"}
        if "resolve" in parts:
            at = parts.index("resolve")
            found = self._directory(self.repositories.get("/".join(parts[:at]), {}), parts[at + 1])
            if found is None:
                return 404, b"", {"X-Error-Code": "RevisionNotFound"}
            file = found[0] / "/".join(parts[at + 2 :])
            if not file.is_file():
                return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[1]}
            content = file.read_bytes()
            return (
                200,
                content,
                {
                    "X-Repo-Commit": found[1],
                    "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                    "Accept-Ranges": "bytes",
                },
            )
        return 404, b"", {}

    @staticmethod
    def _directory(branches: dict[str, Path], revision: str) -> tuple[Path, str] | None:
        for branch, directory in branches.items():
            if revision in (branch, COMMITS[branch]):
                return directory, COMMITS[branch]
        return None

    def downloaded(self) -> set[str]:
        """Names of the files whose content was fetched."""
        return {line.split("/", 5)[-1] for line in self.requests if line.startswith("GET") and "/resolve/" in line}
