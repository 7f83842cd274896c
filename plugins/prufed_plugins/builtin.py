"""The built-in methods, announced through the same hooks as anybody's."""

from __future__ import annotations

from collections.abc import Iterator

from prufed_plugins import params
from prufed_plugins.api import Method, hookimpl

PRUFED_API = (1, 0)


@hookimpl
def prufed_pruners() -> Iterator[Method]:
    """Yield the built-in pruners."""
    yield from ()


@hookimpl
def prufed_aggregators() -> Iterator[Method]:
    """Yield the built-in aggregators."""
    yield from ()


@hookimpl
def prufed_tuners() -> Iterator[Method]:
    """Yield the built-in tuners."""
    yield from ()


@hookimpl
def prufed_samplers() -> Iterator[Method]:
    """Yield the built-in samplers."""
    yield Method(
        name="all",
        target="prufed_plugins.samplers.all:AllSampler",
        params=params.NoParams,
        summary="every client, every round",
    )
    yield Method(
        name="uniform",
        target="prufed_plugins.samplers.uniform:UniformSampler",
        params=params.UniformParams,
        summary="a random share of the clients each round",
        paper="McMahan et al. 2017, https://arxiv.org/abs/1602.05629",
    )
    yield Method(
        name="sequential",
        target="prufed_plugins.samplers.sequential:SequentialSampler",
        params=params.SequentialParams,
        summary="the clients in turn, a share of them each round",
        paper="Bhansali et al. 2024 (LEGO), https://arxiv.org/abs/2410.18287",
    )
    yield Method(
        name="by-sparsity",
        target="prufed_plugins.samplers.by_sparsity:BySparsitySampler",
        params=params.BySparsityParams,
        summary="clients of one sparsity per round, the tiers in turn, or a share of each tier",
        paper="Bhansali et al. 2024 (LEGO, Algorithm 1), https://arxiv.org/abs/2410.18287",
    )
    yield Method(
        name="by-depth",
        target="prufed_plugins.samplers.by_depth:ByDepthSampler",
        params=params.ByDepthParams,
        summary="clients of one depth per round, the tiers in turn, or a share of each tier",
        paper='Bhansali et al., "PruFed: Federated Fine-Tuning of Pruned LLMs"',
    )


@hookimpl
def prufed_partitioners() -> Iterator[Method]:
    """Yield the built-in partitioners."""
    yield Method(
        name="iid",
        target="prufed_plugins.partitioners.iid:IidPartitioner",
        params=params.NoParams,
        summary="random rows, equal numbers",
    )
    yield Method(
        name="stratified-iid",
        target="prufed_plugins.partitioners.stratified_iid:StratifiedIidPartitioner",
        params=params.NoParams,
        summary="random rows, equal numbers of every category",
        paper="Bhansali et al. 2024 (LEGO, section 4.1), https://arxiv.org/abs/2410.18287",
    )
    yield Method(
        name="by-category",
        target="prufed_plugins.partitioners.by_category:ByCategoryPartitioner",
        params=params.NoParams,
        summary="one category per client",
        paper="Bhansali et al. 2024 (LEGO, section 4.2), https://arxiv.org/abs/2410.18287",
    )
    yield Method(
        name="dirichlet",
        target="prufed_plugins.partitioners.dirichlet:DirichletPartitioner",
        params=params.DirichletParams,
        summary="each category spread over the clients by a Dirichlet draw",
        paper="Hsu et al. 2019, https://arxiv.org/abs/1909.06335",
    )
    yield Method(
        name="shards",
        target="prufed_plugins.partitioners.shards:ShardsPartitioner",
        params=params.ShardsParams,
        summary="a few contiguous shards of the category-sorted rows per client",
        paper="McMahan et al. 2017, https://arxiv.org/abs/1602.05629",
    )
