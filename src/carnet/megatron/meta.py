"""Models on the meta device: shapes and names without a byte of weights, in one process that plays any rank of any cut.

Groups of processes are torch's fake ones; what megatron-core asks of CUDA while it builds is answered; all is as before afterwards.
Other devices will do, too: a CPU.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from carnet.dialects.megatron.releases import PATTERNS
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, NotSupported
from carnet.megatron.hybrids import GatedDeltaNet, HybridModel, mamba_context_parallel, mamba_mixer
from carnet.megatron.models import Arguments, config_of, describes_hybrid, keywords_of
from carnet.megatron.modules import HAVE_TE, define_forgotten

Spec = Callable[[TransformerConfig, int | None], TransformerBlockSubmodules | ModuleSpec]  # of a config and a virtual stage


@dataclass(frozen=True, slots=True)
class Cut:
    """In how many parts a model lies."""

    tp: int = 1  # ranks that share each layer
    pp: int = 1  # pipeline stages
    ep: int = 1  # ranks that share experts
    vp: int = 1  # virtual stages of each pipeline stage

    def ranks(self) -> Iterator["Rank"]:
        """Yield every rank."""
        every = range(self.pp), range(self.ep), range(self.tp)
        yield from (Rank(tp, pp, ep) for pp in every[0] for ep in every[1] for tp in every[2])


@dataclass(frozen=True, slots=True)
class Rank:
    """Which part."""

    tp: int = 0
    pp: int = 0
    ep: int = 0

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp} ep{self.ep}"


WHOLE, FIRST = Cut(), Rank()
UNSHARED = {
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


@contextmanager
def built(
    said: Arguments, spec: Spec, cut: Cut = WHOLE, rank: Rank = FIRST, *, device: str = "meta", **given: object
) -> Iterator[list[torch.nn.Module]]:
    """Give the virtual stages that a rank builds of the model that training arguments describe, on the meta device.

    ``given`` are fields of the config. The models live while the context does: what they say of their shards, they ask the groups.
    Raises what config_of and keywords_of raise, BadCheckpoint where megatron-core refuses to build, and BadRequest in a job of
    torch.distributed that is cut otherwise.
    """
    with _playing(cut, rank), _on(device):
        sizes: dict[str, object] = {"tensor_model_parallel_size": cut.tp, "pipeline_model_parallel_size": cut.pp}
        if cut.ep > 1:
            sizes["expert_model_parallel_size"] = cut.ep
        if cut.vp > 1:
            sizes["virtual_pipeline_model_parallel_size"] = cut.vp
        if cut.pp > 1:
            sizes["pipeline_dtype"] = torch.float32
        config = config_of(said, **{**sizes, **_stages(said, cut), "perform_initialization": False, **given})
        try:
            stages = [_stage(said, config, spec, cut, rank, stage) for stage in range(cut.vp)]
        except CarnetError:  # may be of such a type too, and says itself what is wrong
            raise
        except (AssertionError, AttributeError, ImportError, TypeError, ValueError) as error:
            raise BadCheckpoint("megatron-core refuses to build the model", {"because": error}) from error
        yield stages


def _stages(said: Arguments, cut: Cut) -> Mapping[str, object]:
    """Return the fields of a config that undo how training shared layers among pipeline stages, where this is another cut."""
    trained = said.get("pipeline_model_parallel_size"), said.get("virtual_pipeline_model_parallel_size") or 1
    if cut.pp == 1 or (trained[0] is not None and trained != (cut.pp, cut.vp)):
        return UNSHARED
    layout = said.get("pipeline_model_parallel_layout")
    if layout is not None and (
        not isinstance(layout, str) or layout.startswith("<")
    ):  # a class of Megatron's, which was not built
        raise NotSupported("the training arguments do not say the pipeline's layout in words", {"found": layout})
    return {}


def _stage(said: Arguments, config: TransformerConfig, spec: Spec, cut: Cut, rank: Rank, stage: int) -> torch.nn.Module:
    """Return one virtual stage of a rank."""
    first = rank.pp == 0 and stage == 0
    last = rank.pp == cut.pp - 1 and stage == cut.vp - 1
    at = stage if cut.vp > 1 else None
    layers = spec(config, at)
    hybrid = describes_hybrid(said)
    keywords = keywords_of(said, hybrid=hybrid)
    model: torch.nn.Module
    if hybrid:
        keywords |= _pattern(keywords, cut)
        model = HybridModel(config, layers, pre_process=first, post_process=last, **keywords)
    else:
        further = None
        if config.mtp_num_layers:
            if last and not layers.layer_specs:
                raise NotSupported("carnet builds no stage that has further-token layers alone", {"pipeline stage": rank.pp})
            alike = layers.layer_specs[-1:]
            further = get_gpt_mtp_block_spec(config, *alike, use_transformer_engine=HAVE_TE, vp_stage=at) if alike else None
        model = GPTModel(config, layers, pre_process=first, post_process=last, mtp_block_spec=further, vp_stage=at, **keywords)
    return model.to(config.params_dtype)  # as Megatron's Float16Module


def _pattern(keywords: dict[str, object], cut: Cut) -> dict[str, object]:
    """Return the pattern of a hybrid's layers under the name of today, taken out of keywords; nothing where there is none.

    Bars in it say where pipeline stages end: those of another cut are not this one's.
    """
    found = [str(keywords.pop(name)) for name in PATTERNS if name in keywords]
    called = PATTERNS[1] if PATTERNS[1] in inspect.signature(HybridModel.__init__).parameters else PATTERNS[0]
    if not found:
        return {}
    return {called: found[0] if found[0].count("|") + 1 == cut.pp * cut.vp else found[0].replace("|", "")}


@contextmanager
def _playing(cut: Cut, rank: Rank) -> Iterator[None]:
    """Be one rank of a world that is not there; in a job that is cut as asked for, be who one is."""
    if torch.distributed.is_initialized():
        if cut != WHOLE or torch.distributed.get_world_size() > 1 or not parallel_state.model_parallel_is_initialized():
            facts = {"asked for": f"tp {cut.tp} pp {cut.pp} ep {cut.ep}", "ranks here": torch.distributed.get_world_size()}
            remedy = "ask in a process of its own"
            raise BadRequest("a job of torch.distributed runs in this process", facts, remedy=remedy)
        yield
        return
    before = dict(vars(parallel_state))
    # the order of megatron.core.parallel_state: tp, then dp and with it ep, then pp
    place = rank.tp + cut.tp * (rank.ep + cut.ep * rank.pp)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=place, world_size=cut.tp * cut.pp * cut.ep)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=cut.tp,
            pipeline_model_parallel_size=cut.pp,
            virtual_pipeline_model_parallel_size=cut.vp if cut.vp > 1 else None,
            expert_model_parallel_size=cut.ep,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        vars(parallel_state).update(before)


class _On(TorchFunctionMode):
    """Make on one device what is made on any."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Call a function of torch with another device; what is here stays here."""
        if function is torch.Tensor.cuda:
            return args[0]
        given = dict(kwargs or {})
        return function(*args, **given | ({"device": self.device} if given.get("device") is not None else {}))


class _GatedNorm(torch.nn.Module):
    """The shape of mamba_ssm's gated norm, which has no build for a CPU: one weight, cut like the channels that it norms."""

    def __init__(self, hidden_size: int, **given: object) -> None:
        del given
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[object, ...] = (), metadata: Mapping[str, object] | None = None
    ) -> ShardedStateDict:
        """Return the weight with its place, as ExtendedRMSNorm of megatron/core/ssm/mamba_mixer.py does."""
        groups = {
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "dp_cp_group": (metadata or {}).get("dp_cp_group"),
        }
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


@contextmanager
def _on(device: str) -> Iterator[None]:
    """Build on a device, whatever the machine."""
    define_forgotten()
    with ExitStack() as changed:
        changed.enter_context(torch.device(device))
        changed.enter_context(_On(device))
        changed.enter_context(patch.object(torch.cuda, "current_device", lambda: device))
        changed.enter_context(patch.object(tensor_parallel.get_cuda_rng_tracker(), "fork", lambda *_: nullcontext()))
        if not mamba_mixer.HAVE_MAMBA_SSM:
            changed.enter_context(patch.object(mamba_mixer, "HAVE_MAMBA_SSM", new=True))
            changed.enter_context(patch.object(mamba_mixer, "ExtendedRMSNorm", _GatedNorm))
        delta = inspect.getmodule(GatedDeltaNet.__init__)  # asks for its kernel by name, and has its own formula beside it
        changed.enter_context(patch.object(delta, "HAVE_FLA", new=True))
        for module in (mamba_mixer, mamba_context_parallel):  # einops, too, is asked for by name alone while they are built
            changed.enter_context(patch.object(module, "HAVE_EINOPS", new=True, create=True))
        yield
