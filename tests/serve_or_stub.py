"""`sps2 serve` for the settings of policy sps2, and a stub that is one in a moment for all others.

A comparison's test starts it in place of two real servers, which would take seconds of CPU more.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SECONDS_PER_TOKEN = 0.05


class _Stub(BaseHTTPRequestHandler):
    """Answers with as many tokens "x" as were asked for, one after another."""

    def do_GET(self) -> None:
        self._begin("application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._begin("text/event-stream")
        for _ in range(body["max_tokens"]):
            time.sleep(SECONDS_PER_TOKEN)
            self._say({"choices": [{"text": "x", "logprobs": {"tokens": ["x"]}, "finish_reason": None}]})
        counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self._say({"choices": [], "usage": counts})
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _say(self, chunk: object) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def main(argv: list[str]) -> None:
    if argv[argv.index("--policy") + 1] == "sps2":
        os.execv(sys.executable, [sys.executable, "-m", "megatron_sps2", "serve", *argv])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stub)
    Path(argv[argv.index("--port-file") + 1]).write_text(str(server.server_address[1]))
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
