"""What the checkpoints of one program are, whatever the family: how files are cut, what stands beside the weights, which codes
they take.

A new kind is a row here and a file with its rows; what reads, plans, writes and examines asks for a column, never for a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

SHARDS, RANKS, STORE = "shards", "ranks", "store"  # how files are cut: by size; one a rank; a store of chunks below a folder

# which codes an engine loads: of linear layers; of experts, too; of experts unless ranks share them, when its kernel decides what a
# rank has of all experts
LINEAR, EXPERTS, UNSHARED = "linear", "experts", "unshared"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of checkpoint, as a source and as a target."""

    name: str  # what options and documents call it
    files: str  # SHARDS, RANKS or STORE
    class_key: str  # where its config names the class of the model; "" for training arguments, which name none
    class_type: type = str  # of what stands there: a name, or a list of names
    codes_key: str = ""  # where its config says of quantized weights; "" where no weights are
    styles: tuple[str, ...] = ()  # whose codes a target may hold; the first unless another is asked for
    embeddings: tuple[str, ...] = ()  # how ranks may share the embedding, where a person may say
    companions: bool = False  # what else lies in the folder is for the same program: tokenizer, code, how texts are generated
    rounds_sums: bool = False  # a norm that one is added to, or taken from, is rounded to its type; elsewhere it becomes f32
    one_type: bool = False  # every weight has the model's type, whatever a source has, but for rows with a type of their own
    pads_vocabulary: bool = False  # the ranks' multiple of rows is stored
    halved_by: str = "-"  # the tensor that is there where what mixes tokens and the MLP behind it are two layers; "-" for none
    omits_further: bool = False  # layers that predict further tokens are left out, and their number stays in the config
    # what a rank is called, where there is one stage and where there are several ("": there are none), and its file then
    units: tuple[str, str] = ("rank{rank}", "rank{rank}")
    file: str = "{unit}.safetensors"
    counts_anew: bool = True  # the layers of every stage are numbered from 0
    spares_last: bool = False  # where layers do not divide, the stages before the last have one more, not the first ones
    pads_to: int = 0  # the rows of the vocabulary are padded to a multiple, whatever the number of ranks
    whole_ep: bool = False  # all ranks share the experts, or none
    # canonical tensors that its kernels may have in another order than they were loaded in: no file has one
    reorders: tuple[str, ...] = ()
    # of ranks: the codes that they load as they are published, before kernels pack them anew; recipe -> LINEAR, EXPERTS or UNSHARED
    loads: Mapping[str, str] = field(default_factory=dict)
    releases: tuple[str, ...] = ()  # of the program whose names the rows are; the first unless another is asked for
    adapters: bool = False  # adapters have a place beside their weights, or without them
    spoken: str = ""  # the kind whose config its own is; "" where it has one of its own
    single: str = ""  # the one file that all tensors are in; "" where files are cut
    alone: bool = False  # holds adapters, and nothing of the model that they are of

    @property
    def arguments(self) -> bool:
        """Say whether its config is the arguments of a training: of a program that has releases, and without a family's name."""
        return not self.class_key

    @property
    def joins_codes(self) -> bool:
        """Say whether codes lie in it as an engine has them before it packs them."""
        return self.files == RANKS and bool(self.loads)


OWN = "own"  # in place of a folder of adapters: those of the checkpoint itself
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "hf",
            SHARDS,
            "architectures",
            list,
            codes_key="quantization_config",
            styles=("modelopt", "compressed-tensors", "deepseek"),
            companions=True,
            omits_further=True,
        ),
        Kind(
            "trtllm",
            RANKS,
            "architecture",
            codes_key="quantization",
            styles=("trtllm",),
            embeddings=("none", "rows", "columns"),
            rounds_sums=True,
        ),
        # vllm 0.32 model_executor/model_loader/sharded_state_loader.py; distributed/utils.py get_pp_indices;
        # model_executor/layers/vocab_parallel_embedding.py DEFAULT_VOCAB_PADDING_SIZE
        Kind(
            "vllm",
            RANKS,
            "architectures",
            list,
            codes_key="quantization_config",
            one_type=True,
            rounds_sums=True,
            companions=True,
            omits_further=True,
            units=("rank-{tp}", "pp-{pp}-tp-{tp}"),
            file="model-{unit}-part-0.safetensors",
            counts_anew=False,
            spares_last=True,
            pads_to=64,
            # model_executor/layers/quantization: modelopt.py, whose experts of FP8 have a scale each, compressed_tensors/, fp8.py,
            # mxfp4.py; layers/fused_moe/oracle/nvfp4.py is_global_sf_supported_for_nvfp4_backend
            loads={
                "modelopt/fp8": EXPERTS,
                "modelopt/fp8-channel": LINEAR,
                "modelopt/fp8-block": LINEAR,
                "modelopt/nvfp4": UNSHARED,
                "modelopt/mxfp8": EXPERTS,
                "compressed-tensors/fp8": EXPERTS,
                "compressed-tensors/fp8-channel": EXPERTS,
                "compressed-tensors/fp8-block": EXPERTS,
                "compressed-tensors/nvfp4": EXPERTS,
                "compressed-tensors/mxfp8": EXPERTS,
                "compressed-tensors/mxfp4": EXPERTS,
                "compressed-tensors/int8-channel": EXPERTS,
                "deepseek/fp8-block": EXPERTS,
                "openai/mxfp4": EXPERTS,
            },
            whole_ep=True,
            releases=("0.32", "0.33"),
        ),
        # sglang 0.5.23 srt/model_loader/loader.py ShardedStateLoader, which knows ranks of one stage alone;
        # srt/layers/vocab_parallel_embedding.py DEFAULT_VOCAB_PADDING_SIZE
        Kind(
            "sglang",
            RANKS,
            "architectures",
            list,
            codes_key="quantization_config",
            one_type=True,
            rounds_sums=True,
            companions=True,
            omits_further=True,
            units=("rank-{tp}", ""),
            file="model-{unit}-part-0.safetensors",
            counts_anew=False,
            pads_to=64,
            whole_ep=True,
            # srt/layers/quantization/unquant.py: FlashInfer's, aiter's, fused ones
            reorders=("moe.gate", "moe.up", "moe.down"),
            releases=("0.5.23",),
        ),
        # megatron/core/models/hybrid/hybrid_block.py; where brackets of the pattern join the two, the norm has the usual name
        Kind("megatron", STORE, "", pads_vocabulary=True, halved_by="decoder.final_norm.weight", adapters=True),
        # huggingface/peft 0.21 src/peft/utils/constants.py SAFETENSORS_WEIGHTS_NAME
        Kind(
            "peft",
            SHARDS,
            "architectures",
            list,
            omits_further=True,
            adapters=True,
            spoken="hf",
            single="adapter_model.safetensors",
            alone=True,
        ),
    )
}
