"""The clients of a run: which sub-model each has, its adapter, and its masks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.models.adapters import AdapterSpec, adapter_spec, client_masks
from prufed_cli.models.layer_names import layer_number, to_global, to_local
from prufed_plugins.api import ClientInfo, GlobalState
from prufed_plugins.write_back import ranks_of, write_back
from prufed_registry.errors import NotFound

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_cli.config.models import AdapterConfig
    from prufed_cli.federation.plan import ClientPlan
    from prufed_registry import Artifact, Registry


@dataclass(frozen=True)
class Client:
    """One client, ready to train.

    Attributes:
        plan: what the configuration says about it.
        base: the artifact of its sub-model.
        kept_layers: global index of each of its layers.
        spec: its adapter.
        sparsity: share of the full model's decoder entries it lacks, as counted.
    """

    plan: ClientPlan
    base: Artifact
    kept_layers: tuple[int, ...]
    spec: AdapterSpec
    sparsity: float

    @property
    def name(self) -> str:
        """The client's name."""
        return self.plan.name

    @property
    def info(self) -> ClientInfo:
        """What a sampler may know."""
        return ClientInfo(
            self.name, len(self.plan.rows), round(self.sparsity, 4), len(self.kept_layers)
        )

    def at_rank(self, rank: int) -> Client:
        """Return the client with the first ``rank`` ranks of its adapter, at the same scaling."""
        if rank == self.spec.r:
            return self
        alpha = self.spec.alpha * rank / self.spec.r
        return replace(self, spec=replace(self.spec, r=rank, alpha=alpha))

    def masks(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks of its factors by global name, for ``tensors`` by global name."""
        from prufed_cli.models.base import base_masks, load_model

        present = {
            name: ranks_of(name, tensor, range(self.spec.r))
            for name, tensor in tensors.items()
            if self.has(name)
        }
        if self.spec.factor_mask != "structured":
            return client_masks(self.spec, present)
        return client_masks(
            self.spec,
            present,
            model=load_model(self.base, device="cpu"),
            base_masks=base_masks(self.base),
        )

    def has(self, name: str) -> bool:
        """Return whether the client has the layer a global tensor name belongs to."""
        layer = layer_number(name)
        return layer is None or layer in self.kept_layers

    def start(
        self,
        state: GlobalState,
        masks: Mapping[str, Tensor],
        own: Mapping[str, Tensor] | None,
        share: float,
        personal: Collection[str] = (),
        window: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Return what the global adapter is for this client: global names, its own scale."""
        return write_back(
            state,
            masks=masks,
            kept_layers=self.kept_layers,
            scaling=self.spec.scaling,
            rank=self.spec.r,
            own=own,
            share=share,
            personal=personal,
            window=window,
        )

    def residual(self, state: GlobalState) -> dict[str, Tensor]:
        """Return what is added to this client's base: its layers' part, in its own scale."""
        factor = math.sqrt(state.scaling / self.spec.scaling)
        return {
            name: tensor if factor == 1.0 else tensor * factor
            for name, tensor in state.residual.items()
            if self.has(name)
        }

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by the sub-model's own layer numbers."""
        renamed = {to_local(name, self.kept_layers): tensor for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in renamed.items() if name is not None}

    def globally(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by the full model's layer numbers."""
        return {to_global(name, self.kept_layers): tensor for name, tensor in tensors.items()}


def make_client(
    plan: ClientPlan, base: Artifact, full: Artifact, layers: int, seed: int, registry: Registry
) -> Client:
    """Return a client on its sub-model.

    Raises:
        PrufedError: the sub-model was not made from the federation's base.
    """
    if not descends_from(base, full, registry):
        raise PrufedError(
            f"client {plan.name}: {base.ref} was not made from {full.ref}",
            f"`prufed lineage {base.ref}` shows what it was made from",
            USAGE,
        )
    details = base.manifest.details
    kept = tuple(details.get("kept_layers") or range(layers))
    entries = float(details["sparsity"]) if details.get("result") == "masked" else 0.0
    wanted = plan.submodel.sparsity
    return Client(
        plan=plan,
        base=base,
        kept_layers=kept,
        spec=make_spec(
            plan.adapter,
            seed,
            sparsity=entries if wanted is None else wanted,
            depth_pruned=len(kept) < layers and entries == 0,
        ),
        sparsity=1 - (1 - entries) * len(kept) / layers,
    )


def make_spec(
    config: AdapterConfig, seed: int, *, sparsity: float, depth_pruned: bool
) -> AdapterSpec:
    """Return the adapter of one client: its preset, with what the configuration overrides."""
    overrides = {
        key: value
        for key in ("factor_mask", "product_mask", "rescale")
        if (value := getattr(config, key)) is not None
    }
    return adapter_spec(
        config.preset,
        depth_pruned=depth_pruned,
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=tuple(config.target_modules),
        seed=seed,
        sparsity=sparsity,
        **({} if depth_pruned else overrides),
    )


def descends_from(artifact: Artifact, ancestor: Artifact, registry: Registry) -> bool:
    """Return whether ``ancestor`` is ``artifact`` itself or among what it was made from."""
    if artifact.digest == ancestor.digest:
        return True
    for parent in artifact.manifest.parents:
        if parent.digest == ancestor.digest:
            return True
        try:
            if descends_from(registry.resolve(parent.ref), ancestor, registry):
                return True
        except NotFound:
            continue
    return False
