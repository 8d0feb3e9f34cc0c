"""Headless Chromium, driven by the DevTools protocol over two pipes: no driver, no port, no
package."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)


class Browser:
    """One page, of width x height. `errors` gathers what its console and its exceptions say,
    `dialogs` the alerts."""

    def __init__(self, width=1280, height=800, dark=False, phone=False):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self.to = os.pipe()
        self.source, answers = os.pipe()
        # Chromium reads from 3 and writes to 4; these copies are neither, and no file that is open
        # already
        commands, replies = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 5) for fd in (theirs, answers))

        def pipes():
            os.dup2(commands, 3)
            os.dup2(replies, 4)

        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--remote-debugging-pipe",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ]
        arguments += [
            f"--user-data-dir={self.profile.name}",
            "--no-first-run",
            "--disable-background-networking",
            "about:blank",
        ]
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(
            [CHROMIUM, *arguments], preexec_fn=pipes, pass_fds=(3, 4), **quiet
        )
        for fd in (commands, replies, theirs, answers):
            os.close(fd)
        self.number = 0
        self.buffer = b""
        self.session = None
        self.errors = []
        self.dialogs = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        size = dict(width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.source)
        self.profile.cleanup()

    def read(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.source, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium is gone")
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method, **params):
        self.number += 1
        number = self.number
        message = {"id": self.number, "method": method, "params": params}
        data = (
            json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode()
            + b"\0"
        )
        while data:
            data = data[os.write(self.to, data) :]
        while True:
            message = self.read()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.note(message.get("method"), message.get("params"))

    def note(self, method, params):
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self.number += 1
            answer = {
                "id": self.number,
                "method": "Page.handleJavaScriptDialog",
                "params": {"accept": True},
            }
            os.write(self.to, json.dumps(answer | {"sessionId": self.session}).encode() + b"\0")

    def open(self, path, fragment=""):
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.wait("document.readyState === 'complete'")

    def run(self, expression):
        """The value of an expression in the page, awaited if it is a promise."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, expression, seconds=60):
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, f"after {seconds} s not true: {expression}"
            time.sleep(0.02)

    def press(self, *keys):
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
