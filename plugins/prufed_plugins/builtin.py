"""The built-in methods, announced through the same hooks as anybody's."""

from __future__ import annotations

from collections.abc import Iterator

from prufed_plugins import params
from prufed_plugins.api import Method, hookimpl

PRUFED_API = (1, 0)


@hookimpl
def prufed_pruners() -> Iterator[Method]:
    """Yield the built-in pruners."""
    yield Method(
        name="magnitude",
        target="prufed_plugins.pruners.magnitude:Magnitude",
        params=params.MagnitudeParams,
        summary="remove the smallest weights; needs no calibration unless layer_ratio is owl",
        paper="Han et al. 2015, https://arxiv.org/abs/1506.02626",
    )
    yield Method(
        name="wanda",
        target="prufed_plugins.pruners.wanda:Wanda",
        params=params.WandaParams,
        summary="remove the smallest |weight| x input norm of every row; what stays is unchanged",
        paper="Sun et al. 2023, https://arxiv.org/abs/2306.11695",
    )
    yield Method(
        name="sparsegpt",
        target="prufed_plugins.pruners.sparsegpt:SparseGPT",
        params=params.SparseGPTParams,
        summary="remove what a second-order model says costs least, and adjust what stays",
        paper="Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774",
    )
    yield from _layer_pruners()


def _layer_pruners() -> Iterator[Method]:
    sajjad = "Sajjad et al. 2020, https://arxiv.org/abs/2004.03844"
    for name, target, summary in (
        ("top", "top:Top", "drop the last layers"),
        ("bottom", "bottom:Bottom", "drop the first layers"),
        (
            "odd-alternate",
            "odd_alternate:OddAlternate",
            "drop every other layer from the top, those of odd number",
        ),
        (
            "even-alternate",
            "even_alternate:EvenAlternate",
            "drop every other layer from the top, those of even number",
        ),
        (
            "top-alternate",
            "even_alternate:EvenAlternate",
            "alias of even-alternate, by the name on the PruFed poster",
        ),
        ("symmetric", "symmetric:Symmetric", "drop the middle layers"),
    ):
        yield Method(
            name=name,
            target=f"prufed_plugins.pruners.{target}",
            params=params.LayerDropParams,
            summary=summary,
            paper=sajjad,
        )
    yield from _scoring_layer_pruners(sajjad)
    yield Method(
        name="explicit",
        target="prufed_plugins.pruners.explicit:Explicit",
        params=params.ExplicitParams,
        summary="keep, or drop, the layers of a list",
    )


def _scoring_layer_pruners(sajjad: str) -> Iterator[Method]:
    yield Method(
        name="parameter",
        target="prufed_plugins.pruners.parameter:Parameter",
        params=params.ParameterParams,
        summary="drop the layers whose weights have the lowest norm, variance or movement",
        paper=sajjad,
    )
    yield Method(
        name="magnitude-layers",
        target="prufed_plugins.pruners.magnitude_layers:MagnitudeLayers",
        params=params.LayerDropParams,
        summary="drop the layers of the smallest mean |weight|",
        paper='Bhansali et al., "PruFed: Federated Fine-Tuning of Pruned LLMs"',
    )
    yield Method(
        name="contribution",
        target="prufed_plugins.pruners.contribution:Contribution",
        params=params.ContributionParams,
        summary="drop the layers that change their input least, by the cosine over all tokens",
        paper="Men et al. 2024 (ShortGPT, Block Influence), https://arxiv.org/abs/2403.03853",
    )
    yield Method(
        name="angular",
        target="prufed_plugins.pruners.angular:Angular",
        params=params.LayerDropParams,
        summary="drop the run of layers that turns the last token's state least",
        paper="Gromov et al. 2024, https://arxiv.org/abs/2403.17887",
    )


@hookimpl
def prufed_aggregators() -> Iterator[Method]:
    """Yield the built-in aggregators."""
    yield Method(
        name="fedavg",
        target="prufed_plugins.aggregators.fedavg:FedAvg",
        params=params.FedAvgParams,
        summary="mean by samples; what a client lacks counts as zero",
        paper="McMahan et al. 2017, https://arxiv.org/abs/1602.05629",
    )
    yield Method(
        name="heteagg",
        target="prufed_plugins.aggregators.heteagg:HeteAgg",
        params=params.HeteAggParams,
        summary="every entry is the mean over the clients that have it",
        paper="Bhansali et al. 2024 (LEGO, Algorithm 2), https://arxiv.org/abs/2410.18287",
    )
    yield Method(
        name="heteagg-layer",
        target="prufed_plugins.aggregators.heteagg_layer:HeteAggLayer",
        params=params.HeteAggLayerParams,
        summary="every layer is the mean over the clients that have it",
        paper='Bhansali et al., "PruFed: Federated Fine-Tuning of Pruned LLMs"',
    )


@hookimpl
def prufed_tuners() -> Iterator[Method]:
    """Yield the built-in tuners."""
    yield Method(
        name="lora",
        target="prufed_plugins.tuners.lora:LoraTuner",
        params=params.LoraParams,
        summary="AdamW on the adapter with linear decay, masks held exactly",
        paper="Hu et al. 2021, https://arxiv.org/abs/2106.09685",
    )


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
        paper="Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022",
    )
    yield Method(
        name="shards",
        target="prufed_plugins.partitioners.shards:ShardsPartitioner",
        params=params.ShardsParams,
        summary="a few contiguous shards of the category-sorted rows per client",
        paper="McMahan et al. 2017, https://arxiv.org/abs/1602.05629",
    )
