"""A cloud's notice that a machine goes reaches ``drain.sh``."""

from __future__ import annotations

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.local
CLUSTER = Path(__file__).parents[2] / "cluster"


class Metadata(BaseHTTPRequestHandler):
    """What the two clouds tell a machine; the notice comes with the third look."""

    looks: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        right = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._say(200 if right else 400, "a token")

    def do_GET(self) -> None:
        self.looks.append(self.path)
        gone = len(self.looks) > 2
        if self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == "a token"
            self._say(200 if gone else 404, '{"action": "terminate", "time": "2026-11-23T08:22:00Z"}')
        elif self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self._say(200, "TRUE" if gone else "FALSE")
        else:
            self._say(400, "")

    def _say(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.looks.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", "110"), ("gcp", "25")])
def test_a_notice_is_passed_on(cloud: str, seconds: str, metadata: str, tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    shutil.copy(CLUSTER / "launcher" / "spot_notice.sh", tmp_path / "launcher")
    (tmp_path / "drain.sh").write_text('#!/bin/sh\necho "drained in $1 s"\n')
    (tmp_path / "drain.sh").chmod(0o755)
    env = {"RAYDMD_METADATA": metadata, "RAYDMD_NOTICE_EVERY": "0.05", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [tmp_path / "launcher" / "spot_notice.sh", cloud],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"drained in {seconds} s\n")
    assert len(Metadata.looks) == 3


def test_where_no_ray_runs_and_bad_words() -> None:
    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run([CLUSTER / words[0], *words[1:]], capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    code, said = run("launcher/spot_notice.sh", "azure")
    assert (code, said) == (2, "usage: spot_notice.sh aws|gcp\n")
    code, said = run("drain.sh", "soon")
    assert code == 2
    assert "must be a number" in said
