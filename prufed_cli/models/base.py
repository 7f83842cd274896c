"""Find a model by reference, path or Hub id, and load it with the adapter it is meant to carry.

A base always becomes an artifact first: a local directory or a Hub snapshot is imported into the
registry once, under its own name, so that everything made from it can name it by digest.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError
from prufed_cli.progress import SILENT, Reporter
from prufed_plugins.api import MASKS_FILE
from prufed_registry import Registry
from prufed_registry.errors import NotFound

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from prufed_registry import Artifact, Parent

EMBEDDED_NAME: Final = "prufed-tiny"
ADAPTER_KINDS: Final = frozenset({"client-adapter", "global-adapter"})
MODEL_KINDS: Final = frozenset({"base", "pruned", "merged"})

SMALL_MODEL: Final = 20_000_000
"""Parameters below which one thread is faster than two."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_NO_DECODER: Final = r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'>.*"


@dataclass(frozen=True)
class Loaded:
    """A model ready to be called.

    Attributes:
        model: in evaluation mode; an adapter is already merged into it.
        tokenizer: the tokenizer of the base.
        artifact: what the reference named.
        base: the model artifact underneath; the same as ``artifact`` unless that is an adapter.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    artifact: Artifact
    base: Artifact


def default_base() -> str:
    """Return what a base defaults to: ``PRUFED_BASE``, or the embedded model."""
    return os.environ.get("PRUFED_BASE") or EMBEDDED_NAME


def find_artifact(
    reference: str | None, registry: Registry, reporter: Reporter = SILENT
) -> Artifact:
    """Return the artifact a reference, a local directory or a Hub id stands for.

    A directory or a Hub id is imported as kind ``base`` unless the same bytes are there already;
    the reporter is told what was, for it stays whatever comes of the command.

    Raises:
        PrufedError: nothing of that name exists here or on the Hub.
    """
    wanted = default_base() if reference is None else reference
    directory = _directory_of(wanted)
    if directory is not None:
        if not directory.is_dir():
            raise PrufedError(f"no directory {wanted}", "give a model directory", NOT_FOUND)
        return import_base(directory, registry, slug(directory.resolve().name), reporter)
    if _HUB_ID.fullmatch(wanted):
        return _from_hub(wanted, registry)
    try:
        return registry.resolve(wanted)
    except NotFound:
        if wanted == EMBEDDED_NAME:
            from prufed_cli.assets import embedded_model

            return import_base(embedded_model(), registry, EMBEDDED_NAME)
        raise


def _directory_of(wanted: str) -> Path | None:
    """Return the directory that a base names; None for a reference or a Hub id."""
    directory = Path(wanted).expanduser()
    is_path = wanted.startswith((".", "/", "~"))
    is_model = (directory / "config.json").is_file() or ("/" in wanted and directory.is_dir())
    return directory if wanted and (is_path or is_model) else None


def find_base(reference: str | None, registry: Registry, reporter: Reporter = SILENT) -> Artifact:
    """Return a model artifact: a base, a sub-model or a merged model.

    Raises:
        PrufedError: the reference names an adapter, a quantized model, or nothing.
    """
    from prufed_cli.models.checkpoint import refuse_quantized

    directory = _directory_of(default_base() if reference is None else reference)
    if directory is not None:
        refuse_quantized(directory, str(directory))  # before it is imported
    artifact = find_artifact(reference, registry, reporter)
    if artifact.kind not in MODEL_KINDS:
        raise PrufedError(
            f"{artifact.ref} is a {artifact.kind}, not a model",
            f"`prufed lineage {artifact.ref}` shows the model it belongs to",
            USAGE,
        )
    refuse_quantized(artifact.path, artifact.ref)
    return artifact


def import_base(
    directory: Path, registry: Registry, name: str, reporter: Reporter = SILENT
) -> Artifact:
    """Take a model directory into the registry, unless the same content is there already."""
    from prufed_cli.packing import refuse_packed
    from prufed_registry.transfer import find_imported

    refuse_packed(directory)
    known = find_imported(registry, directory, "base")
    if known is not None:
        return known
    made = registry.import_directory(directory, name=name, kind="base")
    reporter.note(f"imported {directory} as {made.ref}, which stays in the registry")
    return made


def _from_hub(repository: str, registry: Registry) -> Artifact:
    from prufed_cli.hub import fetch_base

    return fetch_base(repository, registry)


def slug(text: str, longest: int = 64) -> str:
    """Return a valid artifact name made from any text, cut where it is too long."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    name = name[:longest].rstrip("-._") or "model"
    if len(name) == 1 or name == "latest" or re.fullmatch(r"v\d+", name):
        name = f"model-{name}"
    return name


def choose_device(device: str) -> torch.device:
    """Return the device asked for; ``auto`` is CUDA where there is any, else the CPU.

    Raises:
        PrufedError: the device does not exist here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise PrufedError(
            f"no device {device!r}", "use auto, cpu, cuda, cuda:N or mps", USAGE
        ) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise PrufedError(
            "no CUDA device is available", "use --device cpu, or see `prufed doctor`", USAGE
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise PrufedError(f"no CUDA device {chosen.index}", "see `prufed doctor`", USAGE)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise PrufedError("no MPS device is available", "use --device cpu", USAGE)
    if chosen.type not in {"cpu", "cuda", "mps"}:
        raise PrufedError(f"no device {device!r}", "use auto, cpu, cuda, cuda:N or mps", USAGE)
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """Return the dtype to compute in; ``auto`` is float32 on the CPU, else the stored one."""
    import torch

    known = {
        "auto": torch.float32 if device.type == "cpu" else "auto",
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if dtype not in known:
        raise PrufedError(f"no dtype {dtype!r}", "use auto, float32, bfloat16 or float16", USAGE)
    return known[dtype]


def stored_dtype(artifact: Artifact) -> torch.dtype:
    """Return the dtype in which most of a model artifact's weights are stored.

    Raises:
        PrufedError: it has no weights, or none in floating point.
    """
    from prufed_cli.models.checkpoint import find_tensors, refuse_packed_matrices

    tensors = find_tensors(artifact.path, artifact.ref)
    refuse_packed_matrices(tensors, artifact.ref)
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point:
            sizes[tensor.dtype] += tensor.size
    if not sizes:
        raise PrufedError(
            f"{artifact.ref} has no weights in floating point",
            f"`prufed verify {artifact.ref}` checks its files",
        )
    return sizes.most_common(1)[0][0]


def stated_dtype(artifact: Artifact) -> str | None:
    """Return what a model's configuration says its dtype is, without a prefix; None if nothing."""
    import json

    config = json.loads((artifact.path / "config.json").read_text(encoding="utf-8"))
    stated = config.get("dtype") or config.get("torch_dtype")
    return str(stated).removeprefix("torch.") if stated else None


def share_cores(parameters: int) -> None:
    """Give a small model one thread and a larger one as many as torch had, on the CPU.

    The kernels of a small model take microseconds. Threads that wait for one another at the end of
    each cost more than they bring, and ten times as much where another process wants the cores too.
    """
    import torch

    if torch.get_num_threads() != _threads.given:  # chosen since by whoever calls
        _threads.wanted = torch.get_num_threads()
    _give_threads(1 if parameters < SMALL_MODEL else _threads.wanted)


@contextmanager
def threads_restored() -> Iterator[None]:
    """Leave torch with as many threads as it had."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        _give_threads(before)


@dataclass
class _Threads:
    """How many threads the caller wants torch to have, and how many it was given here last."""

    wanted: int = 0
    given: int = 0


_threads: Final = _Threads()


def _give_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
    _threads.given = count


def load_model(
    artifact: Artifact,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model artifact in evaluation mode.

    Raises:
        PrufedError: no such device or dtype, transformers cannot open the directory, or its weights
            are not those its configuration speaks of.
    """
    from prufed_cli.models.checkpoint import (
        find_tensors,
        quantization_of,
        refuse_packed_matrices,
    )

    where = choose_device(device)
    chosen = choose_dtype(dtype, where)
    if not quantization_of(artifact.path):
        refuse_packed_matrices(find_tensors(artifact.path, artifact.ref), artifact.ref)
    quiet_transformers()
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            artifact.path,
            dtype=chosen,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, in one sentence
            output_loading_info=True,
        )
    except opening_errors() as error:
        raise cannot_open(artifact.ref, error) from error
    check_complete(artifact.ref, loading["mismatched_keys"], loading["missing_keys"])
    if where.type == "cpu":
        share_cores(model.num_parameters())
    model.eval().requires_grad_(False)
    loaded: PreTrainedModel = model.to(where)
    return loaded


def cannot_open(ref: str, error: Exception) -> PrufedError:
    """Return the error for a directory that is no causal language model to transformers."""
    hints = {
        "Unrecognized configuration class": "use a decoder such as Llama, Qwen2, Gemma or GPT-2",
        "does not recognize this architecture": "`pip install --upgrade transformers` may help",
        "trust_remote_code": "--trust-remote-code runs the code that comes with it",
    }
    hint = next(
        (hint for words, hint in hints.items() if words in str(error)),
        f"`prufed verify {ref}` checks its files",
    )
    said = re.sub(_NO_DECODER, r"transformers makes none of a \1", first_line(error))
    return PrufedError(f"{ref} cannot be opened as a causal language model: {said}", hint)


def open_configuration(artifact: Artifact, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a model's configuration, with transformers' defaults for what it leaves out.

    Raises:
        PrufedError: transformers cannot make a causal language model of it.
    """
    quiet_transformers()
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            artifact.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except opening_errors() as error:
        raise cannot_open(artifact.ref, error) from error
    return config


def check_complete(
    ref: str,
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    missing: Iterable[str],
) -> None:
    """Refuse weights that transformers would fill up with random numbers.

    Args:
        ref: what to call the model.
        mismatched: name, shape on disk and shape by config.json of each weight that differs.
        missing: names of the weights that are not on disk.

    Raises:
        PrufedError: there are any.
    """
    from prufed_cli.errors import INTEGRITY

    hint = f"compare its config.json with its weights; `prufed show {ref}` lists both"
    for name, stored, wanted in sorted(mismatched):
        raise PrufedError(
            f"{ref}: {name} is stored as {list(stored)}, but config.json makes it {list(wanted)}",
            hint,
            INTEGRITY,
        )
    absent = sorted(missing)
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise PrufedError(
            f"{ref} lacks weights that its config.json speaks of: {absent[0]}{more}",
            hint,
            INTEGRITY,
        )


def load_tokenizer(
    artifact: Artifact, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored with a model artifact."""
    return open_tokenizer(artifact.path, artifact.ref, trust_remote_code=trust_remote_code)


def open_tokenizer(
    directory: Path, name: str, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model directory; ``name`` is what a person knows it by.

    Raises:
        PrufedError: there is none that opens.
    """
    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except opening_errors() as error:
        raise PrufedError(
            f"{name} has no tokenizer that opens: {first_line(error)}",
            "import a directory that holds tokenizer.json",
        ) from error
    return tokenizer


def opening_errors() -> tuple[type[Exception], ...]:
    """Return what transformers raises for a directory that it cannot make anything of."""
    from huggingface_hub.errors import StrictDataclassError

    lookups = (KeyError, TypeError, AttributeError, ImportError, ArithmeticError)
    return (OSError, ValueError, RuntimeError, *lookups, StrictDataclassError)


def base_masks(artifact: Artifact) -> Mapping[str, Tensor] | None:
    """Return the masks of an element-wise pruned base by parameter name; None for any other.

    A mask is unpacked when it is asked for: all of them together take a byte per weight.
    """
    path = artifact.path / MASKS_FILE
    if not path.is_file():
        return None
    from prufed_plugins.mask_files import MaskFile

    return MaskFile(path)


def base_of(adapter: Artifact, registry: Registry) -> Artifact:
    """Return the model an adapter, or a sub-model, was made from, checked by digest.

    PEFT loads silently on a wrong base of the same shape, so the digest is compared first.

    Raises:
        PrufedError: the base is gone, or is not the one it was made from.
    """
    from prufed_cli.errors import INTEGRITY

    for parent in adapter.manifest.parents:
        candidate = _parent(parent, registry)
        if candidate is not None and candidate.kind in MODEL_KINDS:
            if candidate.digest != parent.digest:
                raise PrufedError(
                    f"{adapter.ref} was made from {parent.ref} ({parent.digest[:19]}), "
                    f"but that is now {candidate.digest[:19]}",
                    "`prufed verify` shows what changed",
                    INTEGRITY,
                )
            return candidate
    raise PrufedError(
        f"the base of {adapter.ref} is not in the registry",
        f"`prufed lineage {adapter.ref}` names it",
        NOT_FOUND,
    )


def _parent(parent: Parent, registry: Registry) -> Artifact | None:
    """Return a parent by its reference, or by its content: what was pulled is numbered anew."""
    try:
        named = registry.resolve(parent.ref)
    except NotFound:
        named = None
    if named is not None and named.digest == parent.digest:
        return named
    return next((each for each in registry.list() if each.digest == parent.digest), named)


def load_reference(
    reference: str | None,
    registry: Registry,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model, or an adapter merged into its base with the base's mask honoured."""
    artifact = find_artifact(reference, registry)
    base = base_of(artifact, registry) if artifact.kind in ADAPTER_KINDS else artifact
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    model = load_model(base, trust_remote_code=trust_remote_code, **options)
    if base is not artifact:
        merge_adapter(model, artifact, base)
    return Loaded(model, load_tokenizer(base, trust_remote_code=trust_remote_code), artifact, base)


def merge_adapter(model: PreTrainedModel, adapter: Artifact, base: Artifact) -> None:
    """Merge an adapter artifact into a loaded base, in place."""
    from prufed_cli.models.adapters import load_adapter, merge

    tensors, spec = load_adapter(adapter.path)
    masks = base_masks(base) if keeps_masks(adapter) else None
    merge(model, tensors, scaling=spec.scaling, product_masks=masks)


def keeps_masks(adapter: Artifact) -> bool:
    """Return whether merging an adapter leaves what its base's masks leave out at zero."""
    return bool(adapter.manifest.details.get("adapter", {}).get("product_mask"))


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model's positions reach; None where its configuration says none."""
    return positions_of(model.config.get_text_config().to_dict())


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the positions of a configuration reach; None where it says none."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        limit = config.get(key)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def quiet_transformers() -> None:
    """Keep transformers' and datasets' own bars and advice off the terminal."""
    import warnings

    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch\.utils)\..*")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or two if it ends with a colon; no full stop."""
    said = f"there is no {error}" if isinstance(error, KeyError) else str(error).strip()
    lines = (said or type(error).__name__).splitlines()
    told = lines[:2] if lines[0].endswith(":") else lines[:1]
    return " ".join(line.strip() for line in told).rstrip(".")
