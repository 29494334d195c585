"""The server of the demo page: what it gives out and what it does not."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitq_edge.commands.demo import MODULES, make_server
from splitq_edge.errors import SplitQError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An export of one file, another file beside it, and node_modules."""
    export = tmp_path / "export"
    export.mkdir()
    (export / "a.bin").write_bytes(b"\x00\x01")
    (export / "secret").write_text("not listed")
    manifest = {"schema": 1, "files": {"a.bin": {"bytes": 2, "sha256": ""}}}
    (export / "export.json").write_text(json.dumps(manifest))
    for name in MODULES:
        (tmp_path / "node_modules" / name).mkdir(parents=True)
    (tmp_path / "node_modules" / MODULES[0] / "x.wasm").write_bytes(b"wasm")
    return tmp_path


@pytest.fixture
def url(place: Path) -> Iterator[str]:
    with make_server(place / "export", place / "node_modules", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/engine.js", "text/javascript"),
        ("/model/a.bin", "application/octet-stream"),
        ("/model/export.json", "application/json"),
        (f"/modules/{MODULES[0]}/x.wasm", "application/wasm"),
    ],
)
def test_page_model_and_modules_are_served(url: str, path: str, kind: str) -> None:
    with urllib.request.urlopen(url + path) as answer:
        assert answer.headers["Content-Type"] == kind
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert len(answer.read()) == int(answer.headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    "path",
    ["/model/secret", "/model/../secret", "/model/%2e%2e/export/secret", "/modules/../export/secret", "/etc/passwd"],
)
def test_nothing_else_is_served(url: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url + path)


def test_missing_modules_say_how_to_get_them(place: Path) -> None:
    (place / "node_modules" / "onnxruntime-web" / "x.wasm").unlink()
    (place / "node_modules" / "onnxruntime-web").rmdir()
    with pytest.raises(SplitQError, match=r"expected onnxruntime-web in .*node_modules, found none; run: npm install"):
        make_server(place / "export", place / "node_modules", 0)
