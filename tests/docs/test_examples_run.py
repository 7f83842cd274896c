"""Every example in the README and in docs/ runs, in the order of its page."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_reading import README, blocks, name_of, pages
from docs_running import Reader

from prufed_plugins import discover
from tests.hub.server import Hub, serving

RUN = {"bash", "python", "yaml", "toml"}
"""What is followed; ``console`` is for what cannot run here: the network, a GPU, minutes."""

KNOWN = {*RUN, "console", "text", "json", "jsonl", "yaml", "toml"}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prufed_home: Path) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    environment, path, modules = dict(os.environ), list(sys.path), set(sys.modules)
    yield Reader(tmp_path)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]
    discover._installed.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub in this process, for the page that pushes and pulls."""
    token = "hf_tokenoftheexamples"
    with serving(Hub(token)) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", token)
        # The client's constants are set when it is imported.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in (README, *pages()) if any(block.language in RUN for block in blocks(page))],
    ids=name_of,
)
def test_the_page_runs(page: Path, reader: Reader, request: pytest.FixtureRequest) -> None:
    if name_of(page) == "tasks/hub.md":
        request.getfixturevalue("hub")
    for block in blocks(page):
        reader.follow(block)


@pytest.mark.parametrize("page", [README, *pages()], ids=name_of)
def test_fences_say_what_they_hold(page: Path) -> None:
    for block in blocks(page):
        assert block.language in KNOWN, f"{block.place}: fence {block.language!r}"
