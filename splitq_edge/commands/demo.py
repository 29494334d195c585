"""`splitq-edge demo --web`: serve the demo page and an exported folder to a browser on this machine."""

from __future__ import annotations

import shutil
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import splitq_edge
from splitq_edge.artifacts import read_export
from splitq_edge.errors import SplitQError

PAGE_FILES = ("index.html", "page.js", "engine.js", "style.css")
MODULES = ("onnxruntime-web", "@huggingface/tokenizers", "@huggingface/jinja")
TYPES = {
    ".css": "text/css",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}
LOCALHOST = "127.0.0.1"


def page_folder() -> Path:
    """The folder of the demo page: in the package, or docs/demo of a checkout.

    Raises:
        SplitQError: it is in neither.
    """
    here = [Path(root, "demo") for root in splitq_edge.__path__] + [Path(__file__).parents[2] / "docs" / "demo"]
    for folder in here:
        if (folder / PAGE_FILES[0]).is_file():
            return folder
    raise SplitQError("demo: expected the page in the package, found none; install splitq-edge again")


def make_server(out: Path, modules: Path, port: int) -> ThreadingHTTPServer:
    """A server of the page, the model and the JavaScript modules; nothing else can be read through it.

    Args:
        out: exported folder.
        modules: node_modules with `MODULES`.
        port: on this machine; 0 takes a free one.

    Raises:
        SplitQError: the folder is no export, a module is missing, or the port is taken.
    """
    manifest = read_export(out)
    missing = [name for name in MODULES if not (modules / name).is_dir()]
    if missing:
        raise SplitQError(
            f"demo: expected {', '.join(missing)} in {modules}, found none; run: npm install --ignore-scripts --prefix "
            f"{modules.parent} {' '.join(MODULES)}"
        )
    roots = {"model": (out, frozenset([*manifest["files"], "export.json"])), "modules": (modules, None)}
    try:
        return ThreadingHTTPServer((LOCALHOST, port), partial(_Handler, page_folder(), roots))
    except OSError as error:
        raise SplitQError(f"demo: port {port} cannot be used ({error.strerror}); choose another --port") from error


class _Handler(BaseHTTPRequestHandler):
    def __init__(
        self, page: Path, roots: dict[str, tuple[Path, frozenset[str] | None]], *args: object, **kwargs: object
    ) -> None:
        self._page = page
        self._roots = roots
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Send one of the files."""
        path = self._file(unquote(urlsplit(self.path).path).strip("/") or PAGE_FILES[0])
        if path is None or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(path.stat().st_size))
        # The page may talk to this server alone.
        self.send_header("Content-Security-Policy", "default-src 'self' data: blob: 'unsafe-inline' 'wasm-unsafe-eval'")
        self.end_headers()
        with path.open("rb") as file:
            shutil.copyfileobj(file, self.wfile)

    def _file(self, name: str) -> Path | None:
        """The file behind a name of the address, None for what is not served."""
        if name in PAGE_FILES:
            return self._page / name
        top, _, rest = name.partition("/")
        if top not in self._roots:
            return None
        root, listed = self._roots[top]
        path = (root / rest).resolve()
        inside = root.resolve() in path.parents
        return path if inside and (listed is None or rest in listed) else None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; the browser shows what is missing."""
