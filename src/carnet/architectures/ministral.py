"""Ministral 3 and Devstral 2: Mistral whose positions are stretched by YaRN, and whose queries grow with the position.

transformers: modeling_ministral3.py, configuration_ministral3.py; megatron.bridge.models.ministral3.ministral3_provider has the same.
"""

from collections.abc import Iterator
from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, vllm
from carnet.dialects.configs import Place, Spread, place
from carnet.dialects.yarn import YARN
from carnet.model.fields import SET, Config

TOPS = ("rope_parameters", "rope_scaling")


def _said(row: Place | Spread) -> Place | Spread:
    """Return a row of YaRN's as the class has it."""
    if isinstance(row, Place) and row.field == "rope_type":
        return replace(row, default=..., omit=False)  # where nothing is said of positions, transformers has its own numbers
    if not (isinstance(row, Spread) and row.field == "rope_attention" and row.only == YARN):
        return row
    choices = row.choices

    def published(config: Config) -> Iterator[object]:
        """Yield the two words that are one over one first, as the hub has them."""
        yield from ((None, 1.0, 1.0), *choices(config))

    return replace(row, choices=published)


MINISTRAL3 = Family(
    name="ministral3",
    vllm=vllm.LLAMA,
    traits=LLAMA_TRAITS,
    needs={"query_growth": SET},
    hf=hf.dialect(
        "Ministral3ForCausalLM",
        "ministral3",
        hf.LLAMA_ROWS,
        (
            *hf.SIZES,
            place("norm_eps", "rms_norm_eps", default=1e-5),
            place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
            place("rope_theta", *(f"{top}.rope_theta" for top in TOPS), "rope_theta", default=10000.0),
            *map(_said, hf.rope(*TOPS, types=("yarn",))),
            place("query_growth", *(f"{top}.llama_4_scaling_beta" for top in TOPS)),
            # said there, too
            place(
                "positions", *(f"{top}.max_position_embeddings" for top in TOPS), default=lambda c: c["positions"], omit=True
            ),
            place("window", "sliding_window", default=None),
            *(hf.TIED, hf.DTYPE, *hf.TOKENS),
        ),
        written=hf.NO_PADDING,
        absent={"num_key_value_heads": 8, "head_dim": 128},
    ),
    trtllm=None,
)
