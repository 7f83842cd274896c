"""Find lm-eval tasks by name and build them once.

lm-eval's own index of thousands of YAML files takes more than ten seconds to read, so a name is
looked for in the directory given, among the embedded tasks, in lm-eval's directory of that name,
and in a catalogue of lm-eval's names; the whole index is read only for its tags and groups.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError
from prufed_cli.evaluation.catalogue import own_names
from prufed_cli.evaluation.documents import data_files, file_digest, overrides
from prufed_cli.evaluation.session import contained
from prufed_cli.home import home
from prufed_cli.progress import SILENT, Reporter

if TYPE_CHECKING:
    from prufed_cli.evaluation.scorer import Encodings

FEWSHOT_SEED: Final = 1234
"""lm-eval's own default."""


@dataclass(frozen=True)
class Leaf:
    """One task that is scored.

    Attributes:
        name: as lm-eval knows it.
        digest: over configuration, data files, limit, few-shot count and lm-eval's version.
        manager: the lm-eval task manager that knows it.
        changes: to its configuration.
    """

    name: str
    digest: str
    manager: Any = field(repr=False, compare=False)
    changes: Mapping[str, Any] = field(repr=False, compare=False)


class TaskSet:
    """Tasks found by name; the documents are read and the requests built once, when first used.

    Attributes:
        leaves: name to task, in the order asked for.
        columns: what is reported: a task, or a group with the tasks it pools.
        limit: at most so many documents per task.
        num_fewshot: labelled examples before each document.
    """

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        columns: Mapping[str, tuple[str, ...]],
        *,
        limit: int | None,
        num_fewshot: int,
    ) -> None:
        self.leaves = dict(leaves)
        self.columns = dict(columns)
        self.limit = limit
        self.num_fewshot = num_fewshot
        self._built: dict[str, Any] = {}
        self._encodings: tuple[str | None, Encodings] = (None, {})

    def encodings(self, tokenizer: str | None) -> Encodings:
        """Return the tokens of requests encoded by a tokenizer of this digest so far.

        One tokenizer's are kept: a federation scores many models that share theirs.
        """
        if tokenizer is None or tokenizer != self._encodings[0]:
            self._encodings = (tokenizer, {})
        return self._encodings[1]

    def build(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return name to lm-eval task object, with its requests built.

        Raises:
            PrufedError: a data set cannot be read, or the task needs images or runs code.
        """
        names = list(self.leaves) if names is None else names
        for name in names:
            if name not in self._built:
                self._built[name] = self._build(self.leaves[name])
        return {name: self._built[name] for name in names}

    def _build(self, leaf: Leaf) -> Any:
        with contained():
            task = _load(leaf)
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise PrufedError(
                    f"task {leaf.name} runs generated code or needs images or sound",
                    "choose a task of text only",
                    USAGE,
                )
            task.set_config(key="num_fewshot", value=self.num_fewshot)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            task.build_all_requests(limit=self.limit, rank=0, world_size=1)
        _keep_requests(task)
        return task


def find_tasks(
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    reporter: Reporter = SILENT,
) -> TaskSet:
    """Find tasks, groups and tags by name, without reading their documents.

    Args:
        names: as lm-eval knows them, or as a YAML file under ``include_path`` names them.
        include_path: a directory of task YAML files.
        limit: at most so many documents per task.
        num_fewshot: labelled examples before each document.
        reporter: is told when the slow index is read.

    Raises:
        PrufedError: an unknown name, a missing data file, or a limit below one.
    """
    if limit is not None and limit < 1:
        raise PrufedError(f"limit {limit} leaves no document", "give --limit 1 or more", USAGE)
    leaves: dict[str, Leaf] = {}
    columns: dict[str, tuple[str, ...]] = {}
    extra = {"limit": limit, "num_fewshot": num_fewshot}
    directories = _Directories(include_path, reporter)
    for name in dict.fromkeys(names):
        manager = directories.manager_of(name)
        index = manager.task_index
        members = list(_members(index, name, {}))
        for member in members:
            leaf = _leaf(manager, member, extra)
            leaves[leaf.name] = leaf
        pooled = {name: tuple(member["task"] for member in members)}
        apart = {member["task"]: (member["task"],) for member in members}
        columns.update(pooled if index[name].kind.name == "GROUP" else apart)
    return TaskSet(leaves, columns, limit=limit, num_fewshot=num_fewshot)


class _Directories:
    """The task managers a name is looked for in, each opened once.

    Args:
        include_path: searched first.
        reporter: is told when the slow index is read.
    """

    def __init__(self, include_path: Path | None, reporter: Reporter) -> None:
        if include_path is not None and not include_path.is_dir():
            raise PrufedError(
                f"no directory {include_path}", "give a directory of task YAML files", NOT_FOUND
            )
        self._include_path = include_path
        self._reporter = reporter
        self._managers: dict[Path | None, Any] = {}

    def manager_of(self, name: str) -> Any:
        """Return the first manager that knows a task, group or tag.

        Raises:
            PrufedError: none does.
        """
        known: list[str] = []
        for directory in self._near(name):
            manager = self._open(directory)
            if name in manager.task_index:
                return manager
            known += manager.all_tasks
        names = own_names()
        if name in names:
            return self._open(names[name])
        near = difflib.get_close_matches(name, [*known, *names], n=3)
        where = f" in {self._include_path}" if self._include_path else ""
        hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
        raise PrufedError(f"no lm-eval task {name!r}{where}", hint, USAGE)

    def _near(self, name: str) -> Iterator[Path]:
        """Yield the directories that are quick to read."""
        from prufed_cli.assets import embedded_tasks

        if self._include_path is not None:
            yield self._include_path
        yield embedded_tasks()
        import lm_eval.tasks

        own = Path(lm_eval.tasks.__file__).parent / name
        if re.fullmatch(r"\w[\w.-]*", name) and own.is_dir():
            yield own

    def _open(self, directory: Path | None) -> Any:
        """Return a manager of one directory's tasks, or of all that lm-eval brings."""
        if directory not in self._managers:
            from lm_eval.tasks import TaskManager

            if directory is None:
                self._reporter.note("reading lm-eval's whole index of tasks (this takes a while)")
            with contained():
                self._managers[directory] = TaskManager(
                    include_path=None if directory is None else str(directory.resolve()),
                    include_defaults=directory is None,
                )
        return self._managers[directory]


def _members(
    index: Mapping[str, Any], name: str, changes: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the tasks behind a task, a tag or a group, with a group's changes to them."""
    entry = index.get(name)
    if entry is None:
        raise PrufedError(f"a group names {name!r}, which is no task", "check its YAML file", USAGE)
    if entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _members(index, task, changes)
    elif entry.kind.name == "GROUP":
        yield from _group_members(index, entry.cfg, changes)
    else:
        yield {**changes, "task": name}


def _group_members(
    index: Mapping[str, Any], group: Mapping[str, Any], changes: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    members = group["task"]
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield from _members(index, member, changes)
        elif "group" in member and member["group"] not in index:
            yield from _group_members(index, member, changes)
        else:
            name = member.get("group") or member["task"]
            own = {key: value for key, value in member.items() if key not in {"group", "task"}}
            yield from _members(index, name, {**changes, **own})


def _leaf(manager: Any, member: Mapping[str, Any], extra: Mapping[str, Any]) -> Leaf:
    """Describe one task: what identifies its scores, and what to change to build it."""
    from importlib.metadata import version

    name = member["task"]
    entry = manager.task_index[name]
    config = {**entry.cfg, **member}
    directory = entry.yaml_path.parent
    files = data_files(config, directory)
    identity = {
        "config": {key: value for key, value in config.items() if key != "dataset_kwargs"},
        "settings": {} if files else config.get("dataset_kwargs"),
        "files": {split: [file_digest(path) for path in files[split]] for split in files},
        "code": _code_digests(entry.yaml_path),
        "lm_eval": version("lm-eval"),
        **extra,
    }
    text = json.dumps(identity, sort_keys=True, default=str).replace(str(directory), ".")
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    changes = {**member, **overrides(files, config, home() / "cache" / "datasets")}
    return Leaf(name, digest, manager, changes)


def _code_digests(yaml_path: Path) -> dict[str, str]:
    """Return the digests of the Python files beside a YAML file, which it may call."""
    return {path.name: file_digest(path) for path in sorted(yaml_path.parent.glob("*.py"))}


def _load(leaf: Leaf) -> Any:
    """Build one task; an inline group is lm-eval's way to change a task that its index knows."""
    try:
        loaded = leaf.manager.load([{"group": "prufed", "task": [dict(leaf.changes)]}])
    except PrufedError:
        raise
    except Exception as error:  # a task's configuration may run any code of lm-eval's or its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PrufedError(
            f"task {leaf.name} cannot be built: {reason[0].rstrip('.')}",
            "check its YAML file; a data set of the Hub needs a network",
        ) from error
    return loaded["tasks"][leaf.name]


def _keep_requests(task: Any) -> None:
    """Make later evaluations use the requests already built.

    lm-eval builds them anew on every call; with few-shot examples drawn from a generator that has
    moved on, two models would even be asked different questions.
    """

    def reuse(**_: object) -> None:
        for instance in task.instances:
            instance.resps.clear()
            instance.filtered_resps.clear()

    task.build_all_requests = reuse
