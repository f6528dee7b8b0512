"""Say what a wheel holds, and try it: python tools/wheel.py WHEEL [native|reference].

With a backend, the wheel is installed into an environment of its own, which borrows the packages of this
one but not its truekv, and the embedded hybrid must answer there on kernels of that backend.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARY = "truekv/kernels/native/libtruekv_native.so"
QUESTION = "What is 7 * 8 + 3 * 4?"


def main() -> None:
    """Print the sizes, then try the wheel if a backend is named."""
    wheel, *backend = sys.argv[1:]
    describe(Path(wheel))
    if backend:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(wheel).resolve(), backend[0], Path(folder))


def describe(wheel: Path) -> None:
    """Print its size and what it is made of, in bytes of the archive."""
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    models = sum(item.compress_size for item in entries if item.filename.startswith("truekv/tiny/"))
    library = sum(item.compress_size for item in entries if item.filename == LIBRARY)
    unpacked = sum(item.file_size for item in entries if item.filename == LIBRARY)
    whole = wheel.stat().st_size
    print(
        f"{wheel.name}: {whole / 1e6:.1f} MB, of which embedded models {models / 1e6:.1f} MB, "
        f"native library {library / 1e3:.0f} kB ({unpacked / 1e3:.0f} kB unpacked), "
        f"the rest {(whole - models - library) / 1e3:.0f} kB"
    )


def check(wheel: Path, backend: str, folder: Path) -> None:
    """Install it, let the embedded hybrid answer, and compare the kernels with the backend."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env/bin/python"
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    # A path in a .pth file brings packages, but not what their own .pth files would: the editable truekv stays out.
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)

    def truekv(*arguments: str) -> str:
        command = [folder / "env/bin/truekv", *arguments]
        return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout

    report = json.loads(truekv("doctor", "tiny-hybrid", "--kv-cache-dtype", "int8", "--json"))
    path = report["library"]["path"]
    if (path is not None and Path(path).is_relative_to(site)) != (backend == "native"):
        sys.exit(f"the {backend} kernels should run, but the library is {path}: {report['library']['problem']}")
    found = {row["backend"] for row in report["kernels"]}
    if found != {backend}:
        sys.exit(f"the {backend} kernels should run, but these would: {report['kernels']}")
    answer = truekv("generate", "tiny-hybrid", "--chat", QUESTION, "--kv-cache-dtype", "int8", "--max-tokens", "24")
    if "68" not in answer:
        sys.exit(f"{QUESTION} was answered with {answer!r}")
    print(f"installed apart, it answers on {backend} kernels, library {path}: {answer.strip()}")


if __name__ == "__main__":
    main()
