"""The state that each rank of Megatron has of any model, cut by hand; nothing here knows what carnet says of Megatron.

How Megatron shares a model: megatron/core/tensor_parallel/layers.py, megatron/core/transformer/{attention,mlp,multi_latent_attention,
multi_token_prediction}.py, megatron/core/transformer/moe/experts.py, megatron/core/ssm/{mamba_mixer,gated_delta_net}.py,
megatron/core/parallel_state.py.
"""

import io
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from carnet import live
from carnet.errors import CarnetError
from carnet.live import Grid
from tests.live.jobs import parts


@dataclass(frozen=True)
class Place:
    """What one chunk of one rank holds."""

    tp: tuple[int, int]  # which of how many
    ep: tuple[int, int]
    etp: tuple[int, int]
    layers: range  # global numbers
    further: int  # layers that predict further tokens
    first: bool
    last: bool


def places(grid, model, rank):
    """Return the places of a rank's chunks, as megatron/core/parallel_state.py numbers ranks; none for a rank that has no part."""
    ranks = grid.get("ranks", range(4))
    tp, pp, cp, ep, vp = (grid.get(name, 1) for name in ("tp", "pp", "cp", "ep", "vp"))
    etp = grid.get("etp") or tp
    if rank not in ranks:
        return []
    at = list(ranks).index(rank)
    stage = (at // (tp * cp)) % pp if grid.get("order", "").endswith("pp-dp") else at // (len(ranks) // pp)
    count = model["layers"]
    sizes = grid.get("layers") or [[count // (pp * vp)] * vp] * pp
    found = []
    for chunk in range(vp):
        start = sum(sizes[s][c] for c in range(vp) for s in range(pp) if (c, s) < (chunk, stage))
        first, last = (chunk, stage) == (0, 0), (chunk, stage) == (vp - 1, pp - 1)
        span = range(start, start + sizes[stage][chunk])
        further = model["mtp"] if last else 0
        found.append(Place((at % tp, tp), (at // etp % ep, ep), (at % etp, etp), span, further, first, last))
    return found


def share(tensor, place, dim=0):
    at, world = place
    size, rest = divmod(tensor.shape[dim], world)
    assert not rest
    return tensor.narrow(dim, at * size, size)


def state(weights, model, place, spelling):
    """Return the state dict of one chunk; ``spelling``: norms (te, local), experts (alone, grouped, joined), prefix, further."""
    found = {}
    if place.first or place.further:
        found["embedding.word_embeddings.weight"] = vocabulary(weights["embed"], model, place)
        if "position" in weights:
            found["embedding.position_embeddings.weight"] = weights["position"]
    for number, layer in enumerate([*place.layers, *range(model["layers"], model["layers"] + place.further)]):
        own = {name.split(".", 2)[2]: tensor for name, tensor in weights.items() if name.startswith(f"layers.{layer}.")}
        if layer < model["layers"]:
            found |= {f"decoder.layers.{number}.{name}": tensor for name, tensor in block(own, place, spelling).items()}
            continue
        before = f"mtp.layers.{layer - model['layers']}."
        found |= {f"{before}{spelling['further']}.{name}": tensor for name, tensor in block(own, place, spelling).items()}
        found[f"{before}enorm.weight"] = own["mtp.embed_norm"]
        found[f"{before}hnorm.weight"] = own["mtp.hidden_norm"]
        found[f"{before}eh_proj.weight"] = share(torch.cat([own["mtp.project_embed"], own["mtp.project_hidden"]], 1), place.tp)
        found[f"{before}final_layernorm.weight"] = own["mtp.final_norm"]
    if place.last:
        norm = "decoder.final_norm" if model["hybrid"] else "decoder.final_layernorm"
        found[f"{norm}.weight"] = weights["final_norm"]
        if "final_norm_bias" in weights:
            found[f"{norm}.bias"] = weights["final_norm_bias"]
        if "head" in weights:
            found["output_layer.weight"] = vocabulary(weights["head"], model, place)
        elif not place.first:
            found["output_layer.weight"] = vocabulary(weights["embed"], model, place)
    return {spelling["prefix"] + name: tensor.clone() for name, tensor in found.items()}


def vocabulary(rows, model, place):
    padding = torch.full((model["padded"] - len(rows), rows.shape[1]), model["padding"], dtype=rows.dtype)
    return share(torch.cat([rows, padding]), place.tp)


def block(own, place, spelling):
    """Return what a layer holds, under the names inside it."""
    found = {}
    local, tp = spelling["norms"] == "local", place.tp
    if "attention.q" in own:
        norm = "input_layernorm." if local else "self_attention.linear_qkv.layer_norm_"
        found["self_attention.linear_qkv.weight"] = qkv(own, "", tp)
        found["self_attention.linear_proj.weight"] = share(own["attention.o"], tp, 1).flatten(1)
    elif "mla.o" in own:
        norm = "input_layernorm."
        found |= latent(own, place, local)
    elif "gdn.z" in own:
        norm = "input_layernorm." if local else "self_attention.in_proj.layer_norm_"
        found |= delta_net(own, tp)
    elif "mamba.z" in own:
        norm = "norm." if local else "mixer.in_proj.layer_norm_"
        found |= mamba(own, tp)
    else:
        norm = "input_layernorm." if local else "self_attention.layer_norm_"
    if "linear_mixer" in own:
        found["self_attention.weight"] = share(own["linear_mixer"], tp)
    found |= named(own, {norm + "weight": "attention_norm", norm + "bias": "attention_norm_bias"})
    if "attention.q_bias" in own:
        found["self_attention.linear_qkv.bias"] = qkv(own, "_bias", tp)
    if "attention.sinks" in own:
        found["self_attention.core_attention.softmax_offset"] = share(own["attention.sinks"], tp).flatten()
    found |= named(own, {"self_attention.linear_proj.bias": "attention.o_bias"})
    found |= named(own, {f"self_attention.{part}_layernorm.weight": f"attention.{part}_norm" for part in "qk"})
    norms = {f"attention.{part}_{kind}_norm": part for part in "qk" for kind in ("whole", "heads")}
    whole = {part: own[name] for name, part in norms.items() if name in own}
    found |= {f"self_attention.{part}_layernorm.weight": share(norm, tp).flatten() for part, norm in whole.items()}
    found |= named(own, {"self_attention.linear_proj.post_layernorm.weight": "attention_out_norm"})
    found |= named(own, {"mlp.linear_fc2.post_layernorm.weight": "mlp_out_norm"})
    norm = "pre_mlp_layernorm." if local or "moe.up" in own else "mlp.linear_fc1.layer_norm_"
    if "linear_mlp" in own:
        found["mlp.weight"] = share(own["linear_mlp"], tp)
        norm = "pre_mlp_layernorm." if local else "mlp.layer_norm_"
    found |= named(own, {norm + "weight": "mlp_norm", norm + "bias": "mlp_norm_bias"})
    if "mlp.up" in own:
        found["mlp.linear_fc1.weight"] = halves(own, "mlp.", "", tp)
        found["mlp.linear_fc2.weight"] = share(own["mlp.down"], tp, 1)
    if "mlp.up_bias" in own:
        found["mlp.linear_fc1.bias"] = halves(own, "mlp.", "_bias", tp)
        found["mlp.linear_fc2.bias"] = own["mlp.down_bias"]
    return found | (mixture(own, place, spelling["experts"]) if "moe.up" in own else {})


def named(own, names):
    return {name: own[tensor] for name, tensor in names.items() if tensor in own}


def qkv(own, end, tp):
    """Join what the heads of each group have: its queries, their gates where there are any, its key, its value."""
    names = (f"attention.{part}{end}" for part in ("q", "gate", "k", "v"))
    parts = [share(own[name], tp) for name in names if name in own]
    dim = own[f"attention.k{end}"].shape[1:]
    return torch.cat([part[group].reshape(-1, *dim[1:]) for group in range(len(parts[0])) for part in parts])


def halves(own, kind, end, place):
    """Join a rank's rows of the gate, where there is one, and of the up projection."""
    names = [f"{kind}gate{end}", f"{kind}up{end}"]
    return torch.cat([share(own[name], place) for name in names if name in own])


def latent(own, place, local):
    found = {
        "self_attention.linear_kv_down_proj.weight": torch.cat([own["mla.kv_a"], own["mla.k_rope"]]),
        "self_attention.linear_proj.weight": share(own["mla.o"], place.tp, 1).flatten(1),
    }
    keys, values = share(own["mla.k_b"], place.tp), share(own["mla.v_b"], place.tp)
    up = [part for head in range(len(keys)) for part in (keys[head], values[head])]
    found["self_attention.linear_kv_up_proj.weight"] = torch.cat(up)
    norms = ("self_attention.{}_layernorm.weight", "self_attention.linear_{}_up_proj.layer_norm_weight")[not local]
    found[norms.format("kv")] = own["mla.kv_a_norm"]
    if "mla.q" in own:
        return found | {"self_attention.linear_q_proj.weight": share(own["mla.q"], place.tp).flatten(0, 1)}
    found["self_attention.linear_q_down_proj.weight"] = own["mla.q_a"]
    found["self_attention.linear_q_up_proj.weight"] = share(own["mla.q_b"], place.tp).flatten(0, 1)
    return found | {norms.format("q"): own["mla.q_a_norm"]}


def delta_net(own, tp):
    hidden = own["gdn.o"].shape[0]
    part = {
        name: share(tensor, tp) for name, tensor in own.items() if name.startswith("gdn.") and name[4:] not in {"o", "out_norm"}
    }
    found = {
        "in_proj.weight": torch.cat([part[f"gdn.{name}"].reshape(-1, hidden) for name in "qkvzba"]),
        "conv1d.weight": torch.cat([part[f"gdn.conv_{name}"].flatten(0, -2) for name in "qkv"]).unsqueeze(1),
        "dt_bias": part["gdn.dt_bias"].flatten(),
        "A_log": part["gdn.a_log"].flatten(),
        "out_norm.weight": own["gdn.out_norm"],
        "out_proj.weight": share(own["gdn.o"], tp, 1).flatten(1),
    }
    return {f"self_attention.{name}": tensor for name, tensor in found.items()}


def mamba(own, tp):
    hidden = own["mamba.o"].shape[0]
    part = {name: share(tensor, tp) for name, tensor in own.items() if name.startswith("mamba.") and name != "mamba.o"}
    found = {
        "in_proj.weight": torch.cat([part[f"mamba.{name}"].reshape(-1, hidden) for name in ("z", "x", "b", "c", "dt")]),
        "conv1d.weight": torch.cat([part[f"mamba.conv_{name}"].flatten(0, -2) for name in "xbc"]).unsqueeze(1),
        "dt_bias": part["mamba.dt_bias"].flatten(),
        "A_log": part["mamba.a_log"].flatten(),
        "D": part["mamba.d"].flatten(),
        "norm.weight": part["mamba.gated_norm"].flatten(),
        "out_proj.weight": share(own["mamba.o"], tp, 1).flatten(1),
    }
    if "mamba.conv_x_bias" in own:
        found["conv1d.bias"] = torch.cat([part[f"mamba.conv_{name}_bias"].flatten() for name in "xbc"])
    return {f"mixer.{name}": tensor for name, tensor in found.items()}


def mixture(own, place, spelling):
    found = named(own, {"mlp.router.weight": "moe.router", "mlp.router.bias": "moe.router_shift"})
    found |= named(own, {"mlp.router.expert_bias": "moe.router_bias", "mlp.shared_experts.gate_weight": "shared.weigh"})
    found |= named(own, {"mlp.fc1_latent_proj.weight": "moe.latent_in", "mlp.fc2_latent_proj.weight": "moe.latent_out"})
    if "shared.weigh" in own:
        found["mlp.shared_experts.gate_weight"] = own["shared.weigh"].unsqueeze(0)
    if "shared.up" in own:
        found["mlp.shared_experts.linear_fc1.weight"] = halves(own, "shared.", "", place.tp)
        found["mlp.shared_experts.linear_fc2.weight"] = share(own["shared.down"], place.tp, 1)
    of_all = ("moe.router", "moe.latent")
    held = {name: share(own[name], place.ep) for name in own if name.startswith("moe.") and not name.startswith(of_all)}
    each = [{name: tensor[at] for name, tensor in held.items()} for at in range(len(held["moe.up"]))]
    first = [halves(expert, "moe.", "", place.etp) for expert in each]
    second = [share(expert["moe.down"], place.etp, 1) for expert in each]
    if spelling == "joined" and "moe.up_bias" not in own:
        found["mlp.experts.weight1"] = torch.stack([tensor.T for tensor in first]).reshape(own["moe.up"].shape[2], -1)
        found["mlp.experts.weight2"] = torch.stack([tensor.T for tensor in second]).flatten(0, 1)
        return found
    for at, expert in enumerate(each):
        alone = spelling == "alone"
        spelled = "mlp.experts.local_experts.{at}.{linear}.{what}" if alone else "mlp.experts.{linear}.{what}{at}"
        found[spelled.format(at=at, linear="linear_fc1", what="weight")] = first[at]
        found[spelled.format(at=at, linear="linear_fc2", what="weight")] = second[at]
        if "moe.up_bias" in own:
            found[spelled.format(at=at, linear="linear_fc1", what="bias")] = halves(expert, "moe.", "_bias", place.etp)
            found[spelled.format(at=at, linear="linear_fc2", what="bias")] = expert["moe.down_bias"]
    return found


# --- jobs ----------------------------------------------------------------------------------------------------------------------

STATES = (None, io.BytesIO(), torch.zeros(0, dtype=torch.uint8))


def states(weights, model, grid, spelling):
    """Return what a rank hands over: a state for each chunk, None where it has none."""
    found = [state(weights, model, place, spelling) for place in places(grid, model, dist.get_rank())]
    for number, held in enumerate(found):
        for name in list(held)[:: spelling["odd"]]:
            tensor = held[name]
            if spelling["strided"] and tensor.dim() == 2 and "experts.weight" not in name:
                held[name] = tensor.T.contiguous().T
            if name.endswith("weight") and "norm" not in name:
                held[name.removesuffix("weight") + "_extra_state"] = STATES[(number + len(name)) % 3]
    return (found[0] if len(found) == 1 else found) if found else None


def cross_families(weights, cases):
    """Let models cross, and return for each case what arrived; of modules only the names of what is not as it should be."""
    made = [{name: tensor_of(*part) for name, part in held.items()} for held in weights]
    return [cross_one(made[case["weights"]], case) for case in cases]


def tensor_of(dtype, shape, data):
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)


def cross_one(weights, case):
    given = states(weights, case["model"], case["source"], case["spelling"])
    try:
        with live.plan(
            case["config"],
            source=Grid(**case["source"]),
            target=Grid(**case["target"]),
            to=case["to"],
            timeout=20,
            **case["options"],
        ) as made:
            if case["to"] != "megatron":
                if case["stream"]:
                    return parts(dict(made.stream(given)))
                arrived = parts(made.run(given))
                made.check()
                return arrived
            model = case["model"] | {"padded": case["options"]["target_padded_vocab_size"], "padding": 0}
            wanted, got = (states(weights, model, case["target"], case["into"]) for _ in range(2))
            for chunk in chunks(got):
                for tensor in chunk.values():
                    if isinstance(tensor, torch.Tensor) and tensor.numel():
                        tensor.fill_(77)
            made.run(given, into=got)
            made.check()
            return [name for one, other in zip(chunks(got), chunks(wanted), strict=True) for name in different(one, other)]
    except CarnetError as error:
        return error


def chunks(states):
    return [] if states is None else states if isinstance(states, list) else [states]


def different(got, wanted):
    """Name the tensors that are not the same bits."""
    one, other = parts(got), parts(wanted)
    return [name for name in other if one[name] != other[name]]


# --- what is wrong ---------------------------------------------------------------------------------------------------------------


def _kept(change):
    """Return what changes one tensor of a state dict."""

    def spoil(state, at):
        names = [name for name in state if name.endswith(("weight", "bias"))]
        state[names[at % len(names)]] = change(state[names[at % len(names)]])
        return state

    return spoil


def _but_one(state, at):
    names = [name for name in state if name.endswith(("weight", "bias"))]
    del state[names[at % len(names)]]
    return state


# what may be handed over on one rank in place of its state: name -> (state, a number) -> what is handed over
SPOILED = {
    "a row less": _kept(lambda tensor: tensor[1:]),
    "one more dimension": _kept(lambda tensor: tensor.unsqueeze(0)),
    "flat": _kept(lambda tensor: torch.cat([tensor.reshape(-1), tensor.reshape(-1)])),
    "float64": _kept(lambda tensor: tensor.double()),
    "int8": _kept(lambda tensor: torch.zeros(tensor.shape, dtype=torch.int8)),
    "bool": _kept(lambda tensor: torch.zeros(tensor.shape, dtype=torch.bool)),
    "complex": _kept(lambda tensor: torch.zeros(tensor.shape, dtype=torch.complex64)),
    "float8": _kept(lambda tensor: torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)),
    "on no device": _kept(lambda tensor: tensor.to("meta")),
    "sparse": _kept(lambda tensor: tensor.to_sparse()),
    "None": _kept(lambda _: None),
    "numpy": _kept(lambda tensor: tensor.float().numpy()),
    "one tensor less": _but_one,
    "a tensor more": lambda state, _: state | {"decoder.layers.0.mlp.linear_fc9.weight": torch.zeros(3)},
    "a layer more": lambda state, _: state | {"decoder.layers.99.mlp.linear_fc2.weight": torch.zeros(3)},
    "another prefix": lambda state, _: {f"student.{name}": tensor for name, tensor in state.items()},
    "a prefix here and there": lambda state, at: {"module." * (at % 2) + name: t for at, (name, t) in enumerate(state.items())},
    "numbers for names": lambda state, _: dict(enumerate(state.values())),
    "no tensors": lambda *_: {},
    "nothing": lambda *_: None,
    "too many chunks": lambda state, _: [state, state],
    "no chunks": lambda *_: [],
    "a list of names": lambda state, _: list(state),
    "a number": lambda *_: 7,
}


def spoil_states(weights, cases):
    """Spoil what one rank hands over, for each case; return what each raises, and how long all of it took."""
    made = {name: tensor_of(*part) for name, part in weights.items()}
    found = []
    for case in cases:
        sides = {side: Grid(**case[side]) for side in ("source", "target")}
        with live.plan(case["config"], **sides, to=case["to"], timeout=20) as crossing:
            given, into = (states(made, case["model"], case[side], case["spelling"]) for side in sides)
            if dist.get_rank() == case["rank"]:
                spoil = SPOILED[case["spoil"]]
                given, into = (given, spoil(into, case["at"])) if given is None else (spoil(given, case["at"]), into)
            found.append(
                raised(lambda c=crossing, g=given, i=into, t=case["to"]: c.run(g, into=i if t == "megatron" else None))
            )
    return found


def spoil_options(cases):
    """Plan with other options on one rank, or on all; return what each raises."""
    found = []
    for case in cases:
        options = case["options"] | (case["other"] if case["rank"] in (None, dist.get_rank()) else {})
        sides = {side: Grid(**options.pop(side)) for side in ("source", "target")}
        found.append(raised(lambda s=sides, o=options: live.plan(o.pop("config"), **s, timeout=20, **o)))
        for group in set(dist.distributed_c10d._world.pg_map) - {dist.group.WORLD}:
            dist.destroy_process_group(group)  # of a plan that was refused
    return found


def raised(act):
    began = time.monotonic()
    try:
        done = act()
        if hasattr(done, "close"):
            done.close()
        said = None
    except Exception as error:  # noqa: BLE001
        said = type(error).__name__, isinstance(error, CarnetError), str(error)
    return said, time.monotonic() - began
