"""The server as users start it: a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys

ROOM = 45
"""Tokens that prompts of these tests leave in the context of 64."""


class ServerProcess:
    """`python -m inference.serve`, which listens when this returns."""

    def __init__(self, run, *options, environment=None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "inference.serve", "--run", str(run), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving (\S+) at (http://127\.0\.0\.1:(\d+))\n", line)
        assert found, line + self.process.stderr.read()
        self.url, self.port = found[2], int(found[3])

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self):
        """Return the exit status and what was written to stderr."""
        errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode, errors

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
