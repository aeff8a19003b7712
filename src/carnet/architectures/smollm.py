"""SmolLM3: Llama with layers that have no positions, which may have a window instead.

transformers: modeling_smollm3.py.
"""

from collections.abc import Iterator

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, windows
from carnet.dialects.configs import Spread, place
from carnet.dialects.senses import expect
from carnet.model.fields import SET, Config

USE, *KEYS = ("use_sliding_window", "sliding_window", "layer_types")
ABSENT = (False, int, list[str])
Said = tuple[bool, int | None, list[str] | None]


def _windows(said: Said, config: Config) -> windows.Windows:
    """Return which layers have the window: as listed, else those without positions.

    A list without the flag is refused: the masks of the class look at the list alone, flash attention at both.
    """
    use, size, kinds = said
    listed = kinds or [hf.LAYER_TYPES[1 - mark] for mark in hf.rotated_layers(config)]
    expect(not kinds or (use and size) or hf.LAYER_TYPES[1] not in kinds, f"{USE} and {KEYS[0]} where a layer has the window")
    return use, size, 0, listed


def _spelled(config: Config) -> Iterator[tuple[object, ...]]:
    return ((use, size, kinds) for use, size, _, kinds in windows.spelled(config))


SMOLLM3 = Family(
    name="smollm3",
    traits=LLAMA_TRAITS,
    hf=hf.dialect(
        "SmolLM3ForCausalLM",
        "smollm3",
        hf.LLAMA_ROWS,
        (
            *hf.LLAMA_FIELDS,
            *hf.ATTENTION_BIASES,
            place("mlp_bias", "mlp_bias", default=False),
            hf.ROPE_LAYERS,
            Spread("window", USE, ABSENT, lambda said, c: windows.window(_windows(said, c), c), _spelled, more=(*KEYS,)),
            Spread(
                *("window_layers", USE, ABSENT, lambda said, c: windows.window_layers(_windows(said, c), c), _spelled),
                {"window": SET},
                (*KEYS,),
            ),
            hf.TIED,
        ),
        absent={"num_key_value_heads": 4, "rope_theta": 2000000.0, "tie_word_embeddings": True},
        written=hf.NO_PADDING,
        ignored="max_window_layers",
    ),
    trtllm=None,
)
