"""The end of a run: publish the final global adapter as every client has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_cli.federation.artifacts import publish_client
from prufed_cli.federation.standing import masks_of, start_of
from prufed_cli.federation.tuning import client_parents, client_recipe
from prufed_registry import fingerprint

if TYPE_CHECKING:
    from prufed_cli.federation.clients import Client
    from prufed_cli.federation.state import Federation


def write_back_all(federation: Federation) -> None:
    """Publish and journal every client's adapter that is not yet."""
    with federation.reporter.task("write back", total=len(federation.clients)) as task:
        for name in federation.clients:
            if federation.run.find("written_back", client=name) is None:
                _write_back(federation, federation.client_at(federation.plan.config.rounds, name))
            task.advance()


def _write_back(federation: Federation, client: Client) -> None:
    config = federation.plan.config
    masks = masks_of(federation, client)
    tensors = start_of(federation, config.rounds, client, masks)
    recipe = {
        **client_recipe(federation, config.rounds, client),
        "stage": "written-back",
        "share": config.write_back.share,
    }
    parents = client_parents(federation, config.rounds, client)
    key = fingerprint("client-adapter", parents, recipe)
    artifact = federation.registry.find(key, kind="client-adapter") or publish_client(
        federation.registry,
        client,
        client.local(tensors),
        client.local(masks),
        client.local(client.residual(federation.state)),
        name=f"{config.name}.{client.name}",
        parents=parents,
        recipe=recipe,
        facts={"round": config.rounds - 1, "stage": "written-back"},
        metrics={},
        transposed=federation.transposed,
    )
    federation.run.record(
        "written_back", client=client.name, ref=artifact.ref, digest=artifact.digest
    )
