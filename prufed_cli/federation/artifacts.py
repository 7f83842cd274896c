"""What a run publishes: client adapters and global adapters, and how they are read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from prufed_cli.environment import versions
from prufed_cli.model_card import licence, render_card
from prufed_cli.models.adapter_files import WEIGHTS_FILE, load_adapter, save_adapter
from prufed_cli.models.adapters import AdapterSpec, rank_of
from prufed_cli.models.base import base_masks
from prufed_cli.models.layer_names import to_global
from prufed_plugins.api import Update
from prufed_plugins.mask_files import MaskFile, digest, load_masks, save_masks
from prufed_plugins.names import split_factor
from prufed_plugins.tensor_files import Entries, TensorFile
from prufed_registry import Parent

if TYPE_CHECKING:
    from prufed_cli.federation.clients import Client
    from prufed_registry import Artifact, Registry

FACTOR_MASKS_FILE: Final = "prufed-factor-masks.safetensors"
"""Masks of A and B by local name, beside the adapter's weights."""

_PREFIX: Final = "base_model.model."


class GlobalNames(Mapping[str, Tensor]):
    """A client adapter's tensors or masks by the full model's names, read on each access."""

    def __init__(
        self,
        file: TensorFile | MaskFile,
        kept_layers: tuple[int, ...],
        ranks: slice | None = None,
    ) -> None:
        """Take the names from the file.

        Args:
            file: by local name, as PEFT writes it.
            kept_layers: global indices of the client's layers.
            ranks: which ranks to read; all if None.
        """
        self._file = file
        self._keys = {to_global(key.removeprefix(_PREFIX), kept_layers): key for key in file}
        self._ranks = ranks

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._file[self._keys[name]]
        return tensor if self._ranks is None else _of_ranks(name, tensor, self._ranks)

    def entries(self, name: str) -> Entries | None:
        """Return one of them to be read piece by piece; None where it can only be had whole."""
        return self._file.entries(self._keys[name]) if self._ranks is None else None

    def __contains__(self, name: object) -> bool:
        return name in self._keys  # Mapping's own would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class ProductMasks(Mapping[str, Tensor]):
    """The masks (d, k) of a client's base by the full model's names, unpacked on each access."""

    def __init__(
        self, masks: Mapping[str, Tensor], kept_layers: tuple[int, ...], *, transposed: bool
    ) -> None:
        self._masks = masks
        self._keys = {to_global(key, kept_layers): key for key in masks}
        self._transposed = transposed

    def __getitem__(self, name: str) -> Tensor:
        mask = self._masks[self._keys[name]]
        return mask.mT if self._transposed else mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def publish_client(
    registry: Registry,
    client: Client,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    residual: Mapping[str, Tensor],
    *,
    name: str,
    parents: list[Parent],
    recipe: dict[str, Any],
    facts: dict[str, Any],
    metrics: dict[str, float],
    transposed: bool,
) -> Artifact:
    """Publish a client's adapter.

    Args:
        registry: where.
        client: whose.
        tensors: by local name, in the client's scale; 0 outside the masks.
        masks: of its factors, by local name.
        residual: what is added to its base beside them, likewise; see :func:`widened`.
        name: of the artifact.
        parents: the sub-model first.
        recipe: what made it; equal recipes and parents are the same work.
        facts: round, stage and the like, for the manifest.
        metrics: numbers that differ from run to run.
        transposed: whether the target layers keep their weights as (k, d).
    """
    details = {
        "adapter": client.spec.to_dict() | {"scaling": client.spec.scaling},
        "kept_layers": list(client.kept_layers),
        "samples": len(client.plan.rows),
        "data_digest": client.plan.data_digest,
        "masks_digest": digest(masks) if masks else None,
        **_residual_rank(residual),
        **facts,
    }
    spec, stored = widened(client.spec, tensors, residual)
    with registry.stage() as staging:
        save_adapter(staging.path, stored, spec, client.base.ref, fan_in_fan_out=transposed)
        if masks:
            save_masks(staging.path / FACTOR_MASKS_FILE, masks)
        (staging.path / "README.md").write_text(client_card(client), encoding="utf-8")
        return staging.publish(
            name=name,
            kind="client-adapter",
            parents=parents,
            recipe=recipe,
            environment=versions(),
            metrics=metrics,
            details=details,
        )


def publish_global(
    registry: Registry,
    tensors: Mapping[str, Tensor],
    residual: Mapping[str, Tensor],
    spec: AdapterSpec,
    full: Artifact,
    *,
    name: str,
    parents: list[Parent],
    recipe: dict[str, Any],
    facts: dict[str, Any],
    transposed: bool,
) -> Artifact:
    """Publish a global adapter for the full model."""
    wide, stored = widened(spec, tensors, residual)
    with registry.stage() as staging:
        save_adapter(staging.path, stored, wide, full.ref, fan_in_fan_out=transposed)
        (staging.path / "README.md").write_text(global_card(full, wide), encoding="utf-8")
        return staging.publish(
            name=name,
            kind="global-adapter",
            parents=parents,
            recipe=recipe,
            environment=versions(),
            metrics={},
            details={
                "adapter": spec.to_dict() | {"scaling": spec.scaling},
                **_residual_rank(residual),
                **facts,
            },
        )


def widened(
    spec: AdapterSpec, tensors: Mapping[str, Tensor], residual: Mapping[str, Tensor]
) -> tuple[AdapterSpec, Mapping[str, Tensor]]:
    """Return an adapter of r + R ranks that computes what the adapter and the residual do.

    PEFT opens it on the base as it is: the first r ranks are the adapter's, the others were never
    trained.
    """
    extra = rank_of(residual)
    if not extra:
        return spec, tensors
    wide = replace(spec, r=spec.r + extra)
    wide = replace(wide, alpha=wide.alpha * spec.scaling / wide.scaling)  # the scaling stays
    return wide, {
        name: torch.cat([tensor, residual[name]], dim=_rank_axis(name))
        for name, tensor in tensors.items()
    }


def _residual_rank(residual: Mapping[str, Tensor]) -> dict[str, int]:
    return {"residual_rank": rank_of(residual)} if residual else {}


def _rank_axis(name: str) -> int:
    return 0 if split_factor(name)[1] == "A" else 1


def _of_ranks(name: str, tensor: Tensor, ranks: slice) -> Tensor:
    return (tensor[ranks] if _rank_axis(name) == 0 else tensor[:, ranks]).contiguous()


def read_update(client: Client, artifact: Artifact, base_round: int, *, transposed: bool) -> Update:
    """Return what the server merges for one client; its tensors and base masks stay on disk.

    Args:
        client: whose.
        artifact: the adapter that it trained.
        base_round: the round of the global adapter that it started from.
        transposed: whether the base keeps its weights as (inputs, outputs), as GPT-2 does.
    """
    products = base_masks(client.base) if client.spec.product_mask else None
    masks = artifact.path / FACTOR_MASKS_FILE
    return Update(
        client=client.name,
        tensors=GlobalNames(
            TensorFile(artifact.path / WEIGHTS_FILE),
            client.kept_layers,
            slice(client.spec.r) if "residual_rank" in artifact.manifest.details else None,
        ),
        masks=GlobalNames(MaskFile(masks), client.kept_layers) if masks.is_file() else None,
        samples=len(client.plan.rows),
        rank=client.spec.r,
        scaling=client.spec.scaling,
        kept_layers=client.kept_layers,
        base_round=base_round,
        weight=client.plan.weight,
        base_masks=None
        if products is None
        else ProductMasks(products, client.kept_layers, transposed=transposed),
        masks_digest=artifact.manifest.details["masks_digest"] if masks.is_file() else None,
    )


def read_masks(artifact: Artifact) -> dict[str, Tensor]:
    """Return the masks of an adapter's factors by local name; empty where it has none."""
    path = artifact.path / FACTOR_MASKS_FILE
    return load_masks(path) if path.is_file() else {}


def read_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """Return an adapter's tensors by local name, without its residual."""
    return read_parts(artifact)[0]


def read_parts(artifact: Artifact) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an adapter's tensors by local name, and its residual's, which most have not."""
    tensors, facts = load_adapter(artifact.path)
    extra = artifact.manifest.details.get("residual_rank", 0)
    if not extra:
        return tensors, {}
    own = facts.r - int(extra)
    trained, residual = slice(own), slice(own, None)
    return (
        {name: _of_ranks(name, tensor, trained) for name, tensor in tensors.items()},
        {name: _of_ranks(name, tensor, residual) for name, tensor in tensors.items()},
    )


def client_card(client: Client) -> str:
    """Return the model card of a client's adapter."""
    spec = client.spec
    masked = (
        "\n\nIts update is masked by the base's own mask; PEFT applies it unmasked, so merge it "
        "with `prufed export --merge` to keep the base's sparsity."
        if spec.product_mask and client.sparsity > 0
        else ""
    )
    return render_card(
        {"library_name": "peft", "tags": ["lora", "prufed"], **licence(client.base.path)},
        f"# LoRA adapter of client {client.name}\n\n"
        f"Rank {spec.r}, scaling {spec.scaling:g}, preset {spec.preset}, trained on "
        f"{len(client.plan.rows)} rows over `{client.base.ref}` ({client.base.digest}).{masked}",
    )


def global_card(full: Artifact, spec: AdapterSpec) -> str:
    """Return the model card of a global adapter."""
    tags = ["federated-learning", "lora", "prufed"]
    return render_card(
        {"library_name": "peft", "tags": tags, **licence(full.path)},
        "# Global LoRA adapter\n\n"
        f"Rank {spec.r}, scaling {spec.scaling:g}, merged from the adapters of clients with "
        f"sub-models of `{full.ref}` ({full.digest}).",
    )
