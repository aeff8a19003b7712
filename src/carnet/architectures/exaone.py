"""EXAONE 4: norms behind the attention and the MLP alone, queries and keys normed, positions where the window is.

transformers: modeling_exaone4.py.
"""

from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, vllm, windows
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER_TYPES
from carnet.model.fields import SET, Config, Value
from carnet.model.model import number, value

WINDOWED = {"window": SET}


def _spelled(config: Config) -> list[tuple[Value, list[str]]]:
    """Return the window and which layers have it: transformers wants the list where none has one, too."""
    listed = windows.listed(config) or [[LAYER_TYPES[0]] * number(config, "layers")]
    return [(value(config, "window"), listed[0])]


EXAONE4 = Family(
    name="exaone4",
    vllm=vllm.LLAMA,
    traits={**LLAMA_TRAITS, "norm_before": False, "norm_after": True, "qk_norm": "head"},
    hf=hf.dialect(
        "Exaone4ForCausalLM",
        "exaone4",
        (hf.EMBED, *hf.ATTENTION, *hf.QK_NORMS, *hf.OUT_NORMS, *hf.GATED_MLP, hf.FINAL_NORM, hf.HEAD),
        (
            *(*hf.LLAMA_FIELDS, hf.TIED),
            Spread("window", "sliding_window", (int, list[str]), lambda said, _: said[0], _spelled, more=("layer_types",)),
            place("window_every", default=4, only=WINDOWED),
            *(replace(field, only=WINDOWED) for field in (windows.STEPPED[1], windows.ROTATED)),
        ),
        absent={"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096},
        guards={"sliding_window_pattern": (0, 4, "LLLG")},
    ),
    trtllm=None,
)
