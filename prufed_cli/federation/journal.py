"""A run on disk: its configuration, and an append-only journal of what has happened.

``runs/<id>/run.json`` is written once, before the run begins. ``runs/<id>/events.jsonl`` grows by
one line per event, fsynced, and an event is written only after the artifact it names has been
published: whatever the journal says is true after a crash. A line cut short by a crash is dropped
on the next open.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from prufed_cli import interrupts
from prufed_cli.errors import INTEGRITY, NOT_FOUND, PrufedError

LAYOUT: Final = 1

Event = dict[str, Any]


@dataclass
class Run:
    """One run.

    Attributes:
        directory: ``runs/<id>``.
        document: what ``run.json`` holds: layout, id, created, configuration, plan digest.
        events: everything journalled so far, oldest first.
    """

    directory: Path
    document: Mapping[str, Any]
    events: list[Event] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The run's name on the command line."""
        return self.directory.name

    def record(self, kind: str, **facts: Any) -> Event:
        """Append one event and make sure that it is on the disk.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; what the event says may be its doing.
        """
        interrupts.check()
        event: Event = {"event": kind, "time": _now(), **facts}
        line = json.dumps(event, separators=(",", ":")) + "\n"
        with (self.directory / "events.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(line)
            journal.flush()
            os.fsync(journal.fileno())
        self.events.append(event)
        return event

    def find(self, kind: str, **facts: Any) -> Event | None:
        """Return the newest event of this kind with these facts."""
        for event in reversed(self.events):
            if event["event"] == kind and all(event.get(k) == v for k, v in facts.items()):
                return event
        return None

    def select(self, kind: str, **facts: Any) -> list[Event]:
        """Return every event of this kind with these facts, oldest first."""
        return [
            event
            for event in self.events
            if event["event"] == kind and all(event.get(k) == v for k, v in facts.items())
        ]

    @property
    def finished(self) -> bool:
        """Whether the last round is done."""
        return self.find("finished") is not None

    def discard(self) -> None:
        """Remove the run; its artifacts stay."""
        shutil.rmtree(self.directory, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run against a second process.

        Raises:
            PrufedError: another process is working on this run.
        """
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.directory / "lock", timeout=0):
                yield
        except Timeout:
            raise PrufedError(
                f"run {self.id} is in use by another process", "wait for it, or end it"
            ) from None


def create(root: Path, name: str, document: Mapping[str, Any]) -> Run:
    """Make the directory of a new run, ``<name>-<number>``, whole or not at all."""
    root.mkdir(parents=True, exist_ok=True)
    staging = root / f".new-{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        for number in range(1, 1_000_000):
            target = root / f"{name}-{number}"
            if target.exists():
                continue
            content = {"layout": LAYOUT, "id": target.name, "created": _now(), **document}
            _write(staging / "run.json", json.dumps(content, indent=1) + "\n")
            try:
                staging.rename(target)
            except OSError:  # another process took the number meanwhile
                continue
            try:
                _sync_directory(root)
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise
            return Run(target, content)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    raise PrufedError(f"no free run number for {name}")


def load(root: Path, run_id: str) -> Run:
    """Open a run; a journal line that a crash cut short is dropped.

    Raises:
        PrufedError: there is no such run, or its files are damaged.
    """
    directory = root / run_id
    if not run_id or "/" in run_id or not (directory / "run.json").is_file():
        raise PrufedError(f"no run {run_id!r}", "`prufed runs list` shows them", NOT_FOUND)
    try:
        document = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        if not isinstance(document, dict) or "created" not in document:
            raise ValueError("run.json does not describe a run")
        events = _read_events(directory / "events.jsonl")
    except ValueError as error:
        raise PrufedError(
            f"run {run_id} is damaged: {error}", "start a new run", INTEGRITY
        ) from error
    if document.get("layout", 0) > LAYOUT:
        raise PrufedError(f"run {run_id} was made by a newer prufed", "upgrade prufed")
    return Run(directory, document, events)


def list_runs(root: Path) -> list[Run]:
    """Return every run, oldest first."""
    if not root.is_dir():
        return []
    found = [
        load(root, path.name)
        for path in root.iterdir()
        if not path.name.startswith(".") and (path / "run.json").is_file()
    ]
    return sorted(found, key=lambda run: (run.document["created"], run.id))


def _read_events(path: Path) -> list[Event]:
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole, newline, rest = content.rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole) + len(newline))
    events = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            events.append(json.loads(line))
        except ValueError:
            raise ValueError(f"line {number} of events.jsonl is not JSON") from None
    return events


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
