"""The local engine: every client is trained here, in this process, one after the other.

Clients that share a sub-model are trained one after the other on one loaded base; bases stay in
memory from round to round while they fit.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from prufed_cli.errors import PrufedError
from prufed_cli.models.adapters import AttachedAdapter, attach
from prufed_cli.models.base import (
    base_masks,
    choose_device,
    context_length,
    load_model,
    load_tokenizer,
)
from prufed_cli.models.prompts import tokenize_rows
from prufed_cli.out_of_memory import is_out_of_memory
from prufed_cli.progress import SILENT, Reporter
from prufed_plugins.api import TrainingData, Tuner, TuneResult, TuneStep
from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prufed_cli.config.models import TunerConfig
    from prufed_cli.federation.clients import Client
    from prufed_registry import Artifact

MEMORY_SHARE: Final = 0.5
"""How much of the device's memory resident bases may take."""


@dataclass(frozen=True)
class Job:
    """Train one client.

    Attributes:
        client: who.
        tensors: where its adapter starts, by global name, in its own scale.
        masks: masks of its factors by global name.
        residual: what is added to its base and not trained, likewise; empty for most methods.
        seed: of its batches and dropout.
        round_index: 0 for the first.
    """

    client: Client
    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    residual: Mapping[str, Tensor]
    seed: int
    round_index: int


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a result, or the reason why there is none.

    Attributes:
        job: the job.
        result: tensors by local name; None if the client failed.
        reason: why it failed.
        seconds: wall time.
    """

    job: Job
    result: TuneResult | None
    reason: str | None
    seconds: float


@dataclass(frozen=True)
class Resident:
    """A loaded base with what its clients need beside it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    masks: Mapping[str, Tensor]


class ResidentBases:
    """Loaded bases by digest; the least recently used goes when memory runs short."""

    def __init__(self, device: str, dtype: str) -> None:
        self._device = device
        self._dtype = dtype
        self._limit = MEMORY_SHARE * _memory(choose_device(device))
        self._loaded: OrderedDict[str, Resident] = OrderedDict()

    def get(self, base: Artifact) -> Resident:
        """Return a base, loading it if it is not here."""
        resident = self._loaded.pop(base.digest, None)
        if resident is None:
            self._make_room(sum(file.size for file in base.manifest.files.values()))
            resident = Resident(
                model=load_model(base, device=self._device, dtype=self._dtype),
                tokenizer=load_tokenizer(base),
                masks=base_masks(base) or {},
            )
        self._loaded[base.digest] = resident
        return resident

    def _make_room(self, size: int) -> None:
        held = sum(_bytes(resident.model) for resident in self._loaded.values())
        while self._loaded and held + 2 * size > self._limit:
            _, dropped = self._loaded.popitem(last=False)
            held -= _bytes(dropped.model)


class LocalEngine:
    """Runs tuners for clients in this process."""

    def __init__(
        self, device: str = "auto", dtype: str = "auto", reporter: Reporter = SILENT
    ) -> None:
        self.bases = ResidentBases(device, dtype)
        self._reporter = reporter
        self._data: dict[str, TrainingData] = {}

    def tune(
        self, jobs: Sequence[Job], on_step: Callable[[Job, TuneStep], None]
    ) -> Iterator[Outcome]:
        """Yield an outcome for every job, grouped by sub-model so that each is loaded once."""
        for job in sorted(jobs, key=lambda job: job.client.base.digest):
            started = time.monotonic()
            result, reason = None, None
            try:
                result = self._tune(job, on_step)
            except (MethodError, PrufedError) as error:
                reason = error.message
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = "out of memory; lower micro_batch_size or cutoff"
            yield Outcome(job, result, reason, time.monotonic() - started)

    def gradient(
        self, job: Job, *, batch_size: int, batches: int | None
    ) -> tuple[dict[str, Tensor], float]:
        """Return the mean gradient of a client's factors by local name, and its variance.

        Raises:
            MethodError: the client has too few rows, or a gradient is not finite.
        """
        from prufed_plugins.tuners.gradients import mean_gradient

        resident = self.bases.get(job.client.base)
        data = self._training_data(job.client, resident)
        with self._attached(job, resident) as adapted:
            return mean_gradient(
                adapted,
                data,
                batch_size=batch_size,
                batches=batches,
                seed=job.seed,
                pad_token_id=_pad(resident.tokenizer),
            )

    def _tune(self, job: Job, on_step: Callable[[Job, TuneStep], None]) -> TuneResult:
        client = job.client
        resident = self.bases.get(client.base)
        data = self._training_data(client, resident)
        with self._attached(job, resident) as adapted:
            return make_tuner(client.plan.tuner).tune(
                adapted,
                data,
                job.seed,
                lambda step: on_step(job, step),
                round_index=job.round_index,
                pad_token_id=_pad(resident.tokenizer),
            )

    def _attached(self, job: Job, resident: Resident) -> AttachedAdapter:
        client = job.client
        return attach(
            resident.model,
            client.spec,
            client.local(job.tensors),
            client.local(job.masks),
            resident.masks,
            client.local(job.residual),
        )

    def _training_data(self, client: Client, resident: Resident) -> TrainingData:
        if client.name not in self._data:
            tuner = client.plan.tuner
            self._data[client.name] = tokenize_rows(
                client.plan.rows,
                resident.tokenizer,
                template=tuner.template,
                cutoff=self._cutoff(client, resident.model),
                train_on=tuner.train_on,
                reporter=self._reporter,
            )
        return self._data[client.name]

    def _cutoff(self, client: Client, model: PreTrainedModel) -> int:
        """Return the client's cutoff, or what the model's positions reach if that is less."""
        wanted, limit = client.plan.tuner.cutoff, context_length(model)
        if limit is not None and wanted > limit:
            self._reporter.warn(
                f"client {client.name}: cutoff {wanted} is lowered to the model's {limit} positions"
            )
            return limit
        return wanted


def make_tuner(config: TunerConfig) -> Tuner:
    """Return a client's tuner, with its settings."""
    from prufed_plugins.discover import build

    tuner: Tuner = build("tuner", config.name, config.settings)
    return tuner


def _pad(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _memory(device: torch.device) -> int:
    """Return the bytes of memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
