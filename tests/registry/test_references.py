"""References: what they may look like, what they mean, what a wrong one is told."""

from __future__ import annotations

import re

import pytest

from prufed_registry import InvalidRequest, NotFound, Registry, RegistryError
from prufed_registry.names import Reference, is_name, is_safe_path, parse_reference, slug


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("tiny", Reference("tiny")),
        ("tiny@latest", Reference("tiny")),
        ("tiny@v12", Reference("tiny", version=12)),
        ("tiny@best-so_far.2", Reference("tiny", alias="best-so_far.2")),
        ("tiny@sha256:ab12cd", Reference("tiny", digest_prefix="sha256:ab12cd")),
    ],
)
def test_what_a_reference_means(text, meaning):
    assert parse_reference(text) == meaning


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "Tiny",
        "-tiny",
        "tiny-",
        "a" * 97,
        "latest",
        "v3",
        "../tiny",
        "a/b",
        "tiny\n",
        "tiny@",
        "tiny@v0",
        "tiny@v03",
        "tiny@v1@v2",
        "tiny@Best",
        "tiny@../best",
        "tiny@sha256:ab12",
        "tiny@sha256:xyzxyz",
        "tiny@sha256:" + "a" * 65,
        "tiny@md5:ab12cd",
    ],
)
def test_malformed_references_name_themselves_and_give_a_hint(registry, publish, text):
    publish()
    with pytest.raises(InvalidRequest) as caught:
        registry.resolve(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("path", ["a", "a/b.txt", "a b", "größe.txt", "...", "a..b"])
def test_paths_that_stay_inside(path):
    assert is_safe_path(path)


@pytest.mark.parametrize(
    "path", ["", "/a", "..", "a/../b", "./a", "a//b", "a/", "a\nb", "a\\b", "a\x00", "a\udcff"]
)
def test_paths_that_do_not(path):
    assert not is_safe_path(path)


def test_a_slug_is_a_name():
    assert slug("My Model (7B)") == "my-model-7b"
    assert is_name(slug("x" * 300))
    with pytest.raises(InvalidRequest):
        slug("???")


def test_resolving_in_every_way(registry, publish):
    first, second = publish(seed=1), publish(seed=2)
    registry.set_alias("tiny", "best", 1)
    assert registry.resolve("tiny") == registry.resolve("tiny@latest") == second
    assert registry.resolve("tiny@v1") == registry.resolve("tiny@best") == first
    assert registry.resolve(f"tiny@{first.digest[:13]}") == first
    assert registry.resolve(f"tiny@{first.digest}") == first
    assert (first.ref, second.ref) == ("tiny@v1", "tiny@v2")


def test_equal_bytes_are_one_content_and_resolve_to_the_newest(registry, publish):
    first, second = publish(), publish()
    assert first.digest == second.digest
    assert registry.resolve(f"tiny@{first.digest[:20]}") == second


def test_a_digest_prefix_that_fits_two_contents(registry):
    digests: dict[str, str] = {}
    # Six digits are the shortest prefix, so a clash has to be searched for: one in about 5,000.
    for number in range(20_000):
        from hashlib import sha256

        line = f"n.txt {sha256(str(number).encode()).hexdigest()}\n"
        prefix = sha256(line.encode()).hexdigest()[:6]
        if prefix in digests:
            break
        digests[prefix] = str(number)
    for content in (digests[prefix], str(number)):
        with registry.stage() as staging:
            (staging.path / "n.txt").write_text(content)
            made = staging.publish("clash", "base", recipe={})
    with pytest.raises(InvalidRequest, match="fits 2 contents"):
        registry.resolve(f"clash@sha256:{prefix}")
    assert registry.resolve(f"clash@{made.digest[:30]}") == made


def test_what_is_not_there_names_what_is_near(registry, publish):
    publish("llama-tiny")
    publish("llama-tiny", seed=1)
    registry.remove("llama-tiny@v1")
    registry.set_alias("llama-tiny", "best", 2)
    for reference, message, hint in [
        ("lama-tiny", "no artifact 'lama-tiny'", "did you mean llama-tiny"),
        ("zzzzzzzz", "no artifact", "prufed list"),
        ("llama-tiny@v9", "v9 is missing", "v2"),
        ("llama-tiny@v1", "v1 was removed", "v2"),
        ("llama-tiny@bets", "no alias 'bets'", "best"),
        ("llama-tiny@sha256:000000", "no version with the digest", "prufed list llama-tiny"),
    ]:
        with pytest.raises(NotFound, match=re.escape(message)) as caught:
            registry.resolve(reference)
        assert hint in (caught.value.hint or "")
        assert caught.value.exit_code == 3


def test_aliases(registry, publish):
    publish()
    publish(seed=1)
    registry.set_alias("tiny", "best", 1)
    registry.set_alias("tiny", "best", 2)
    registry.set_alias("tiny", "older", 1)
    assert registry.aliases("tiny") == {"best": 2, "older": 1}
    registry.remove_alias("tiny", "older")
    assert registry.aliases("tiny") == {"best": 2}
    for alias in ("latest", "v7", "Best", "a/b"):
        with pytest.raises(InvalidRequest):
            registry.set_alias("tiny", alias, 1)
    with pytest.raises(NotFound):
        registry.set_alias("tiny", "best", 3)
    with pytest.raises(NotFound):
        registry.remove_alias("tiny", "older")
    registry.remove("tiny@v2")
    assert registry.aliases("tiny") == {}


def test_an_empty_registry_is_not_created_by_reading(root):
    registry = Registry(root)
    assert registry.list() == []
    assert registry.names() == []
    assert registry.verify() == []
    assert registry.gc().items == ()
    with pytest.raises(NotFound):
        registry.resolve("tiny")
    assert not root.exists()


def test_foreign_and_newer_directories_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="not a prufed registry"):
        Registry(tmp_path)
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "prufed-registry.json").write_text('{"layout": 2}')
    with pytest.raises(InvalidRequest, match="layout 2"):
        Registry(newer)
    (newer / "prufed-registry.json").write_text("[]")
    with pytest.raises(RegistryError, match="cannot be read"):
        Registry(newer)
    with pytest.raises(InvalidRequest, match="not a directory"):
        Registry(tmp_path / "notes.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer", "notes.txt"]
