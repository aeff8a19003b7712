"""Tensors that no row names: what they look like, and what can be done about them that is true."""

import re
from collections.abc import Collection, Sequence
from glob import escape
from itertools import takewhile

OTHER_CLASS = "look whether the config is that of these weights: a model of its class has no such tensor"
INSIDE = (
    r"^(?>model\.)?language_model\.",
    "the text model inside one that also sees or hears",
    "save the text model alone with transformers: model.language_model.save_pretrained(OUT)",
)
# what such a tensor may be, and the way out; the model computes with most of these, so that they cannot be left behind
STRANGERS = (
    # they guess tokens, and the model computes without: modelopt/torch/speculative/plugins/megatron_medusa.py
    (
        r"(?:^|\.)medusa_heads\.",
        "heads of Medusa for speculative decoding",
        "--drop '*medusa_heads.*' takes the model without them",
    ),
    INSIDE,
    (r"lora_|\.adapter\.|^(?>.*?adapter).*\.linear_|ia3_", "an adapter", "merge the adapter into the weights first"),
    (r"qkv|query_key_value|gate_up|c_attn|kqv", "a joined projection", OTHER_CLASS),
    (r"experts|router", "a part of a mixture", OTHER_CLASS),
    (r"norm|\.ln_|_ln\.", "a norm", OTHER_CLASS),
    (r"[._]bias$", "a bias", OTHER_CLASS),
)
WEAK = ("a norm", "a bias")  # most models have some: all that is unknown must look so


def way_out(unknown: Sequence[str], known: Collection[str], *, whole: bool) -> tuple[str, str]:
    """Return what unknown tensors look like ("" for nothing known) and what to do; ``whole``: the model is complete without them.

    >>> way_out(["visual.blocks.0.w", "visual.blocks.1.w"], {"norm.weight"}, whole=True)
    ('', "--drop 'visual.blocks.*' if it may be left behind")
    >>> way_out(["a[0]", "a[1]"], {"norm.weight"}, whole=True)[1].split()[1]
    "'a[[]*'"
    >>> way_out(["model.language_model.lora_A"], {"model.language_model.norm.weight"}, whole=True)[0]
    'an adapter'
    >>> way_out(["layers.0.self_attn.q_norm.weight"], {"norm.weight"}, whole=True)[0]
    'a norm'
    >>> way_out(["medusa_heads.0.lm_head.weight"], {"norm.weight"}, whole=True)[1]
    "--drop '*medusa_heads.*' takes the model without them"
    """
    names = "\n".join(unknown).lower()  # a search of one text takes a tenth of the time of one a name
    for looks_so, looks, remedy in STRANGERS:
        if not re.search(looks_so, names, re.MULTILINE) or (
            looks == INSIDE[1] and any(re.match(looks_so, name) for name in known)
        ):
            continue
        if looks not in WEAK or not re.search(rf"^(?!.*(?:{looks_so})).+$", names, re.MULTILINE):
            return looks, remedy
    return "", f"--drop '{_covering(unknown, known)}' if it may be left behind" if whole else OTHER_CLASS


def _covering(unknown: Sequence[str], known: Collection[str]) -> str:
    """Return a pattern for all of these names and for none that is known; the first alone where there is no such pattern."""
    pairs = takewhile(lambda both: both[0] == both[1], zip(min(unknown), max(unknown), strict=False))
    begin = "".join(one for one, _ in pairs)
    alone = len(unknown) == 1 or any(name.startswith(begin) for name in known)
    return escape(min(unknown)) if alone else escape(begin) + "*"
