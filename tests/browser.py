"""Headless Chromium over its own protocol (Chrome DevTools), for pages that go on working after they have loaded."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_READS, _WRITES = 3, 4  # the file descriptors that Chromium takes with --remote-debugging-pipe


class Browser:
    """One tab.

    Attributes:
        requests: addresses that were asked for.
        errors: exceptions, and errors in the console.
    """

    def __init__(self, chromium: str, profile: Path):
        (there, ours), (here, theirs) = (map(_high, os.pipe()) for _ in range(2))

        def connect() -> None:
            os.dup2(there, _READS)
            os.dup2(theirs, _WRITES)

        quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        self._process = subprocess.Popen(
            [chromium, "--headless", "--remote-debugging-pipe", *quiet, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(_READS, _WRITES),
            preexec_fn=connect,
            stderr=subprocess.DEVNULL,
        )
        os.close(there), os.close(theirs)
        self._out, self._in, self._count = os.fdopen(ours, "wb", 0), os.fdopen(here, "rb", 0), 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable", session=self._session)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def open(self, address: str) -> None:
        """Go to an address."""
        self._ask("Page.navigate", session=self._session, url=address)

    def until(self, script: str, seconds: float = 60) -> Any:
        """The value of a script as soon as it is true.

        Raises:
            TimeoutError: it did not become true.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self._ask("Runtime.evaluate", session=self._session, expression=script, returnByValue=True)
            if value := found.get("result", {}).get("value"):
                return value
            time.sleep(0.1)
        raise TimeoutError(f"{script}: not in {seconds} s; errors: {self.errors}")

    def _ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self._note(answer)
        return answer.get("result", {})  # there is none if the page was left meanwhile

    def _read(self) -> dict[str, Any]:
        found = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            if not byte:
                raise EOFError("Chromium ended")
            found += byte
        return json.loads(found)

    def _note(self, event: dict[str, Any]) -> None:
        name, params = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif name == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])


def _high(descriptor: int) -> int:
    """The same pipe under a number that is not one of Chromium's."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
