"""Packages of strangers, built and installed into a virtual environment of their own.

Two are good, the others are broken in every way a plugin can be; none may cost more than itself.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from prufed_plugins.discover import catalog

pytestmark = pytest.mark.slow

PACKAGES = Path(__file__).parent / "packages"
GOOD = {
    "random-mask": ("random_mask", "random_mask_method"),
    "plain-mean": ("plain_mean",),
}
PREAMBLE = """
    from prufed_plugins.api import Method, hookimpl
    from prufed_plugins.params import NoParams

    PRUFED_API = (1, 0)

    def method(name="their-own", target="nowhere:Nothing", params=NoParams, **more):
        return Method(name, target, params, "somebody's", **more)
"""
BROKEN = {
    # name: (source after the preamble, what its one line must say)
    "import-error": ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named"),
    "syntax-error": ("def (:", "SyntaxError: "),
    "exit-at-import": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "wrong-signature": (
        """
        @hookimpl
        def prufed_pruners(config):
            yield method()
        """,
        "wrong hook signature: ",
    ),
    "wrapper": (
        """
        @hookimpl(wrapper=True)
        def prufed_samplers():
            return (yield)
        """,
        "wrong hook signature: prufed_samplers is a wrapper",
    ),
    "no-version": ("del PRUFED_API", "it does not state PRUFED_API; add PRUFED_API = (1, 0)"),
    "malformed-version": ("PRUFED_API = '1.0'", "PRUFED_API is '1.0', not (major, minor)"),
    "boolean-version": ("PRUFED_API = (True, 0)", "PRUFED_API is (True, 0), not (major, minor)"),
    "other-major": ("PRUFED_API = (2, 0)", "it is made for plugin API 2.0, this prufed has 1.0"),
    "newer-minor": ("PRUFED_API = (1, 1)", "it is made for plugin API 1.1, this prufed has 1.0"),
    "raises-in-hook": (
        """
        @hookimpl
        def prufed_tuners():
            raise RuntimeError("not\\ntoday")
        """,
        "RuntimeError: not today",
    ),
    "raises-while-iterated": (
        """
        @hookimpl
        def prufed_aggregators():
            yield method("half-way")
            raise RuntimeError("gave up")
        """,
        "RuntimeError: gave up",
    ),
    "yields-a-string": (
        """
        @hookimpl
        def prufed_samplers():
            yield "uniform"
        """,
        "prufed_samplers yielded 'uniform', not a Method",
    ),
    "returns-nothing": (
        """
        @hookimpl
        def prufed_samplers():
            method()
        """,
        "prufed_samplers gave None, not an iterable of Method",
    ),
    "loose-params": (
        """
        from pydantic import BaseModel, ConfigDict

        class Loose(BaseModel):
            model_config = ConfigDict(frozen=True)

        @hookimpl
        def prufed_samplers():
            yield method("loose", params=Loose)
        """,
        'loose: params Loose must have frozen=True and extra="forbid"',
    ),
    "mutable-params": (
        """
        from pydantic import BaseModel, ConfigDict

        class Mutable(BaseModel):
            model_config = ConfigDict(extra="forbid")

        @hookimpl
        def prufed_samplers():
            yield method("mutable", params=Mutable)
        """,
        'mutable: params Mutable must have frozen=True and extra="forbid"',
    ),
    "params-no-model": (
        """
        @hookimpl
        def prufed_samplers():
            yield method("plain", params=dict)
        """,
        "plain: params is <class 'dict'>, not a pydantic model",
    ),
    "bad-name": (
        """
        @hookimpl
        def prufed_samplers():
            yield method("Their Own")
        """,
        "prufed_samplers: the name 'Their Own' is not lower-case words and hyphens",
    ),
    "bad-target": (
        """
        @hookimpl
        def prufed_samplers():
            yield method("aimless", target="nowhere")
        """,
        "aimless: the target 'nowhere' is not package.module:Class",
    ),
    "requires-text": (
        """
        @hookimpl
        def prufed_samplers():
            yield method("worded", requires="flwr")
        """,
        "worded: requires is 'flwr', not a tuple of distributions",
    ),
    "summary-of-two-lines": (
        """
        @hookimpl
        def prufed_samplers():
            yield Method("chatty", "nowhere:Nothing", NoParams, "one\\ntwo")
        """,
        "chatty: the summary 'one\\ntwo' is not one line of text",
    ),
    "unprintable-error": (
        """
        class Silent(Exception):
            def __str__(self):
                raise ValueError

        raise Silent
        """,
        "Silent: (it cannot say why)",
    ),
    "alias-of-nothing": (
        """
        @hookimpl
        def prufed_samplers():
            yield method("second", alias_of="first")
        """,
        "second is an alias of 'first', which is no sampler of its own here",
    ),
    "alias-of-another": (
        """
        @hookimpl
        def prufed_samplers():
            yield method("first")
            yield method("second", target="elsewhere:Other", alias_of="first")
        """,
        "second is an alias of first, but has another target or params",
    ),
    "same-twice": (
        """
        @hookimpl
        def prufed_samplers():
            yield method("twin")
            yield method("twin")
        """,
        "it announces the sampler twin twice",
    ),
    "unknown-hook": (
        """
        @hookimpl
        def prufed_prunerz():
            yield method()
        """,
        "unknown hook prufed_prunerz; there is prufed_pruners, ",
    ),
    "no-hook": (
        """
        def prufed_pruners():
            yield method()
        """,
        "it implements no hook; mark its functions with prufed_plugins.api.hookimpl",
    ),
}
USABLE = {
    "taken-name": """
        @hookimpl
        def prufed_samplers():
            yield method("uniform", target="prufed_plugins.samplers.all:AllSampler")
    """,
    "noisy": """
        print("hello from an import")

        @hookimpl
        def prufed_samplers():
            print("hello from a hook")
            yield method("noisy", target="prufed_plugins.samplers.all:AllSampler")
    """,
    "needy": """
        @hookimpl
        def prufed_samplers():
            yield method("needy", requires=("prufed-absent-one", "prufed", "prufed-absent-two"))
    """,
    "lost-target": """
        @hookimpl
        def prufed_samplers():
            yield method("lost", target="lost_target:Nothing")
    """,
}


def write_wheel(directory: Path, name: str, modules: Mapping[str, str]) -> Path:
    """Build a wheel by hand: the first module is the plugin."""
    label = f"{name.replace('-', '_')}-1.0"
    files = {f"{module}.py": source for module, source in modules.items()}
    files[f"{label}.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    files[f"{label}.dist-info/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{label}.dist-info/entry_points.txt"] = f"[prufed]\n{name} = {next(iter(modules))}\n"
    record = f"{label}.dist-info/RECORD"
    lines = [f"{path},sha256={digest(text)},{len(text.encode())}" for path, text in files.items()]
    wheel = directory / f"{label}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, record: "\n".join([*lines, f"{record},,"]) + "\n"}.items():
            archive.writestr(path, text)
    return wheel


def digest(text: str) -> str:
    raw = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def build_all(directory: Path) -> list[Path]:
    preamble = dedent(PREAMBLE)
    wheels = [
        write_wheel(
            directory,
            f"prufed-{name}",
            {module: (PACKAGES / f"{module}.py").read_text() for module in modules},
        )
        for name, modules in GOOD.items()
    ]
    sources = {name: source for name, (source, _) in BROKEN.items()} | USABLE
    for name, source in sources.items():
        module = name.replace("-", "_")
        wheels.append(write_wheel(directory, f"prufed-{name}", {module: preamble + dedent(source)}))
    return wheels


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment's interpreter that sees prufed and, besides, every package above."""
    directory = tmp_path_factory.mktemp("third-party")
    pip_is_visible = importlib.util.find_spec("pip") is not None
    builder = venv.EnvBuilder(system_site_packages=True, with_pip=not pip_is_visible)
    builder.create(directory / "venv")
    interpreter = directory / "venv" / "bin" / "python"
    paths = {"base": str(directory / "venv"), "platbase": str(directory / "venv")}
    site = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    outer = sysconfig.get_path("purelib")
    (site / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
    install = [interpreter, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*install, *build_all(directory)], check=True, env=environment)
    return interpreter


def prufed(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from prufed_cli.main import main; sys.exit(main())"
    return subprocess.run(
        [python, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def listed(python: Path) -> subprocess.CompletedProcess[str]:
    return prufed(python, "plugins", "--json")


@pytest.fixture(scope="module")
def document(listed: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert listed.returncode == 0, listed.stderr
    found = json.loads(listed.stdout)
    assert found["schema"] == 1
    return found


def methods(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method["kind"], method["name"]): method for method in document["methods"]}


def test_good_packages_are_listed_next_to_the_built_ins(document: dict[str, Any]) -> None:
    found = methods(document)
    assert found["pruner", "random-mask"]["distribution"] == "prufed-random-mask"
    assert found["aggregator", "plain-mean"]["status"] == "ok"
    assert found["sampler", "uniform"]["builtin"]


def test_every_broken_package_costs_only_itself(document: dict[str, Any]) -> None:
    from prufed_plugins.discover import catalog

    own = {key for key, entry in catalog().entries.items() if entry.builtin}
    added = {
        ("pruner", "random-mask"),
        ("aggregator", "plain-mean"),
        ("sampler", "prufed-taken-name:uniform"),
        ("sampler", "noisy"),
        ("sampler", "needy"),
        ("sampler", "lost"),
    }
    assert set(methods(document)) == own | added
    skipped = {failure["plugin"] for failure in document["failures"] if failure["skipped"]}
    assert skipped == {f"prufed-{name}" for name in BROKEN}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_says_why_in_one_line(
    name: str, document: dict[str, Any], listed: subprocess.CompletedProcess[str]
) -> None:
    plugin = f"prufed-{name}"
    [failure] = [failure for failure in document["failures"] if failure["plugin"] == plugin]
    assert failure["reason"].startswith(BROKEN[name][1])
    assert "\n" not in failure["reason"]
    lines = [line for line in listed.stderr.splitlines() if f"plugin {plugin} of" in line]
    assert lines == [f"warning: plugin {plugin} of {plugin} skipped: {failure['reason']}"]


def test_a_taken_name_is_reachable_with_its_distribution(
    python: Path, document: dict[str, Any]
) -> None:
    [failure] = [one for one in document["failures"] if one["plugin"] == "prufed-taken-name"]
    assert not failure["skipped"]
    assert "use prufed-taken-name:uniform" in failure["reason"]
    shown = prufed(python, "plugins", "show", "prufed_taken_name:uniform", "--json")
    [method] = json.loads(shown.stdout)["methods"]
    assert method["target"] == "prufed_plugins.samplers.all:AllSampler"
    shown = prufed(python, "plugins", "show", "sampler:uniform", "--json")
    [method] = json.loads(shown.stdout)["methods"]
    assert method["builtin"]


def test_what_a_plugin_prints_stays_off_stdout(listed: subprocess.CompletedProcess[str]) -> None:
    assert "hello from" not in listed.stdout
    assert "hello from a hook" in listed.stderr


def test_the_table_names_methods_and_failures(python: Path) -> None:
    result = prufed(python, "plugins")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert any("random-mask" in line and "prufed-random-mask 1.0" in line for line in lines)
    assert any("prufed-other-major" in line and "plugin API 2.0" in line for line in lines)


def test_missing_requirements_are_named_with_a_command(
    python: Path, document: dict[str, Any]
) -> None:
    status = methods(document)["sampler", "needy"]["status"]
    assert status == "needs prufed-absent-one, prufed-absent-two"
    assert build_error(python, "needy") == [
        "sampler needy needs prufed-absent-one, prufed-absent-two, not installed",
        "pip install prufed-absent-one prufed-absent-two",
    ]


def test_a_target_that_cannot_be_imported_is_an_error_of_the_method(python: Path) -> None:
    message, hint = build_error(python, "lost")
    assert message.startswith("sampler lost cannot be imported from lost_target:Nothing: ")
    assert hint == "reinstall it: pip install --force-reinstall prufed-lost-target"


def build_error(python: Path, name: str) -> list[str]:
    code = (
        "import sys\n"
        "from prufed_plugins.discover import MethodError, build\n"
        "try: build('sampler', sys.argv[1])\n"
        "except MethodError as error: print(error.message, error.hint, sep='\\n')\n"
    )
    result = subprocess.run([python, "-c", code, name], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_all_third_parties_can_be_disabled(python: Path) -> None:
    result = prufed(python, "plugins", "--json", PRUFED_DISABLE_PLUGINS="*")
    found = json.loads(result.stdout)
    assert {method["distribution"] for method in found["methods"]} == {"prufed"}
    assert found["failures"] == []
    assert len(found["disabled"]) == len(GOOD) + len(BROKEN) + len(USABLE)
    assert result.stderr == ""


def test_one_plugin_can_be_disabled_and_never_a_built_in(python: Path) -> None:
    disable = "Prufed_Random.Mask, builtin,prufed,prufed-import-error"
    found = json.loads(prufed(python, "plugins", "--json", PRUFED_DISABLE_PLUGINS=disable).stdout)
    names = methods(found)
    assert ("pruner", "random-mask") not in names
    assert ("aggregator", "plain-mean") in names
    assert ("sampler", "uniform") in names
    assert {one["plugin"] for one in found["disabled"]} == {
        "prufed-random-mask",
        "prufed-import-error",
    }


def test_good_packages_pass_the_conformance_kit(python: Path) -> None:
    names = ("pruner:random-mask", "aggregator:plain-mean", "noisy")
    result = prufed(python, "plugins", "check", *names, "--json")
    assert result.returncode == 0, result.stdout
    checked = json.loads(result.stdout)["methods"]
    assert [method["name"] for method in checked] == ["random-mask", "plain-mean", "noisy"]
    assert all(len(method["checks"]) >= 8 for method in checked)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=32,
    )
    directory = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(directory)
    return directory


def test_a_good_pruner_prunes_like_a_built_in(
    python: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    home = {"PRUFED_HOME": str(tmp_path)}
    request = ("--base", str(tiny_model), "--method", "random_mask", "--sparsity", "0.5")
    made = prufed(python, "prune", *request, "--set", "seed=3", **home)
    assert made.returncode == 0, made.stderr
    reference = made.stdout.splitlines()[-1]
    shown = json.loads(prufed(python, "show", reference, "--json", **home).stdout)
    recipe = shown["manifest"]["recipe"]
    assert recipe["plugin"] == "random-mask"
    assert recipe["plugin_version"].startswith("prufed-random-mask ")
    assert recipe["params"] == {"seed": 3}
    weights = load_file(Path(shown["path"]) / "model.safetensors")
    query = weights["model.layers.1.self_attn.q_proj.weight"]
    assert int((query == 0).sum()) == query.numel() // 2


def test_a_method_that_cannot_be_made_fails_its_check(python: Path) -> None:
    result = prufed(python, "plugins", "check", "lost", "--json")
    assert result.returncode == 1
    [method] = json.loads(result.stdout)["methods"]
    assert [check["name"] for check in method["checks"]] == ["is_constructed"]
    assert not method["passed"]


def test_checking_everything_counts_what_could_not_be_loaded(python: Path) -> None:
    """Every built-in method keeps its contracts, or says why not."""
    result = prufed(python, "plugins", "check", "--all", "--json")
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert len(found["left_out"]) == len(BROKEN)
    verdicts = {
        method["name"]: method["skipped"] or method["passed"]
        for method in found["methods"]
        if method["distribution"] != "prufed"
    }
    assert verdicts == {
        "random-mask": True,
        "plain-mean": True,
        "prufed-taken-name:uniform": True,
        "noisy": True,
        "needy": "needs prufed-absent-one, prufed-absent-two, not installed",
        "lost": False,
    }
    built_in = [method for method in found["methods"] if method["distribution"] == "prufed"]
    assert [(one["kind"], one["name"]) for one in built_in] == [
        (entry.kind, entry.name) for entry in catalog().entries.values() if entry.builtin
    ]
    assert [one["name"] for one in built_in if not one["passed"]] == []
    # which merges sub-models that the kit does not have
    assert [one["name"] for one in built_in if one["skipped"]] == ["fedspallm"]
    [explicit] = [one for one in built_in if one["name"] == "explicit"]
    assert explicit["settings"] == {"layers": [0, 2]}


def test_help_does_not_load_plugins(python: Path) -> None:
    result = prufed(python, "--help")
    assert result.returncode == 0
    assert result.stderr == ""
