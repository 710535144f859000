"""A server on this machine that answers W&B as its own do, as far as a run needs it, and can be
shut down in the middle."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUN = "UnVuOjE="


class Server:
    """Answers until it is closed.

    Attributes: address: for WANDB_BASE_URL. asked: names of the operations so far. history: rows of
        metrics that arrived, as W&B sends them. sweep: the YAML of the sweep that was made here.
        jobs: what its agents are still to run, parameters by name. runs: what runs said they are,
        by id.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.sweep, self.jobs, self.given = "", [], 0
        self.runs: dict[str, dict[str, Any]] = {}
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
                self.give(
                    server.stream(said)
                    if self.path.endswith("file_stream")
                    else {"data": server.operation(said)}
                )

            def taken(self) -> bytes:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return (
                    gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
                )

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
        """What a GraphQL query or mutation gives; all of them at once, for nobody minds what was
        not asked for."""
        self.asked.append(said["query"].split("(")[0].split()[1])
        told = said.get("variables") or {}
        owner = {"id": "e", "name": "me"}
        project = {"id": "p", "name": told.get("project"), "entity": owner}
        if self.asked[-1] == "UpsertBucket":
            self.runs[told["name"]] = {
                **self.runs.get(told["name"], {}),
                **{k: v for k, v in told.items() if v},
            }
        self.sweep = told["config"] if self.asked[-1] == "UpsertSweep" else self.sweep
        run = {
            "id": RUN,
            "name": told.get("name"),
            "displayName": "r",
            "config": "{}",
            "historyLineCount": 0,
            "project": project,
        }
        files = [
            {"name": name, "uploadUrl": f"{self.address}/{name}"} for name in told.get("files", [])
        ]
        return {
            "model": {"id": "p", "bucket": None, "name": told.get("project"), "entity": owner},
            "upsertBucket": {"bucket": run, "inserted": True},
            "viewer": {
                "id": "v",
                "entity": "me",
                "username": "me",
                "flags": "{}",
                "teams": {"edges": []},
            },
            "upsertSweep": {
                "sweep": {"name": "s", "project": project},
                "configValidationWarnings": [],
            },
            "project": {
                "id": "p",
                "name": "longspan",
                "artifact": None,
                "sweep": {"id": "s", "config": self.sweep, "runs": {"edges": []}},
            },
            "createAgent": {"agent": {"id": "a"}},
            "agentHeartbeat": self.commands(told) if self.asked[-1] == "Heartbeat" else None,
            "createArtifact": {
                "artifact": {
                    "id": "t",
                    "state": "COMMITTED",
                    "artifactSequence": {"id": "q", "latestArtifact": None},
                }
            },
            "useArtifact": {"artifact": {"id": "t"}},
            "createRunFiles": {"runID": RUN, "uploadHeaders": [], "files": files},
        }

    def commands(self, told: dict[str, Any]) -> dict[str, Any]:
        """What an agent is to do next: a run at a time, and to leave when there is none any
        more."""
        found: list[dict[str, Any]] = []
        if not json.loads(told["runState"]):
            found = [{"type": "exit"}]
            if self.jobs:
                self.given += 1
                args = {name: {"value": value} for name, value in self.jobs.pop(0).items()}
                found = [
                    {
                        "type": "run",
                        "run_id": f"of-the-sweep-{self.given}",
                        "program": None,
                        "args": args,
                    }
                ]
        return {"agent": {"id": "a"}, "commands": json.dumps(found)}

    def close(self) -> None:
        """Be gone: nobody is answered from now on."""
        self.server.shutdown()
        self.server.server_close()
