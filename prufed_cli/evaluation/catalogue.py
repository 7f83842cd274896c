"""The names of lm-eval's own tasks, read off its files in a second.

lm-eval parses its fourteen thousand YAML files before it knows one name, which takes ten times as
long; a name and where it stands can be seen without parsing.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_NAMED: Final = re.compile(rb"^[\"']?(task|group|tag)[\"']?:[ \t]*([^\s#\[\-][^\n#]*)", re.M)
_LISTED: Final = re.compile(rb"^[\"']?tag[\"']?:[ \t]*((?:\n[ \t]*-[^\n]*)+|\[[^\]]*\])", re.M)
_WORD: Final = re.compile(rb"[^\s,\[\]\"']{2,}")


@functools.cache
def own_names() -> dict[str, Path | None]:
    """Return every task, group and tag lm-eval brings, with the directory of a task's YAML file.

    A group or a tag has None: its tasks may stand in any directory.
    """
    import lm_eval.tasks

    names: dict[str, Path | None] = {}
    for directory, _, files in os.walk(Path(lm_eval.tasks.__file__).parent):
        for file in files:
            path = Path(directory, file)
            if path.suffix not in {".yaml", ""}:
                continue
            for name, is_task in _names(path.read_bytes()):
                # A file without suffix is only ever included; the tags in it count.
                own = is_task and path.suffix == ".yaml"
                names[name] = path.parent if own else names.get(name)
    return names


def _names(content: bytes) -> Iterator[tuple[str, bool]]:
    for keyword, value in _NAMED.findall(content):
        yield value.decode(errors="replace").strip().strip("\"'"), keyword == b"task"
    for listed in _LISTED.findall(content):
        for word in _WORD.findall(listed):
            yield word.decode(errors="replace"), False
