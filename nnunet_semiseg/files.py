"""Files that appear whole under their final name, or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CaseError(ValueError):
    """A case whose images cannot be used; the message names file or case, and the cure."""


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write to, with the same ending; renamed to ``file`` at the end, removed on an error."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # The process number: two processes may write the same file. The ending stays: it decides the format.
    temporary = file.with_name(f".unfinished-{os.getpid()}-{file.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        # A full disk is reported without the file.
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    with whole(file) as temporary:
        # Not the encoding of the machine, which may know ASCII alone.
        temporary.write_text(text, encoding="utf-8")


def read_text(file: Path, encoding: str = "utf-8") -> str:
    """Raises OSError, or ValueError if it is not UTF-8, naming the file."""
    try:
        return Path(file).read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text (byte {error.start}: {error.reason}). Save it as UTF-8, or copy it again if it "
            "is damaged"
        ) from None


def read_json(file: Path, keys: Iterable[str] = (), cure: str = "Restore it, or make it again") -> Any:
    """The content of a JSON file.

    Args:
        keys: If there are any, the file has to hold an object with these.
        cure: What to do if it does not.

    Raises:
        OSError, ValueError: naming the file, and the key that is missing.
    """
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is cut off or not valid JSON ({error}). {cure}") from None
    keys = list(keys)
    if keys and not isinstance(content, dict):
        raise ValueError(f"{file} has no keys, but must be a JSON object with {', '.join(keys)}. {cure}")
    for key in keys:
        if key not in content:
            raise ValueError(f"{file} has no key '{key}'. {cure}")
    return content


def read_table(file: Path, columns: Iterable[str] = (), cure: str = "Restore it, or make it again") -> list[dict]:
    """The rows of a table with a header, whose columns are separated by commas, semicolons or tabs.

    Args:
        columns: That it has to have.
        cure: What to do if it does not.

    Raises:
        OSError, ValueError: naming the file, and the column that is missing.
    """
    # Spreadsheets put a mark in front of UTF-8.
    text = read_text(file, "utf-8-sig")
    header = text.partition("\n")[0]
    # Spreadsheets write semicolons where a comma is the decimal point.
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}, is not a table ({error}). {cure}") from None
    for column in columns:
        if column not in (reader.fieldnames or ()):
            raise ValueError(f"{file} has no column '{column}'. {cure}")
    return rows


def write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_csv(file: Path, header: list[str], rows: Iterable) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(file, text.getvalue())


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder, sorted, without hidden ones (macOS leaves ``._CASE`` beside CASE).

    A link whose target is gone is one of them: whoever reads it says so.
    """
    return sorted(p for p in Path(folder).iterdir() if not p.is_dir() and not p.name.startswith("."))


def remove(path: Path) -> None:
    """Remove a file or a folder with all it has, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Make ``target`` a symbolic link to a file; a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = Path(source).resolve()
    if target.is_symlink() and os.readlink(target) == str(source):
        # Not made anew: somebody may be reading it.
        return
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source)
    except (OSError, NotImplementedError):
        with whole(target) as temporary:
            shutil.copyfile(source, temporary)
