"""Mixtures of many small experts under Hugging Face's names, as DeepSeek began them: shared experts beside, dense layers before.

The width of the shared experts is a number of them times the width of one: a model in between is padded with zeros, which changes
nothing it computes. transformers: modeling_deepseek_v3.py, whose classes the later ones take over; vLLM wants topk_method and
scoring_func beside what transformers writes.
"""

from carnet.algebra.layout import round_up
from carnet.dialects import hf
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.further import EMBED_FIRST
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import expect
from carnet.model.fields import Config, Value
from carnet.model.model import marks, mixtures, number, value

MLPS = ("dense", "sparse")
ROWS = (*hf.experts(), *hf.gated("mlp.shared_experts", "shared", "shared_ffn"))
# layers that predict further tokens follow the others, each with the embedding and the head once more
FURTHER = (
    row(LAYER + "enorm.weight", "hidden", "mtp.embed_norm"),
    row(LAYER + "hnorm.weight", "hidden", "mtp.hidden_norm"),
    fuse(LAYER + "eh_proj.weight", "hidden *", EMBED_FIRST),
    row(LAYER + "embed_tokens.weight", "vocab hidden", "embed", when={"is_mtp": True}),
    row(LAYER + "shared_head.norm.weight", "hidden", "mtp.final_norm"),
    row(LAYER + "shared_head.head.weight", "vocab hidden", "head", when={"is_mtp": True}),
)
BIAS = row(LAYER + "mlp.gate.e_score_correction_bias", "expert", "moe.router_bias", dtype="f32")


def _after_dense(dense: int, config: Config) -> str | None:
    """Return the blocks: mixtures follow so many dense layers."""
    expect(dense >= 0, "a number of layers")
    return mixtures([layer >= dense for layer in range(number(config, "layers"))])


def listed_mlps(first: int) -> Spread:
    """Write the row of what each MLP is: by its word, or mixtures behind so many dense layers, ``first`` where nothing is said."""

    def read(said: tuple[list[str] | None, int | None], config: Config) -> str | None:
        kinds, dense = said
        counted = tuple(int(layer >= (first if dense is None else dense)) for layer in range(number(config, "layers")))
        found = counted if kinds is None else hf.marks_of(kinds, config, MLPS)
        # a class with a field for both writes what the number is where nothing is said
        expect(dense in (None, first) or (dense >= 0 and found == counted), "as many dense layers as are listed")
        return mixtures([bool(mark) for mark in found])

    return Spread("blocks", "mlp_layer_types", (list[str], int), read, _mlps_said, more=("first_k_dense_replace",))


def _mlps_said(config: Config) -> list[tuple[list[str], Value]]:
    """Return the list, and the number where that says the same: transformers reads the one, vLLM the other."""
    found = marks(config)
    dense = len(found) - sum(found)
    return [([MLPS[mark] for mark in found], dense if not any(found[:dense]) else None)]


def _whole_experts(config: Config) -> int:
    """Return the width of as many shared experts as the model's width needs."""
    return round_up(number(config, "shared_ffn"), number(config, "moe_ffn"))


def sizes(shared: str, *experts: str, topk: str = "num_experts_per_tok") -> tuple[Field, ...]:
    """Write the rows of the sizes of a mixture, under a class's own keys for how many experts are shared, are not, are chosen."""
    return (
        place("experts", *experts),
        place("topk", topk),
        place("moe_ffn", "moe_intermediate_size"),
        Spread(
            "shared_ffn",
            shared,
            0,
            lambda count, c: count * number(c, "moe_ffn"),
            lambda c: (number(c, "shared_ffn") // number(c, "moe_ffn") if value(c, "shared_ffn") else 0,),
        ),
    )


SIZES = sizes("n_shared_experts", "n_routed_experts", "num_experts")
ROUTER: tuple[Field, ...] = (
    place("router_groups", "n_group", default=1),
    place("router_group_topk", "topk_group", default=1),
    place("router_scale", "routed_scaling_factor", default=1.0),
    place("router_wide", default=True),
)
DENSE_FIRST = Spread("blocks", "first_k_dense_replace", 0, _after_dense, lambda c: (number(c, "layers") - sum(marks(c)),))
# experts are chosen from some of the groups, which count as their best two; one group is all
GROUPED = place("router_group_best", default=lambda c: 2 if number(c, "router_groups") > 1 else None)
PADS = {"shared_ffn": _whole_experts}
# what is left of training, and what says a width or a number a second time
IGNORED = "aux_loss_alpha seq_aux ep_size qk_head_dim router_aux_loss_coef num_local_experts output_router_logits"
