"""A headless Chromium and its DevTools protocol: real clicks, keys and drops, what it fetched and what it complained of."""

import base64
import json
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path

import httpx
from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    def __init__(self, folder: Path, width: int = 1000, height: int = 800):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}",
                   f"--window-size={width},{height}"]  # fmt: skip
        self.process = subprocess.Popen([CHROMIUM, *options, "about:blank"], stderr=subprocess.DEVNULL)
        self.numbers, self.events = count(), []
        told = folder / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not told.exists() or len(told.read_text().splitlines()) < 2:
            assert time.monotonic() < end and self.process.poll() is None, "chromium does not start"
            time.sleep(0.05)
        port = told.read_text().splitlines()[0]
        target = httpx.put(f"http://127.0.0.1:{port}/json/new?about:blank", trust_env=False).json()
        self.connection = connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None)
        self.socket = self.connection.__enter__()
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            self.do(f"{domain}.enable")
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.__exit__(None, None, None)
        self.process.terminate()
        self.process.wait(30)

    def do(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps(dict(id=number, method=method, params=parameters)))
        while True:
            message = json.loads(self.socket.recv(60))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def js(self, expression: str):
        """Its value, of a promise what it gives."""
        answer = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"never: {expression}; {self.js('document.body.innerText')}"
            time.sleep(0.05)

    def middle(self, selector: str) -> tuple[float, float]:
        x, y = self.js(
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2]}})(document.querySelector({selector!r}))"
        )
        return x, y

    def click(self, selector: str) -> None:
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, times: int = 1) -> None:
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                        windowsVirtualKeyCode=dict(Tab=9, Home=36, End=35, ArrowRight=39, ArrowLeft=37)[key])  # fmt: skip

    def drop(self, selector: str, file: Path) -> None:
        x, y = self.middle(selector)
        for kind in ("dragEnter", "dragOver", "drop"):
            data = dict(items=[], files=[str(file)], dragOperationsMask=1)
            self.do("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def complaints(self) -> list[str]:
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def fetched(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def shoot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", captureBeyondViewport=False)["data"]))
