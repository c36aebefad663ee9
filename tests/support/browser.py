"""A page in headless Chromium, used as a person does: by typing, pointing and reading.

Chromium is asked by its DevTools protocol, over a web socket of its own.
"""

import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--remote-debugging-port=0", "about:blank",
)  # fmt: skip
SECONDS = 60.0  # for something to appear


class Browser:
    """One page, from start to close(); what it asked for and complained of is kept."""

    def __init__(self, profile: Path) -> None:
        command = [str(CHROMIUM), f"--user-data-dir={profile}", *OPTIONS]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stderr=pipe, stdout=subprocess.DEVNULL, text=True)
        assert self.process.stderr
        lines: list[str] = []
        for line in self.process.stderr:
            lines.append(line)
            if line.startswith("DevTools listening on "):
                break
        else:
            raise AssertionError("Chromium did not start: " + "".join(lines))
        self.socket = connect(lines[-1].split()[-1], max_size=None)
        self.numbers = itertools.count(1)
        self.session: str | None = None
        self.asked: list[str] = []  # addresses
        self.errors: list[str] = []  # uncaught ones, and what the console prints as such
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """Return what a method of the protocol returns."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            told = json.loads(self.socket.recv(timeout=SECONDS))
            if told.get("id") == number:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self._note(told.get("method"), told.get("params", {}))

    def _note(self, event, params) -> None:
        if event == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(json.dumps(params["entry"]))

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show an address in a window of that size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def read(self, expression: str):
        """Return the value of an expression of JavaScript."""
        told = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, (expression, told)
        return told["result"].get("value")

    def text(self, selector: str) -> str:
        """Return what a person reads in an element."""
        return self.read(f"document.querySelector({json.dumps(selector)}).innerText")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.read(expression):
            assert time.monotonic() < end, (expression, self.errors, self.text("body"))
            time.sleep(0.05)

    def place(self, selector: str, across: float = 0.5) -> dict[str, float]:
        """Return the point of an element that is so far across it, scrolled to."""
        box = self.read(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return {x: b.x, y: b.y, width: b.width, height: b.height}; })()"
        )
        place = SimpleNamespace(**box)
        return {"x": place.x + place.width * across, "y": place.y + place.height / 2}

    def point(self, selector: str) -> None:
        """Move the mouse over an element."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.place(selector))

    def click(self, selector: str, across: float = 0.5) -> None:
        """Click on an element."""
        place = self.place(selector, across) | {"button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def type(self, selector: str, text: str) -> None:
        """Click into an element and type."""
        self.click(selector)
        for sign in text:
            self.call("Input.dispatchKeyEvent", type="keyDown", text=sign, key=sign)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=sign)

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        told = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def close(self) -> None:
        """End it."""
        self.session = None
        self.call("Browser.close")
        self.socket.close()
        self.process.communicate(timeout=SECONDS)
