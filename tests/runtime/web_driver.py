"""A browser that tests control through chromedriver, by the W3C's WebDriver protocol: keys, clicks, downloads."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of a reference to an element


class Browser:
    """One window."""

    def __init__(self, address: str, downloads: Path) -> None:
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={downloads.parent / 'profile'}",
        ]
        chrome = {"binary": BROWSER, "args": arguments, "prefs": {"download.default_directory": str(downloads)}}
        self._address = address
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": chrome}}
        self._session = self._call("POST", "/session", {"capabilities": wanted})["sessionId"]

    def _call(self, method: str, path: str, value: Any = None) -> Any:
        data = None if method == "GET" else json.dumps(value or {}).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def do(self, command: str, **value: Any) -> Any:
        """One command of the session."""
        return self._call("POST", f"/session/{self._session}/{command}", value)

    def open(self, page: Path) -> None:
        self.do("url", url=page.as_uri())

    def run(self, script: str) -> Any:
        """What an expression is in the page."""
        return self.do("execute/sync", script=f"return {script}", args=[])

    def press(self, *keys: str) -> None:
        """Press keys, as a keyboard does, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.do("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def click(self, selector: str) -> None:
        found = self.do("element", using="css selector", value=selector)
        self.do(f"element/{found[ELEMENT]}/click")

    def resize(self, width: int, height: int) -> None:
        """Show the page at this size in CSS pixels; narrower than a window can be, too."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.do("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)

    def close(self) -> None:
        self._call("DELETE", f"/session/{self._session}")


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """A browser whose downloads and profile lie in `folder`; the profile may be that of an earlier one."""
    downloads = folder / "downloads"
    downloads.mkdir(exist_ok=True)
    port = folder / "port"
    with port.open("w+") as log, subprocess.Popen([str(DRIVER), "--port=0"], stdout=log, stderr=log) as driver:
        try:
            started = wait_for(lambda: re.search(r"successfully on port (\d+)", port.read_text()))
            browser = Browser(f"http://127.0.0.1:{started[1]}", downloads)
            try:
                yield browser
            finally:
                browser.close()
        finally:
            driver.terminate()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value
