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
    yield Method(
        name="fedspallm",
        target="prufed_plugins.pruners.fedspallm:FedSpaLLM",
        params=params.FedSpaLLMParams,
        summary="merge sub-models that clients pruned on their own text, by mean and votes",
        paper="Bai et al. 2025, https://arxiv.org/abs/2410.14852",
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
        ("symmetric", "symmetric:Symmetric", "drop the middle layers"),
    ):
        yield Method(
            name=name,
            target=f"prufed_plugins.pruners.{target}",
            params=params.LayerDropParams,
            summary=summary,
            paper=sajjad,
        )
    yield Method(
        name="top-alternate",
        target="prufed_plugins.pruners.even_alternate:EvenAlternate",
        params=params.LayerDropParams,
        summary="even-alternate by its name on the PruFed poster",
        paper=sajjad,
        alias_of="even-alternate",
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
    yield Method(
        name="heteagg-ls",
        target="prufed_plugins.aggregators.heteagg_ls:HeteAggLS",
        params=params.HeteAggLsParams,
        summary="heteagg whose B is fitted to the clients' masked products by least squares",
        paper="after Bhansali et al. 2024 (LEGO), https://arxiv.org/abs/2410.18287",
    )
    yield from _means()
    yield from _products()
    yield from _robust()
    yield from _merging()


def _means() -> Iterator[Method]:
    """Yield the aggregators that average the factors."""
    yield Method(
        name="fedit",
        target="prufed_plugins.aggregators.fedit:FedIT",
        params=params.FedAvgParams,
        summary="fedavg on A and on B",
        paper="Zhang et al. 2023, https://arxiv.org/abs/2305.05644",
    )
    yield Method(
        name="inclusivefl",
        target="prufed_plugins.aggregators.inclusivefl:InclusiveFL",
        params=params.InclusiveFlParams,
        summary="heteagg-layer whose shallow clients' last layers learn from the deeper ones",
        paper="Liu et al. 2022, https://arxiv.org/abs/2202.08028",
    )
    yield Method(
        name="hetlora",
        target="prufed_plugins.aggregators.hetlora:HetLoRA",
        params=params.HetLoraParams,
        summary="mean of unequal ranks padded with zeros, by the norm of the update",
        paper="Cho et al. 2024, https://arxiv.org/abs/2401.06432",
    )
    yield Method(
        name="fedsa",
        target="prufed_plugins.aggregators.fedsa:FedSA",
        params=params.FedSaParams,
        summary="mean of A; every client keeps its own B",
        paper="Guo et al. 2024, https://arxiv.org/abs/2410.01463",
    )
    yield Method(
        name="user-centric",
        target="prufed_plugins.aggregators.user_centric:UserCentric",
        params=params.UserCentricParams,
        summary="every client gets a mean of its own, by how alike its gradient and others' are",
        paper="Mestoukirdi et al. 2023, https://arxiv.org/abs/2304.12930",
    )
    yield Method(
        name="fjord",
        target="prufed_plugins.aggregators.fjord:Fjord",
        params=params.FjordParams,
        summary="every rank is the mean by samples over the clients that have it",
        paper="Horvath et al. 2021, https://arxiv.org/abs/2102.13451",
    )
    yield Method(
        name="fedrolex",
        target="prufed_plugins.aggregators.fedrolex:FedRolex",
        params=params.FedRolexParams,
        summary="every rank is the mean over the clients that have it; windows of ranks roll",
        paper="Alam et al. 2022, https://arxiv.org/abs/2212.01548",
    )
    yield Method(
        name="lora-fair",
        target="prufed_plugins.aggregators.lora_fair:LoraFair",
        params=params.LoraFairParams,
        summary="fedit whose B is corrected towards the mean of the products",
        paper="Bian et al. 2024, https://arxiv.org/abs/2411.14961",
    )


def _products() -> Iterator[Method]:
    """Yield the aggregators that average the products B A."""
    yield Method(
        name="flexlora",
        target="prufed_plugins.aggregators.flexlora:FlexLoRA",
        params=params.FlexLoraParams,
        summary="mean of the products, cut to rank by singular values; ranks may differ",
        paper="Bai et al. 2024, https://arxiv.org/abs/2402.11505",
    )
    yield Method(
        name="raflora",
        target="prufed_plugins.aggregators.raflora:RaFLoRA",
        params=params.FlexLoraParams,
        summary="flexlora whose every rank is the mean over the clients that have it",
        paper="raFLoRA 2026, https://arxiv.org/abs/2602.13486",
    )
    yield Method(
        name="flora",
        target="prufed_plugins.aggregators.flora:FLoRA",
        params=params.FloraParams,
        summary="the clients' factors stacked: the exact mean of the products, for one round",
        paper="Wang et al. 2024, https://arxiv.org/abs/2409.05976",
    )
    yield Method(
        name="fedex",
        target="prufed_plugins.aggregators.fedex:FedEx",
        params=params.FedExParams,
        summary="means of A and B, and their error as ranks that are not trained: exact",
        paper="Singhal et al. 2024, https://arxiv.org/abs/2410.09432",
    )


def _robust() -> Iterator[Method]:
    """Yield the aggregators that withstand clients which send anything."""
    yin = "Yin et al. 2018, https://arxiv.org/abs/1803.01498"
    yield Method(
        name="median",
        target="prufed_plugins.aggregators.median:Median",
        params=params.MedianParams,
        summary="every entry is the median over the clients that have it",
        paper=yin,
    )
    yield Method(
        name="trimmed-mean",
        target="prufed_plugins.aggregators.trimmed_mean:TrimmedMean",
        params=params.TrimmedMeanParams,
        summary="every entry is the mean without its largest and smallest values",
        paper=yin,
    )
    blanchard = "Blanchard et al. 2017, https://arxiv.org/abs/1703.02757"
    yield Method(
        name="krum",
        target="prufed_plugins.aggregators.krum:Krum",
        params=params.KrumParams,
        summary="the one update that lies closest to the others",
        paper=blanchard,
    )
    yield Method(
        name="multi-krum",
        target="prufed_plugins.aggregators.multi_krum:MultiKrum",
        params=params.MultiKrumParams,
        summary="mean of the updates that lie closest to the others",
        paper=blanchard,
    )
    yield Method(
        name="fltrust",
        target="prufed_plugins.aggregators.fltrust:FLTrust",
        params=params.FLTrustParams,
        summary="mean by agreement with an update that the server trains on its own data",
        paper="Cao et al. 2020, https://arxiv.org/abs/2012.13995",
        needs_server_data=True,
    )


def _merging() -> Iterator[Method]:
    """Yield the aggregators made for merging finished models."""
    yield Method(
        name="ties",
        target="prufed_plugins.aggregators.ties:Ties",
        params=params.TiesParams,
        summary="trim small changes, elect signs, average the clients that agree",
        paper="Yadav et al. 2023, https://arxiv.org/abs/2306.01708",
    )
    yield Method(
        name="dare",
        target="prufed_plugins.aggregators.dare:Dare",
        params=params.DareParams,
        summary="drop most changes at random, scale up the rest, then average",
        paper="Yu et al. 2023, https://arxiv.org/abs/2311.03099",
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
    yield Method(
        name="ffa",
        target="prufed_plugins.tuners.ffa:FfaTuner",
        params=params.FfaParams,
        summary="lora on B alone; A stays as all clients began with it",
        paper="Sun et al. 2024 (FFA-LoRA), https://arxiv.org/abs/2403.12313",
    )
    yield Method(
        name="rolora",
        target="prufed_plugins.tuners.rolora:RoloraTuner",
        params=params.RoloraParams,
        summary="lora on B in odd rounds, on A in even ones",
        paper="Chen et al. 2024 (RoLoRA), https://arxiv.org/abs/2409.02346",
    )
    yield Method(
        name="fedprox",
        target="prufed_plugins.tuners.fedprox:FedProxTuner",
        params=params.FedProxParams,
        summary="lora with a pull towards the global adapter",
        paper="Li et al. 2018 (FedProx), https://arxiv.org/abs/1812.06127",
    )
    yield Method(
        name="hetlora",
        target="prufed_plugins.tuners.hetlora:HetLoraTuner",
        params=params.HetLoraTunerParams,
        summary="lora that shrinks its last ranks and drops them; clients' ranks fall",
        paper="Cho et al. 2024 (HetLoRA), https://arxiv.org/abs/2401.06432",
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
    yield Method(
        name="quantity",
        target="prufed_plugins.partitioners.quantity:QuantityPartitioner",
        params=params.QuantityParams,
        summary="random rows, unequal numbers by a Dirichlet draw",
        paper="Li et al. 2021, https://arxiv.org/abs/2102.02079",
    )
    yield Method(
        name="natural",
        target="prufed_plugins.partitioners.natural:NaturalPartitioner",
        params=params.NaturalParams,
        summary="rows of one user, source or other key stay together",
        paper="Caldas et al. 2018, https://arxiv.org/abs/1812.01097",
    )


@hookimpl
def prufed_optimizers() -> Iterator[Method]:
    """Yield the built-in server optimizers."""
    yield Method(
        name="fedavgm",
        target="prufed_plugins.optimizers.fedavgm:FedAvgM",
        params=params.FedAvgMParams,
        summary="momentum over the rounds",
        paper="Hsu et al. 2019, https://arxiv.org/abs/1909.06335",
    )
    for name, target, summary in (
        ("fedadagrad", "fedadagrad:FedAdagrad", "steps shrink with all squared changes so far"),
        ("fedyogi", "fedyogi:FedYogi", "as fedadam, but steps lengthen slowly after large changes"),
        ("fedadam", "fedadam:FedAdam", "steps scaled by the recent size of each entry's change"),
    ):
        yield Method(
            name=name,
            target=f"prufed_plugins.optimizers.{target}",
            params=getattr(params, f"{target.partition(':')[2]}Params"),
            summary=summary,
            paper="Reddi et al. 2020, https://arxiv.org/abs/2003.00295",
        )
