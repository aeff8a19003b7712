"""The true widths and depth of a pruned model, whose saved arguments are still those of the model that it was cut from.

Minitron pruning changes a model and its config, and Megatron-LM saves the arguments that it was started with. Among them is what the
person asked for (``target_*``, ``layers_to_drop``: examples/post_training/modelopt/prune.py, which takes ModelOpt's own record away).
Elsewhere the shapes tell, where ModelOpt's state or a person says that there was pruning: without that, another shape is damage.

Nothing here makes a checkpoint fit: every tensor is held to the arguments that come out of this as to any others.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping

from carnet.dialects.megatron.releases import Arguments

PRUNED = "pruned"  # the word of --accept
LAYERS, DROPPED = "num_layers", "layers_to_drop"
PATTERNS = ("hybrid_override_pattern", "hybrid_layer_pattern")
MOST = 10_000  # layers: no more are looked for
BEFORE = r"(?:model\.|module\.)*(?:language_model\.)?"  # the text model's, not those of a tower
INSIDE = re.compile(BEFORE + r"decoder\.layers\.(?:(\d{1,6})\.)?(.+)")  # without a number all layers are in one tensor
EMBEDDING = re.compile(BEFORE + r"embedding\.word_embeddings\.weight")
MIXER, PROJ, QKV, DENSE, ROUTER = (
    "mixer.A_log",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc2.weight",
    "mlp.router.weight",
)
OUT, SHARED = "mixer.out_proj.weight", "mlp.shared_experts.linear_fc2.weight"
SHARES = {
    PROJ: -1,
    QKV: -2,
    DENSE: -1,
    SHARED: -1,
    MIXER: -1,
    OUT: -1,
}  # the dimension of which every tensor-parallel rank has a part
LETTERS = {MIXER: "M", PROJ: "*", DENSE: "-", ROUTER: "E"}  # what tells what a layer of a hybrid is
Shapes = Mapping[str, tuple[int, ...]]  # what all layers agree on, by the name within a layer


def _whole(length: int, size: object) -> int:
    """Return how often a size goes into a length; raise KeyError where that is no whole number."""
    if type(size) is not int or size < 1 or length % size:
        raise KeyError
    return length // size


def _heads(shapes: Shapes, own: Arguments) -> int:
    return _whole(shapes[PROJ][-1], own.get("v_head_dim" if own.get("multi_latent_attention") else "kv_channels"))


def _groups(shapes: Shapes, own: Arguments) -> int:
    """Return how many heads of keys there are: for them are the rows of a QKV projection that no query (or its gate) has."""
    queries = _heads(shapes, own) * (2 if own.get("attention_output_gate") else 1)
    return _whole(_whole(shapes[QKV][-2], own.get("kv_channels")) - queries, 2 if own.get("group_query_attention") else 0)


# What an argument is by the shapes; LookupError where they do not tell. modelopt/torch/prune/plugins/mcore_minitron.py 0.47
# SUPPORTED_HPARAMS; before 0.41 the heads of keys, too. The width of a head of attention stays.
WIDTHS: Mapping[str, Callable[[Shapes, Arguments], int]] = {
    "hidden_size": lambda shapes, _: shapes["embedding"][-1],
    "ffn_hidden_size": lambda shapes, _: shapes[DENSE][-1],
    "moe_ffn_hidden_size": lambda shapes, _: shapes["mlp.experts.experts.linear_fc2.weight"][-1],
    "moe_shared_expert_intermediate_size": lambda shapes, _: shapes[SHARED][-1],
    "num_moe_experts": lambda shapes, _: shapes[ROUTER][-2],
    "mamba_num_heads": lambda shapes, _: shapes[MIXER][-1],
    "mamba_head_dim": lambda shapes, _: _whole(shapes[OUT][-1], shapes[MIXER][-1]),
    "num_attention_heads": _heads,
    "num_query_groups": _groups,
}
ALIKE = {"num_moe_experts": "num_experts"}  # Megatron-LM's name
# What Megatron takes of the old widths for an argument that is not set, where any of these is said: it must not shrink with those.
UNSET: Mapping[str, tuple[tuple[str, ...], Callable[[Mapping[str, int]], int]]] = {
    "kv_channels": (("num_attention_heads",), lambda own: own["hidden_size"] // own["num_attention_heads"]),
    "ffn_hidden_size": (("hidden_size",), lambda own: 4 * own["hidden_size"]),
    "moe_ffn_hidden_size": (("num_experts", "num_moe_experts"), lambda own: own.get("ffn_hidden_size", 0)),
    "mamba_num_heads": (("is_hybrid_model", *PATTERNS), lambda own: 2 * own["hidden_size"] // own.get("mamba_head_dim", 64)),
}


def true_arguments(own: Arguments, stored: Shapes, *, told: bool) -> tuple[Arguments, str]:
    """Return the arguments of a pruned model with its true widths and depth, and in words what the others said.

    ``stored`` are the whole shapes of all tensors; ``told`` says that there was pruning, so that shapes tell what no argument asks for.
    """
    wanted = _asked(own)
    if not (wanted or told):
        return own, ""
    full = {**own, **_unset(own)}
    shapes, layers = _within(stored)
    new: dict[str, int] = {}
    for name, tell in {**WIDTHS, LAYERS: lambda *_: len(layers)}.items():
        try:
            found = tell(shapes, full | new)
        except LookupError:
            found = 0
        spelled = name if full.get(name) is not None else ALIKE.get(name, name)
        old, size = full.get(spelled), wanted.get(name, found if told else 0)
        # narrower than it was, and not asked for in vain: ModelOpt since 0.41 leaves the heads of keys as they are
        if type(old) is int and 0 < size < old and found != old:
            new[spelled] = size
    said = {key: f"{full[key]} -> {size}" for key, size in new.items()}
    kinds = _kinds(full, layers) if new.get(LAYERS) == len(layers) else {}
    said |= {key: f"{full[key]} -> {each}" for key, each in kinds.items()}
    return ({**full, **new, **kinds}, ", ".join(f"{key} {each}" for key, each in said.items())) if new else (own, "")


def of_ranks(stored: Mapping[tuple[str, str], tuple[int, ...]]) -> Shapes:
    """Return the whole shapes of what ranks have parts of, as far as they tell of widths, by names as of one model.

    >>> of_ranks({(f"tp{t}-pp{p}-ep0-vp0", f"decoder.layers.0.{DENSE}"): (8, 5) for t in (0, 1) for p in (0, 1)})
    {'decoder.layers.0.mlp.linear_fc2.weight': (8, 10), 'decoder.layers.1.mlp.linear_fc2.weight': (8, 10)}
    """
    held: dict[tuple[int, int], dict[str, list[tuple[int, ...]]]] = defaultdict(lambda: defaultdict(list))
    for (unit, name), shape in sorted(stored.items()):
        _, stage, expert, virtual = map(int, re.findall(r"\d+", unit))
        if not expert:  # the others have the same of what is told by
            held[virtual, stage][name].append(shape)
    found: dict[str, tuple[int, ...]] = {}
    base = 0
    for place in sorted(held):
        numbers = {int(inside[1]) for name in held[place] if (inside := INSIDE.fullmatch(name)) and inside[1]}
        for name, (first, *others) in held[place].items():
            inside = INSIDE.fullmatch(name)
            whole = [*first]
            if inside and inside[2] in SHARES:
                whole[SHARES[inside[2]]] *= 1 + len(others)
            found[name if inside is None else f"decoder.layers.{base + int(inside[1] or 0)}.{inside[2]}"] = tuple(whole)
        base += len(numbers)
    return found


def _asked(own: Arguments) -> dict[str, int]:
    """Return what the arguments of prune.py say that a model is to become."""
    found = {name: size for name in (*WIDTHS, LAYERS) if type(size := own.get(f"target_{name}")) is int}
    dropped, layers = own.get(DROPPED), own.get(LAYERS)
    if isinstance(dropped, (list, tuple)) and dropped and type(layers) is int:
        found[LAYERS] = layers - len({at for at in dropped if type(at) is int})
    return found


def _unset(own: Arguments) -> dict[str, int]:
    """Return what Megatron takes of the old widths for arguments that are not set."""
    sizes = {key: size for key, size in own.items() if type(size) is int and size > 0}
    found: dict[str, int] = {}
    for name, (kind, default) in UNSET.items():
        if own.get(name) is None and any(map(own.get, kind)) and sizes.keys() >= {"hidden_size", "num_attention_heads"}:
            found[name] = sizes[name] = default(sizes)
    return found


def _within(stored: Shapes) -> tuple[Shapes, list[set[str]]]:
    """Return the shapes that all layers agree on, by the names within a layer, and which names each layer has."""
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    layers: dict[int, set[str]] = defaultdict(set)
    for name, shape in stored.items():
        inside = INSIDE.fullmatch(name)
        if inside is not None and len(shape) > (inside[1] is None):
            found[inside[2]].add(shape if inside[1] else shape[1:])
            for layer in [int(inside[1])] if inside[1] else range(min(shape[0], MOST)):
                layers[layer].add(inside[2])
        elif EMBEDDING.fullmatch(name):
            found["embedding"].add(shape)
    agreed = {name: each for name, shapes in found.items() if len(shapes) == 1 for each in shapes}
    return agreed, [layers[layer] for layer in sorted(layers)]


def _kinds(own: Arguments, layers: list[set[str]]) -> dict[str, object]:
    """Return the arguments that say of each layer what it is, as those say that are left."""
    found: dict[str, object] = {}
    if isinstance(own.get("moe_layer_freq"), (list, tuple)):
        found["moe_layer_freq"] = [int(ROUTER in names) for names in layers]
    letters = "".join(letter for names in layers for tensor, letter in LETTERS.items() if tensor in names)
    for key in PATTERNS:
        pattern = own.get(key)
        if isinstance(pattern, str) and {*pattern} <= {*LETTERS.values()} and len(letters) == len(layers):
            found[key] = letters
    return found
