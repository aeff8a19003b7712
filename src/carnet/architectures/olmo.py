"""OLMo 2 and 3: Llama that norms what comes out of attention and MLP, not what goes in, and its queries and keys over all heads.

OLMo 3 has a window in three of four layers, whose angles are never stretched. transformers: modeling_olmo2.py, modeling_olmo3.py.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, windows
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import place
from carnet.model.fields import Config

TRAITS: Config = {**LLAMA_TRAITS, "norm_before": False, "norm_after": True, "qk_norm": "whole"}
ROWS = (
    *(hf.EMBED, *hf.ATTENTION, *hf.WHOLE_QK_NORMS),
    *(hf.OUT_NORMS[0], *hf.GATED_MLP, hf.OUT_NORMS[1]),
    *(hf.FINAL_NORM, hf.HEAD),
)


def _fields(*rope: Field) -> tuple[Field, ...]:
    return (
        *hf.SIZES_WITHOUT_HEAD,
        place("norm_eps", "rms_norm_eps", default=1e-5),
        place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
        *(*rope, *hf.ATTENTION_BIASES, hf.TIED, hf.DTYPE, *hf.TOKENS),
    )


OLMO2 = Family(name="olmo2", traits=TRAITS, hf=hf.dialect("Olmo2ForCausalLM", "olmo2", ROWS, _fields(*hf.ROPE)), trtllm=None)

FULL, SLIDING = (f"rope_parameters.{kind}" for kind in hf.LAYER_TYPES)
OLMO3 = Family(
    name="olmo3",
    traits=TRAITS,
    hf=hf.dialect(
        "Olmo3ForCausalLM",
        "olmo3",
        ROWS,
        (
            *_fields(
                # transformers takes rope_theta beside for layers that see all alone
                place("rope_theta", f"{FULL}.rope_theta", "rope_theta", default=500000.0),
                place("rope_local_theta", f"{SLIDING}.rope_theta", default=500000.0),
                *hf.rope(FULL, "rope_scaling"),
            ),
            place("window_every", default=4),
            *windows.STEPPED,
        ),
        guards={f"{SLIDING}.rope_type": ("default",)},
    ),
    trtllm=None,
)
