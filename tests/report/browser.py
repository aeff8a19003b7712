"""A real Chromium without a window, told what to do through a pipe: it opens a file, says what went wrong, and measures."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "--no-first-run",
)


class Browser:
    """The DevTools protocol: JSON with a zero byte behind."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._left, self._last = write, read, b"", 0
        self.session = ""
        self.events = []

    def ask(self, method, **given):
        """Call a method and return its result; what happens meanwhile is kept."""
        self._last += 1
        wish = {"id": self._last, "method": method, "params": given}
        wish |= {"sessionId": self.session} if self.session else {}
        os.write(self._write, json.dumps(wish).encode() + b"\0")
        while True:
            said = self._message()
            if said.get("id") == self._last:
                assert "error" not in said, said
                return said["result"]
            self.events.append(said)

    def _message(self):
        while b"\0" not in self._left:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser is gone"
            self._left += data
        said, self._left = self._left.split(b"\0", 1)
        return json.loads(said)

    def open(self, path, width, *, dark=False):
        """Open a file in a window so wide."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=media)
        self.ask("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())
        return self

    def evaluate(self, code):
        """Return what a line of JavaScript says of the page: the page itself may run none."""
        found = self.ask("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path):
        """Keep a picture of the whole page."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(found["data"]))

    @property
    def complaints(self):
        """Return what it logged: errors, refusals of the page's policy."""
        return [
            event["params"] for event in self.events if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
        ]

    @property
    def asked_for(self):
        """Return the addresses that it fetched."""
        found = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in found]


@contextmanager
def browsing(folder):
    """Start a browser, and end it."""
    (read_there, write), (read, write_there) = os.pipe(), os.pipe()
    pipes = 'r=$1; w=$2; shift 2; exec "$@" 3<&"$r" 4>&"$w"'
    words = ["bash", "-c", pipes, "bash", str(read_there), str(write_there), PROGRAM, *FLAGS, f"--user-data-dir={folder}"]
    started = subprocess.Popen(words, pass_fds=(read_there, write_there), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for there in (read_there, write_there):
        os.close(there)
    try:
        browser = Browser(write, read)
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            browser.ask(f"{domain}.enable")
        yield browser
    finally:
        started.terminate()
        started.wait()
        for here in (read, write):
            os.close(here)
