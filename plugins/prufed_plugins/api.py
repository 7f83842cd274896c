"""What a plugin is: the hooks it may implement, and the contract of each kind of method.

A plugin is a module in the entry-point group ``prufed`` that states ``PRUFED_API`` and implements
some of the hooks below. A hook yields :class:`Method` descriptions; the implementation that
``Method.target`` names is imported only when the method runs, so that ``prufed --help`` stays fast
and a broken dependency costs only the method that needs it.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import pluggy

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor, nn

API_VERSION: Final = (1, 0)
"""(major, minor). A plugin works with the same major and a minor no newer than ours."""

GROUP: Final = "prufed"
"""The entry-point group in which plugins announce themselves."""

MASKS_FILE: Final = "prufed-masks.safetensors"
"""The masks of an element-wise pruned model, beside its weights."""

SUB_MODELS: Final = "sub_models"
"""Marks a parameter whose paths are sub-models of the base, see :class:`Method`."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)

Kind = Literal[
    "pruner",
    "aggregator",
    "tuner",
    "sampler",
    "partitioner",
    "optimizer",
    "privacy",
    "engine",
]

HOOKS: Final[Mapping[Kind, str]] = {
    "pruner": "prufed_pruners",
    "aggregator": "prufed_aggregators",
    "tuner": "prufed_tuners",
    "sampler": "prufed_samplers",
    "partitioner": "prufed_partitioners",
    "optimizer": "prufed_optimizers",
    "privacy": "prufed_privacy",
    "engine": "prufed_engines",
}


@dataclass(frozen=True)
class Method:
    """One method, described without importing it.

    Attributes:
        name: what a user types, ``[a-z0-9-]+``.
        target: ``package.module:Class``; the class is constructed with one ``params`` instance.
        params: a frozen pydantic model with ``extra="forbid"``, defined in a torch-free module. A
            parameter that names a file or a directory has the type :class:`pathlib.Path`: a recipe
            then has the digest of what lies there. A pruner that merges sub-models has a tuple of
            paths, whose field says ``json_schema_extra={SUB_MODELS: True}``: users give references,
            which become the directories of artifacts that were pruned from the base, in an order
            that does not hang on theirs.
        summary: one line for ``prufed plugins``.
        paper: citation and URL.
        requires: distributions that must be installed for the method to run.
        alias_of: the name of the same plugin's method that this is another name of; what it makes
            is what that one makes, and is called so.
        needs_server_data: whether an aggregator is a :class:`TrustingAggregator`, for which the
            server needs rows of its own, ``server_data`` in clients.yaml.
    """

    name: str
    target: str
    params: type[BaseModel]
    summary: str
    paper: str | None = None
    requires: tuple[str, ...] = ()
    alias_of: str | None = None
    needs_server_data: bool = False


class HookSpecs:
    """The hooks. Each takes nothing and yields :class:`Method` descriptions."""

    @hookspec
    def prufed_pruners(self) -> Iterable[Method]:
        """Yield methods whose target implements :class:`Pruner`."""
        raise NotImplementedError

    @hookspec
    def prufed_aggregators(self) -> Iterable[Method]:
        """Yield methods whose target implements :class:`Aggregator`."""
        raise NotImplementedError

    @hookspec
    def prufed_tuners(self) -> Iterable[Method]:
        """Yield methods whose target implements :class:`Tuner`."""
        raise NotImplementedError

    @hookspec
    def prufed_samplers(self) -> Iterable[Method]:
        """Yield methods whose target implements :class:`Sampler`."""
        raise NotImplementedError

    @hookspec
    def prufed_partitioners(self) -> Iterable[Method]:
        """Yield methods whose target implements :class:`Partitioner`."""
        raise NotImplementedError

    @hookspec
    def prufed_optimizers(self) -> Iterable[Method]:
        """Yield methods whose target implements :class:`ServerOptimizer`."""
        raise NotImplementedError

    @hookspec
    def prufed_privacy(self) -> Iterable[Method]:
        """Yield methods whose target wraps the client to server channel."""
        raise NotImplementedError

    @hookspec
    def prufed_engines(self) -> Iterable[Method]:
        """Yield methods whose target runs tuners for clients and brings their updates."""
        raise NotImplementedError


# --- pruning -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruneTarget:
    """How much to remove.

    At most one of the first three is set; a layer pruner's parameters may say how much instead.

    Attributes:
        sparsity: share of entries to remove, in [0, 1).
        pattern: ``(n, m)``: n of every m consecutive inputs of a row are removed.
        layers: how many decoder layers to remove; a layer pruner also accepts ``sparsity``.
        per_matrix: sparsity of single matrices by full module name, where a method varies it; the
            others have ``sparsity``. Set by :meth:`SurveyingPruner.survey`, never by a user.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    layers: int | None = None
    per_matrix: Mapping[str, float] | None = None


Arguments = dict[str, Any]
"""What the blocks are called with besides the hidden states; only ever handed on."""


class Decoder(Protocol):
    """A causal language model, seen as a stack of decoder blocks that may be larger than memory.

    The weights of a block are in memory from the moment it is asked for until another one is. A
    pruner therefore goes through the blocks in order, and keeps no module of an earlier one.

    Attributes:
        prefix: module path of the stack, ``model.layers`` for Llama.
        blocks: the decoder blocks in order; their number is always known, their weights are not.
        start: the first block that is still to be pruned; 0 unless a killed prune goes on.
        masks: by parameter name, of matrices that were pruned before: bool of the parameter's own
            shape, True where an entry exists. What does not exist counts as pruned, and goes first.
    """

    prefix: str
    blocks: Sequence[nn.Module]
    start: int
    masks: Mapping[str, Tensor]

    def shapes(self, index: int) -> Mapping[str, tuple[int, int]]:
        """Return (outputs, inputs) of the matrices of block ``index``, without loading them."""

    def linears(self, index: int) -> Mapping[str, nn.Module]:
        """Load block ``index`` and return its prunable matrices by their full module name."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return what a parameter is stored in, which may differ from what it is computed in.

        A pruner rounds to it what it writes into a block, so that later blocks see the outputs of
        what will be stored.
        """

    def embed(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, Arguments]]:
        """Return what block ``start`` receives for each batch (B, T) of token ids.

        The hidden states are (B, T, H) and held, see :meth:`hold`. The arguments (attention masks,
        position embeddings; they differ between layer types) are for :meth:`run_block`.
        """

    def run_block(self, index: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        """Return the output (B, T, H) of block ``index``, on the device that computes."""

    def hold(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """Return the same values where there is room to keep them: memory, or a mapped file.

        Args:
            hidden: values (B, T, H).
            instead_of: what was held before and is not needed any more; overwritten where it fits.
        """


@dataclass(frozen=True)
class PrunedMatrix:
    """One pruned matrix, ready to be written.

    Attributes:
        name: full name of the parameter, ``model.layers.0.self_attn.q_proj.weight``.
        weight: new values in the parameter's own layout and dtype.
        mask: bool, same shape; True where the entry exists.
        report: numbers for the report: sparsity, error, dead channels, damping, seconds.
    """

    name: str
    weight: Tensor
    mask: Tensor
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptLayers:
    """The decoder layers that remain.

    Attributes:
        layers: global indices, ascending; local layer j of the sub-model is ``layers[j]``.
        scores: one score per original layer where the method has scores; fewer where a score
            belongs to a run of layers and the last ones cannot start one.
    """

    layers: tuple[int, ...]
    scores: tuple[float, ...] | None = None


Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


class Pruner(Protocol):
    """Makes a smaller model out of a loaded one, block by block. It never loads or saves.

    Attributes:
        result: ``masked`` yields :class:`PrunedMatrix`, ``sliced`` yields one :class:`KeptLayers`.
        needs_calibration: whether ``calibration`` must be given.

    A pruner of layers that looks at no matrices may say ``needs_matrices = False``: it is then
    given models whose blocks hold more than linear modules, such as state-space layers. A masked
    pruner that can do without a target says ``needs_target = False``.
    """

    result: Literal["masked", "sliced"]
    needs_calibration: bool

    def prune(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> Iterator[PrunedMatrix | KeptLayers]:
        """Yield the results in block order.

        Args:
            decoder: the model; a masked pruner writes the new weights into it as it goes, so that
                later blocks see the outputs of the pruned ones.
            calibration: batches of token ids, each (B, T), without padding.
            target: how much to remove.
            progress: told about finished blocks.

        Raises:
            MethodError: the target cannot be met on this model.
        """


class CheckingPruner(Pruner, Protocol):
    """A pruner that knows beforehand what it cannot do."""

    def check(self, decoder: Decoder, targets: Sequence[PruneTarget]) -> None:
        """Refuse a target that cannot be met on a model, before anything is read of its weights.

        Raises:
            MethodError: one cannot be met.
        """


class SurveyingPruner(Pruner, Protocol):
    """A pruner that looks at the whole dense model before it touches the first block."""

    def survey(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        target: PruneTarget,
        progress: Progress,
    ) -> PruneTarget:
        """Return the target to prune to, with ``per_matrix`` where matrices differ.

        Called once, before :meth:`prune` of a fresh run; a resumed run is given the same answer.
        """


class NestedPruner(Pruner, Protocol):
    """A pruner that finds several sub-models, each inside the one before, in one calibration."""

    def prune_nested(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        targets: Sequence[PruneTarget],
        progress: Progress,
    ) -> Iterator[tuple[PrunedMatrix, ...]]:
        """Yield one result per target for every matrix, in block order.

        The decoder's weights stay as they are, so every block is calibrated with dense activations.

        Args:
            decoder: the model.
            calibration: as for :meth:`Pruner.prune`.
            targets: ascending sparsities; what one removes, the next removes too.
            progress: told about finished blocks.

        Raises:
            MethodError: the targets are not ascending sparsities, or cannot be met on this model.
        """


class NestedSurveyingPruner(SurveyingPruner, NestedPruner, Protocol):
    """A pruner whose one look at the dense model serves several targets.

    Without this, a pruner that both surveys and nests is asked to :meth:`survey` for each target.
    """

    def survey_nested(
        self,
        decoder: Decoder,
        calibration: Sequence[Tensor] | None,
        targets: Sequence[PruneTarget],
        progress: Progress,
    ) -> Sequence[PruneTarget]:
        """Return for each target what :meth:`survey` returns for it.

        Called once, before :meth:`prune_nested` of a fresh run; a resumed run is given the same
        answers.
        """


# --- aggregation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """What one client sends back.

    Attributes:
        client: the client's name, unique in the federation.
        tensors: adapter tensors by *global* name, ``<module>.lora_A.weight`` (r, k) and
            ``<module>.lora_B.weight`` (d, r); may read from disk on access.
        masks: bool tensors by the same names, True where the client has the entry; a name that is
            absent means every entry. None means no masks at all.
        samples: n_i, rows of data the client trained on.
        rank: LoRA rank r_i.
        scaling: s_i, the factor on B A.
        kept_layers: global indices of the layers the client has.
        base_round: the round of the global adapter the client started from.
        weight: extra factor on this client's weight.
        base_masks: bool tensors (d, k) by ``<module>.weight``, where the client applies its base's
            mask to the product: its update is s_i M_i ⊙ (B_i A_i). A name that is absent means
            every entry; None means no such masks. May read from disk on access.
        masks_digest: of ``masks``, where every entry outside them is known to be 0. A merge that
            met the same digest in the round before may then leave the masks unread.
    """

    client: str
    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] | None
    samples: int
    rank: int
    scaling: float
    kept_layers: tuple[int, ...]
    base_round: int = 0
    weight: float = 1.0
    base_masks: Mapping[str, Tensor] | None = None
    masks_digest: str | None = None


@dataclass(frozen=True)
class GlobalState:
    """The global adapter.

    Attributes:
        tensors: adapter tensors by global name; the order of names is the order of merging.
        rank: LoRA rank r.
        scaling: s, the common scale in which clients are merged.
        layers: number of decoder layers of the full model.
        residual: what the factors could not hold of earlier rounds, as factors A (R, k) and
            B (d, R) by the same names: every base is taken as W + s · (B A), or W + s · M ⊙ (B A)
            where the client's product is masked. It is not trained. Empty where there is none.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    scaling: float
    layers: int
    residual: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One client's share of one module, in the common scale.

    Attributes:
        client: the client's name.
        tensors: ``lora_A.weight`` (r_i, k) and ``lora_B.weight`` (d, r_i), multiplied by
            sqrt(s_i / s).
        masks: bool tensors by the same keys; None where every entry is present.
        samples: n_i.
        weight: the extra factor of the update.
        rank: r_i.
    """

    client: str
    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor | None]
    samples: int
    weight: float
    rank: int


@dataclass(frozen=True)
class Merged:
    """The result for one module.

    Attributes:
        tensors: new global tensors by the same keys and of the same shapes and dtypes as given.
        diagnostics: numbers per module: coverage, update norm and the like.
        covered: bool tensors by the same keys, True where the clients decided the entry; None
            means every entry. A key that is absent is taken from the clients' masks. A server
            optimizer leaves uncovered entries as they were.
        residual: the module's share of :attr:`GlobalState.residual` from now on, by the same keys,
            at any rank R; empty where it stays as it is.
    """

    tensors: Mapping[str, Tensor]
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    covered: Mapping[str, Tensor | None] = field(default_factory=dict)
    residual: Mapping[str, Tensor] = field(default_factory=dict)


class Aggregator(Protocol):
    """Merges the clients' adapters into the global one, module by module.

    Some attributes may say more of a method:

    - ``mixes_ranks = True``: clients of other ranks than the global one can be merged.
    - ``window(round_index, rank, global_rank) -> Sequence[int]``: the global ranks that a client of
      lower rank has in a round, in its order; without it, the first.
    - ``personal = {"B"}``: factors that every client keeps for itself; write-back gives the others.
    - ``new_factors = True``: A and B come back in another basis; no server optimizer can step
      towards them, no tuner may leave one of them alone, and no client can keep a share of its own.
    - ``leaves_residual = True``: what the factors cannot hold comes back in ``Merged.residual``;
      no server optimizer can step anywhere else.
    - ``stacks = True``: the clients' ranks stand side by side, so that the global rank must be
      their sum; a client is given the best approximation of its own rank.
    - ``breaks``: contracts that it gives up, and why; :mod:`prufed_plugins.testing.aggregator`.
    """

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Look at all updates before the first merge: refuse what cannot be mixed, take norms.

        Raises:
            MethodError: the method cannot merge these updates.
        """

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the new global tensors of one module.

        Args:
            module: global module name, ``model.layers.3.self_attn.q_proj``.
            parts: the clients that have this module, in the order of their names. It can be
                iterated more than once; each iteration reads the files again, one client at a
                time, so a streaming method keeps its memory independent of their number.
            current: the global tensors before the round, by the keys of :class:`Part`.
        """


class TrustingAggregator(Aggregator, Protocol):
    """An aggregator that holds the clients against an update of the server's own.

    Its description says ``needs_server_data``. The server then trains in every round, from the
    global adapter, on rows that it trusts.
    """

    def trust(self, root: Update) -> None:
        """Take the server's own update of the round that is merged next; it has every layer."""


@dataclass(frozen=True)
class FirstGradient:
    """What a client's data want of the first global adapter, before anybody has trained.

    Attributes:
        update: the gradient of the loss by the client's factors, in the place of its tensors and
            in the common scale.
        variance: σ_i², the mean of ‖∇_k - ∇‖² over mini-batches k, in that scale.
    """

    update: Update
    variance: float


class PersonalAggregator(Aggregator, Protocol):
    """An aggregator that gives every client an adapter of its own.

    What ``merge`` makes is the global adapter, for evaluation; no client is given it.

    Attributes:
        batch_size: rows of a mini-batch of the first gradients.
        batches: how many mini-batches; all if None.
    """

    batch_size: int
    batches: int | None

    def similarities(
        self, gradients: Sequence[FirstGradient], state: GlobalState
    ) -> dict[str, dict[str, float]]:
        """Return how much client j counts for client i, by i and j; once, before the first round.

        Args:
            gradients: of every client of the federation.
            state: the first global adapter.
        """

    def for_client(self, weights: Mapping[str, float]) -> Aggregator:
        """Return what merges one client's adapter.

        Its global state is then the client's own adapter before the round, in the place of the
        global one.

        Args:
            weights: that client's row of :meth:`similarities`.
        """


class ServerOptimizer(Protocol):
    """Turns the aggregate into a step of the global adapter (Reddi et al., 2003.00295)."""

    def step(self, name: str, old: Tensor, aggregate: Tensor, covered: Tensor | None) -> Tensor:
        """Return the new global tensor; entries where ``covered`` is False stay as they were."""

    def state(self) -> Mapping[str, Tensor]:
        """Return the optimizer's state, to be kept across a resume."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned."""


# --- the federation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client when it samples.

    Attributes:
        name: unique name.
        samples: rows of training data.
        sparsity: share of the base's entries that were removed, as counted.
        layers: number of decoder layers of its sub-model.
    """

    name: str
    samples: int
    sparsity: float
    layers: int


class Sampler(Protocol):
    """Decides who trains in a round."""

    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> list[str]:
        """Return the names of the round's clients.

        Args:
            round_index: 0 for the first round.
            clients: every client, in the order of the configuration.
            seed: derived from (run seed, round, purpose).
        """


class Partitioner(Protocol):
    """Splits one data set over clients.

    One that goes by another field of the rows than ``category`` names it in an attribute ``field``,
    and is given that field's values in place of the categories.
    """

    def split(
        self, categories: Sequence[str | None], clients: Sequence[str], seed: int
    ) -> dict[str, list[int]]:
        """Return row indices by client; every client gets at least one row.

        Args:
            categories: the category of each row, None where a row has none.
            clients: the clients' names.
            seed: derived from (run seed, purpose).

        Raises:
            MethodError: the rows cannot be split so (no categories, too few rows).
        """


@dataclass(frozen=True)
class TrainingData:
    """One client's tokenised rows.

    Attributes:
        input_ids: one list of token ids per row.
        labels: the same lengths; -100 where a token carries no loss.
    """

    input_ids: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.input_ids)


@dataclass(frozen=True)
class TuneStep:
    """One optimizer step, for progress and the journal.

    Attributes:
        step: 1 for the first.
        total: number of steps planned.
        loss: mean loss per token of the step.
        tokens: tokens seen so far.
    """

    step: int
    total: int
    loss: float
    tokens: int


class AdaptedModel(Protocol):
    """A base with masked LoRA adapters attached: what a tuner trains.

    Attributes:
        module: the model to call; only adapter parameters require gradients.
        parameters: trainable tensors by local name.
        masks: bool masks by the same names; absent where every entry is trainable.
    """

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    masks: Mapping[str, Tensor]

    def project(self) -> None:
        """Set every masked-out entry of the adapter to exactly zero."""

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the adapter tensors by local name, on the CPU in float32."""


@dataclass(frozen=True)
class TuneResult:
    """What training produced.

    Attributes:
        tensors: adapter tensors by local name, on the CPU in float32.
        losses: mean loss per step.
        tokens: tokens trained on.
        rank: how many of the first ranks stay, from this update on; None: all.
    """

    tensors: Mapping[str, Tensor]
    losses: Sequence[float]
    tokens: int
    rank: int | None = None


Factors = Literal["A", "B", "AB"]
"""Which factors of a LoRA adapter are meant."""


class Tuner(Protocol):
    """Trains an attached adapter on one client's data.

    One that leaves a factor alone says so by a method ``trains(round_index: int) -> Factors``; a
    factor that no client of a round trained stays what it was, bit for bit, whatever the aggregator
    and the server optimizer make of it. One whose results may have fewer ranks than it was given
    says ``prunes_ranks = True``.
    """

    def tune(
        self,
        model: AdaptedModel,
        data: TrainingData,
        seed: int,
        on_step: Callable[[TuneStep], None],
        *,
        round_index: int,
        pad_token_id: int,
    ) -> TuneResult:
        """Return the trained adapter tensors. Masked-out entries are zero at every step.

        Raises:
            MethodError: the loss became NaN or infinite.
        """
