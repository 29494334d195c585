"""What screenshot.sh runs: Netron's server, a headless Chromium on it, and the clicks that lead to the two pictures.

The browser is driven by the DevTools protocol over a pair of pipes, so no debug port is open and no package but
Netron is needed. The page may only talk to Netron's server on 127.0.0.1; what else it asks for is refused and listed.
"""

import base64
import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import netron

OP = "SplitQLinear"
WIDTH, HEIGHT = 1600, 1000
SECONDS = 120  # for any one step; a large decoder's layout takes its time

# Runs before Netron's own code. Without the date Netron does not cover the graph with "Please update" 180 days after
# its release; with the cookie it does not cover it with the consent question (nothing is sent in either case).
BEFORE_NETRON = """
document.cookie = 'consent=1';
new MutationObserver(() => document.querySelector('meta[name=date]')?.remove())
  .observe(document, { childList: true, subtree: true });
"""

# What the steps below ask of the page.
HELPERS = """
globalThis.splitq = {
  // The titles (the coloured part with the op's type) of the graph's nodes.
  titles(type) {
    return [...document.querySelectorAll('#nodes .graph-node .node-item-type')]
      .filter((title) => title.querySelector('text').textContent === type);
  },
  box(elements) {
    const all = elements.map((element) => element.getBoundingClientRect());
    const left = Math.min(...all.map((box) => box.left)), right = Math.max(...all.map((box) => box.right));
    const top = Math.min(...all.map((box) => box.top)), bottom = Math.max(...all.map((box) => box.bottom));
    return { x: (left + right) / 2, y: (top + bottom) / 2, width: right - left, height: bottom - top };
  },
  // The two neighbouring nodes of a type that are closest to each other: both fit into one readable picture.
  closestPair(type) {
    const nodes = this.titles(type).map((title) => title.closest('.graph-node'));
    const size = (pair) => { const box = this.box(pair); return Math.max(box.width, box.height); };
    const pairs = nodes.slice(1).map((node, index) => [nodes[index], node]);
    return pairs.length ? pairs.reduce((best, pair) => size(pair) < size(best) ? pair : best) : nodes;
  },
  // Zooms until the elements fill the part of the window beside the panel, and scrolls them into its middle.
  frame(elements, fill) {
    const pane = document.getElementById('target');
    const target = globalThis.__view__.target;
    const wanted = this.box(elements);
    target.zoom *= fill * Math.min(pane.clientWidth / wanted.width, pane.clientHeight / wanted.height);
    const now = this.box(elements), around = pane.getBoundingClientRect();
    pane.scrollTo({ left: pane.scrollLeft + now.x - around.left - pane.clientWidth / 2,
                    top: pane.scrollTop + now.y - around.top - pane.clientHeight / 2, behavior: 'instant' });
  },
};
"""

# Netron's panel cuts names such as outlier_activation_bits; with this they are whole.
WIDE_PANEL = """
document.head.insertAdjacentHTML('beforeend', `<style id="wide-panel">
  #sidebar { width: 620px !important; }
  #target { width: calc(100% - 620px) !important; }
  .sidebar-item-name { min-width: 150px; max-width: 150px; }
  .sidebar-item-value-list { margin-left: 160px; }
</style>`);
"""


class Browser:
    """A headless Chromium with one page that reaches `origin` and nothing else.

    Messages are JSON, ended by a zero byte; the browser reads them from its descriptor 3 and answers on 4. It ends by
    itself when the pipes close.
    """

    def __init__(self, program: str, profile: str, origin: str) -> None:
        self.origin = origin
        self.refused: set[str] = set()
        self._last_id = 0
        self._unread = b""
        self._answers: dict[int, dict] = {}
        browser_in, self._to_browser = os.pipe()
        self._from_browser, browser_out = os.pipe()
        flags = [
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            # The browser itself finds no other machine either (updates, field trials, ...).
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--disable-background-networking",
            "--no-proxy-server",
            "--no-first-run",
            "--disable-gpu",
            "--hide-scrollbars",
            # Chromium refuses to run its sandbox as root, as in a container.
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "about:blank",
        ]
        self._log = Path(profile, "browser.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" 3<&{browser_in} 4>&{browser_out}', "bash", program, *flags],
                pass_fds=(browser_in, browser_out),
                stdout=log,
                stderr=log,
            )
        os.close(browser_in)
        os.close(browser_out)
        self._session: str | None = None

    def open_page(self) -> None:
        """Opens the page all further calls go to."""
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Fetch.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)

    def close(self) -> None:
        """Ends the browser, by force if it must be."""
        os.close(self._to_browser)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from_browser)

    def _send(self, method: str, **params) -> int:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        with contextlib.suppress(BrokenPipeError):  # the browser has ended: reading its answer says so
            while data:
                data = data[os.write(self._to_browser, data) :]
        return self._last_id

    def _read_message(self, deadline: float) -> None:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from_browser], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._from_browser, 1 << 20) if ready else b""
            if not data:
                said = self._log.read_text(errors="replace").strip().splitlines()
                why = "did not answer" if not ready else "ended"
                sys.exit(f"{self._process.args[4]} {why}; its last line: {said[-1] if said else '(none)'}")
            self._unread += data
        raw, self._unread = self._unread.split(b"\0", 1)
        message = json.loads(raw)
        if message.get("method") == "Fetch.requestPaused":
            request = message["params"]
            if request["request"]["url"].startswith(self.origin + "/"):
                self._send("Fetch.continueRequest", requestId=request["requestId"])
            else:
                self.refused.add(request["request"]["url"].split("?")[0])
                self._send("Fetch.failRequest", requestId=request["requestId"], errorReason="BlockedByClient")
        elif "id" in message:
            self._answers[message["id"]] = message

    def call(self, method: str, **params) -> dict:
        """A DevTools command's result."""
        wanted = self._send(method, **params)
        deadline = time.monotonic() + SECONDS
        while wanted not in self._answers:
            self._read_message(deadline)
        answer = self._answers.pop(wanted)
        if "error" in answer:
            sys.exit(f"the browser refused {method}: {answer['error']['message']}")
        return answer["result"]

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            error = answer["exceptionDetails"]
            sys.exit(f"in the page: {error.get('exception', {}).get('description', error['text'])}")
        return answer["result"].get("value")

    def wait_until(self, condition: str, what: str) -> None:
        """Waits for a JavaScript condition; ends the program when Netron shows a message instead, or takes too long."""
        deadline = time.monotonic() + SECONDS
        while not self.evaluate(f"Boolean({condition})"):
            said = self.evaluate(
                "/alert|notification|message/.test(document.body?.className)"
                " ? document.getElementById('message-text').innerText : ''"
            )
            if said:
                sys.exit(f"Netron says: {said}")
            if time.monotonic() > deadline:
                sys.exit(f"Netron did not show {what} within {SECONDS} seconds")
            time.sleep(0.2)

    def click(self, element: str) -> None:
        """A real click on the middle of an element, given as a JavaScript expression."""
        middle = self.evaluate(f"splitq.box([{element}])")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=middle["x"], y=middle["y"], **button)

    def save(self, path: Path) -> None:
        """Writes what the window shows as a PNG."""
        # Away from the graph: no hover colours in the picture.
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=HEIGHT - 1)
        time.sleep(1)  # the panel slides in, Netron scrolls smoothly
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        print(f"{path}: {path.stat().st_size // 1000} KB")


def take_pictures(browser: Browser, graph_picture: Path, body_picture: Path) -> None:
    """The steps a person would take: open the decoder, look at one SplitQLinear, open its function."""
    browser.open_page()
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=BEFORE_NETRON)
    browser.call("Page.navigate", url=browser.origin + "/")
    shown = "document.body?.classList.contains('default') && globalThis.__view__?.target"
    browser.wait_until(shown, "the graph")
    browser.evaluate(HELPERS)
    if not browser.evaluate(f"splitq.titles('{OP}').length"):
        sys.exit(f"the graph has no {OP}: is this an exported decoder?")

    browser.evaluate(WIDE_PANEL)
    browser.evaluate(f"globalThis.pair = splitq.closestPair('{OP}'); splitq.frame(pair, 0.85)")
    browser.click("pair[0].querySelector('.node-item-type')")
    browser.wait_until("document.querySelector('#sidebar-content .sidebar-section')", "the node's attributes")
    # Again: the panel has taken its part of the window.
    browser.evaluate("splitq.frame(pair, 0.85)")
    browser.save(graph_picture)

    # The last field of the title is the "f" that opens the function.
    browser.evaluate("document.getElementById('wide-panel').remove()")
    browser.click("[...pair[0].querySelectorAll('.node-item-type')].at(-1)")
    opened = "document.getElementById('toolbar-path').children.length > 1"
    browser.wait_until(f"{shown} && {opened}", "the function's body")
    browser.evaluate("splitq.frame([document.getElementById('nodes')], 0.97)")
    browser.save(body_picture)


def main(program: str, model: str, graph_picture: str, body_picture: str) -> None:
    """Takes both pictures of `model` with the browser `program`."""
    # A polite kill must also run the cleanup below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    logging.basicConfig(level=logging.WARNING)
    host, port = netron.start(model, address=("127.0.0.1", 0), browse=False)
    with tempfile.TemporaryDirectory(prefix="splitq-netron-", ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile, f"http://{host}:{port}")
        try:
            take_pictures(browser, Path(graph_picture), Path(body_picture))
        finally:
            browser.close()
            netron.stop((host, port))
    if browser.refused:
        print("refused, as meant: " + ", ".join(sorted(browser.refused)))


if __name__ == "__main__":
    main(*sys.argv[1:])
