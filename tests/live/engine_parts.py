"""What the ranks of an engine have under Hugging Face's names, cut by hand; nothing here knows what carnet says of it.

How engines share layers: vllm/model_executor/layers/linear.py QKVParallelLinear, MergedColumnParallelLinear and RowParallelLinear.
"""

import re

import numpy as np

from carnet.model.model import layers, number, value
from tests.families.samples import TYPES

# which dimension of a projection ranks share; its rows may be several parts one after the other, each of which is shared
ROWS = (
    r"(q_proj|q_b_proj|kv_b_proj|gate_proj|up_proj|w1|w3|linear_attn|linear_mlp|in_proj_qkvz|in_proj_ba|dense_h_to_4h|c_fc)"
    r"\.(weight|bias)"
)
HEADS = r"(k_proj|v_proj)\.(weight|bias)"  # repeated where there are more ranks
COLUMNS = r"(o_proj|down_proj|w2|dense|dense_4h_to_h|out_proj|c_proj)\.weight"
PARTS = r"(qkv_proj|gate_up_proj|in_proj|conv1d|c_attn|model\.layers\.\d+\.attention\.query_key_value)\.(weight|bias)"
GPT2 = re.compile(r"(transformer\.)?h\.\d+\.(attn|mlp)\.c_")  # inputs before outputs
GROUPS = r"query_key_value\.(weight|bias)"
VOCABULARY = r"(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|embeddings?|shared_head\.head)\.weight"
STATES = r"(mixer\.(dt_bias|A_log|D|norm\.weight)|linear_attn\.(dt_bias|A_log))"
FIRST = r"(embed_tokens|wte|wpe|word_embeddings|embed_in|embeddings?)\.weight"


def parts_of(whole, model, grid):
    """Yield what each rank of a shared target holds."""
    tp, pp, ep, count = grid["tp"], grid["pp"], grid["ep"], number(model.config, "layers")
    for at, rank in enumerate(grid["ranks"]):
        stage, place = divmod(at, tp)
        each, more = divmod(count, pp)
        start = stage * each + min(stage, more)
        span = range(start, start + each + (stage < more))
        held = {}
        for name, (dtype, shape, data) in whole.items():
            numbered = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
            layer = int(numbered[1]) if numbered else None
            last = stage == pp - 1
            if layer is None:
                embeds = re.search(FIRST + "$", name) is not None
                here = (stage == 0 or (last and value(model.config, "tied") and "wpe" not in name)) if embeds else last
            else:
                here = layer in span or (last and layer >= count)
            expert = re.search(r"\.experts\.(\d+)\.", name)
            if not here or (expert and not belongs(int(expert[1]), model, ep, place)):
                continue
            head = re.search(r"\.([qk])_layernorm\.norms\.(\d+)\.", name)
            if head and int(head[2]) not in of_rank(head[1], model.config, tp, place):
                continue
            array = np.frombuffer(data, dict(TYPES.values())[dtype]).reshape(shape)
            experts = expert is not None or ".experts." in name
            world, share = (tp // ep, place // ep) if experts else (tp, place)
            if experts and expert is None:
                array = np.split(array, ep)[place % ep]
            kind = layers(model.config)[min(layer, count - 1)] if layer is not None else model.config
            found = part_of(name, array, kind, world, share)
            held[name] = dtype, found.shape, np.ascontiguousarray(found).tobytes()
        yield rank, held


def of_rank(part, config, world, at):
    """Return the numbers of the heads that a rank has."""
    kv = number(config, "kv_heads")
    return heads(np.arange(kv), kv, world, at) if part == "k" else np.split(np.arange(number(config, "heads")), world)[at]


def belongs(expert, model, ep, place):
    each = number(model.config, "experts") // ep
    return expert // each == place % ep


def part_of(name, array, layer, world, at):
    """Return a rank's part of a tensor of Hugging Face's."""

    def ends(pattern):
        return re.search(rf"(^|\.){pattern}$", name) is not None

    kv, dim = (number(layer, field) if field in layer else 1 for field in ("kv_heads", "head_dim"))
    if ends(VOCABULARY):
        more = -len(array) % world
        return np.split(np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)]), world)[at]
    if name.endswith("feed_forward.experts.gate_up_proj"):
        return np.concatenate([np.split(half, world, 2)[at] for half in np.split(array, 2, 2)], 2)
    if name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias")):
        interleaved = array.reshape(*array.shape[:-1], -1, 2)
        return np.split(interleaved, world, -2)[at].reshape(*array.shape[:-1], -1)
    if name.endswith("experts.down_proj"):
        return np.split(array, world, 1)[at]
    if ends(r"[qk]_norm\.weight") and array.shape != (
        dim,
    ):  # over all heads: a rank norms its own, as vLLM does for MiniMax-M2
        return np.split(array, world)[at] if ends(r"q_norm\.weight") else heads(array, kv, world, at)
    if ends(HEADS):
        return heads(array, kv, world, at)
    if ends(GROUPS) and not ends(PARTS):  # of Ling 2 they are parts, one after the other
        q, k, v = groups(array, kv, dim)
        q, k, v = heads(q, len(q) // dim, world, at), heads(k, kv, world, at), heads(v, kv, world, at)
        kv = max(1, kv // world)
        return np.concatenate([part.reshape(kv, -1, *array.shape[1:]) for part in (q, k, v)], 1).reshape(-1, *array.shape[1:])
    if ends(PARTS):
        turned = name.endswith("c_attn.weight")
        array = array.T if turned else array
        pieces = [heads(piece, many, world, at) for piece, many in fused(name, array, layer)]
        return np.concatenate(pieces).T if turned else np.concatenate(pieces)
    if ends(ROWS) or ends(STATES) or name.endswith("self_attn.sinks"):
        turned = GPT2.match(name) and "c_fc.weight" in name
        return np.split(array, world, 1 if turned else 0)[at]
    if ends(COLUMNS):
        return np.split(array, world, 0 if GPT2.match(name) else 1)[at]
    return array


def heads(array, count, world, at):
    """Return a rank's rows of so many heads: some, or one that others have too."""
    return np.split(array, world)[at] if count % world == 0 else np.split(array, count)[at * count // world]


def groups(array, kv, dim):
    """Take rows apart that are grouped by key: queries, keys, values."""
    each = array.reshape(kv, -1, dim, *array.shape[1:])
    return (part.reshape(-1, *array.shape[1:]) for part in (each[:, :-2], each[:, -2], each[:, -1]))


def fused(name, array, layer):
    """Yield the parts of rows that are joined, and how many heads each has."""
    if "gate_up" in name:
        return [(half, len(half)) for half in np.split(array, 2)]
    size = {field: number(layer, field) for field in ("heads", "kv_heads", "head_dim") if field in layer}
    if re.search("qkv_proj|c_attn|query_key_value", name):
        many = [size["heads"], size["kv_heads"], size["kv_heads"]]
        rows = [count * size["head_dim"] for count in many]
    elif layer["mixer"] == "gdn":
        count, values = number(layer, "gdn_keys"), number(layer, "gdn_values")
        keys = count * number(layer, "gdn_key_dim")
        rows, many = [keys, keys, values * number(layer, "gdn_value_dim")], [count] * 3
    else:
        inner, state = number(layer, "ssm_heads") * number(layer, "ssm_head_dim"), number(layer, "ssm_state")
        count = number(layer, "ssm_groups")
        rows = [inner, inner, count * state, count * state, number(layer, "ssm_heads")]
        rows = rows[1:4] if "conv1d" in name else rows
        many = [count] * len(rows)
    return zip(np.split(array, np.cumsum(rows)[:-1]), many, strict=True)
