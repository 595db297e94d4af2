"""Where text comes from: files, or the language reference that every CPython carries."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def language_reference() -> str:
    """The chapters of the Python language reference behind ``help()``: about 465,000 characters, without a download.

    The text belongs to the running Python and differs a little from version to version.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(chapter.strip("\n") + "\n" for chapter in topics.values())


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ValueError
        There is no such file, it cannot be read, it is empty, or it does not hold text. The message is one line.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if b"\0" in raw:
        raise ValueError(f"{path}: expected text, got a binary file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte 0x{raw[error.start]:02x} at {error.start:,}") from None
    if not text.strip():
        raise ValueError(f"{path}: expected text, got an empty file")
    return text.replace("\r\n", "\n")


def read_texts(paths: Iterable[str | Path]) -> str:
    """The texts of several files, one after the other; a ValueError as from `read_text`."""
    return "\n".join(read_text(path) for path in paths)
