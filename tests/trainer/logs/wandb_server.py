"""A server on this machine that answers W&B as its own do, as far as a run needs it, and can be shut down in the middle."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUN = "UnVuOjE="


class Server:
    """Answers until it is closed.

    Attributes:
        address: for WANDB_BASE_URL.
        asked: names of the operations so far. history: rows of metrics that arrived, as W&B sends them.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.history: list[dict[str, Any]] = []
        server = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:  # pyright: ignore
                """Silent."""

            def do_GET(self) -> None:
                self.give({})

            def do_PUT(self) -> None:
                self.taken()
                self.give({})

            def do_POST(self) -> None:
                said = json.loads(self.taken() or b"{}")
                self.give(server.stream(said) if self.path.endswith("file_stream") else {"data": server.operation(said)})

            def taken(self) -> bytes:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

            def give(self, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # pyright: ignore
                """Clients leave as they like."""

        self.server = Quiet(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stream(self, said: dict[str, Any]) -> dict[str, Any]:
        """Take lines of files."""
        for line in said.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.history.append(json.loads(line))
        return {"exitcode": None, "limits": {}}

    def operation(self, said: dict[str, Any]) -> dict[str, Any]:
        """What a GraphQL query or mutation gives; all of them at once, for nobody minds what was not asked for."""
        self.asked.append(said["query"].split("(")[0].split()[1])
        told = said.get("variables") or {}
        owner = {"id": "e", "name": "me"}
        project = {"id": "p", "name": told.get("project"), "entity": owner}
        run = {
            "id": RUN,
            "name": told.get("name"),
            "displayName": "r",
            "config": "{}",
            "historyLineCount": 0,
            "project": project,
        }
        files = [{"name": name, "uploadUrl": f"{self.address}/{name}"} for name in told.get("files", [])]
        return {
            "model": {"id": "p", "bucket": None, "name": told.get("project"), "entity": owner},
            "upsertBucket": {"bucket": run, "inserted": True},
            "createRunFiles": {"runID": RUN, "uploadHeaders": [], "files": files},
        }

    def close(self) -> None:
        """Be gone: nobody is answered from now on."""
        self.server.shutdown()
        self.server.server_close()
