"""Every family goes live from ranks that were cut by hand, in every spelling: the same bits as the crossing of its files."""

import math
from random import Random
from zlib import crc32

import numpy as np
import pytest

import carnet
from carnet.architectures.known import recognise
from carnet.architectures.llama import LLAMA
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import less_one
from carnet.model.model import canonical_shapes, layers, number, value
from tests.families.samples import SAMPLES, TYPES, cut, draw, load, numbers, ranked, said, save, says
from tests.live.engine_parts import parts_of
from tests.live.family_jobs import SPOILED

ALONE = ranked(LLAMA.trtllm, {"tp": 1, "pp": 1, "ep": 1, "parallel_embedding": "none"})
LIVE = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def content(model, random, *, centred, router):
    """Return the canonical weights of a model as a module of Megatron has them: norms less one where they are centred."""
    dtype, found = str(model.config["dtype"]), {}
    weights = numbers(model, random)
    for name, shape in canonical_shapes(model.config).items():
        own = "f32" if name.endswith("router_bias") else router if name.endswith("moe.router") else dtype
        part = weights[name]
        if part.dtype == np.float64:
            part = (part - (name.tensor.part in centred)).astype(TYPES[own][1])
        found[name] = LIVE[own], shape, part.tobytes()
    return found


def grids(random, model, *, tp, etp, ep, vp=True):
    """Draw how ranks share a model: sizes among those given, copies, stages that are not alike, some of the ranks."""
    count = number(model.config, "layers")
    while True:
        ranks = random.choice((1, 2, 4, 4))
        sizes = {
            "tp": random.choice(tp),
            "pp": random.choice((1, 1, 2, 4)),
            "cp": random.choice((1, 1, 2)),
            "ep": random.choice(ep),
        }
        sizes |= {"etp": random.choice((None, *etp)), "vp": random.choice((1, 1, 2, 3))}
        order = random.choice(("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"))
        dense, inner = sizes["tp"] * sizes["cp"], (sizes["etp"] or sizes["tp"]) * sizes["ep"]
        if (sizes["etp"] or sizes["tp"]) not in etp or ranks % (dense * sizes["pp"]) or ranks % (inner * sizes["pp"]):
            continue
        if order.endswith("pp-dp") and sizes["pp"] > 1 and dense != inner:
            continue
        stages = sizes["pp"] * sizes["vp"]
        marks = sorted(random.randint(0, count) for _ in range(stages - 1))
        spans = [b - a for a, b in zip([0, *marks], [*marks, count], strict=True)]
        uneven = [spans[stage * sizes["vp"] : (stage + 1) * sizes["vp"]] for stage in range(sizes["pp"])]
        alike = count % stages == 0 and random.random() < 0.5
        return {**sizes, "order": order, "layers": None if alike else uneven, "ranks": random.sample(range(4), ranks)}


def widths(model, random):
    """Return how many ranks may share the layers of a running model, an expert, and the experts."""
    config = model.config
    alone = [number(layer, "kv_heads") for layer in layers(config) if layer["mixer"] in ("attention", "mla")]
    cut = {"mamba": "ssm_groups", "gdn": "gdn_keys"}
    alone += [number(layer, cut[mixer]) for layer in layers(config) if (mixer := str(layer["mixer"])) in cut]
    even = [n for n in (1, 2, 4) if model.ranks % n == 0]
    return {
        "tp": [n for n in even if math.gcd(model.ranks, *alone) % n == 0],
        "etp": even if value(config, "experts") else [1, 2, 4],
        "ep": even if value(config, "experts") else [1],
    }


def spellings(random):
    return {
        "norms": random.choice(("te", "local")),
        "experts": random.choice(("alone", "grouped", "joined")),
        "prefix": random.choice(("", "module.", "module.module.", "model.module.")),
        "further": random.choice(("transformer_layer", "mtp_model_layer")),
        "odd": random.randint(1, 4),
        "strided": random.random() < 0.5,
    }


def shares(random, model):
    """Draw how the ranks of an engine share a model under Hugging Face's names: NVIDIA's way of stages, experts whole or not."""
    groups = number(model.config, "ssm_groups") if any(layer["mixer"] == "mamba" for layer in layers(model.config)) else 0
    tp = random.choice([n for n in (1, 2, 4) if math.gcd(model.ranks, groups) % n == 0])
    pp = random.choice([n for n in (1, 2, 4) if n * tp <= 4 and n <= number(model.config, "layers")])
    ep = random.choice((1, tp)) if value(model.config, "experts") else 1
    return {"tp": tp, "pp": pp, "ep": ep, "ranks": random.sample(range(4), tp * pp)}


# --- models and crossings ----------------------------------------------------------------------------------------------------------


def draw_cases(name, tmp_path, random, count):
    """Return the weights of some models, and crossings of each with what is to arrive: rank -> tensors, None where it is modules."""
    weights, cases, expected = [], [], []
    speaks = "megatron" in SAMPLES[name].dialects
    for at in range(count):
        model = draw(name, random, ("hf", "megatron") if speaks else ("hf",))
        folder, seed = tmp_path / f"hf{at}", random.randint(0, 1 << 30)
        save(model, folder, "hf", Random(seed), {})
        config: dict[str, object] = said(model.family, "hf", model.config)
        if speaks and random.random() < 0.7 and says(model.family, "megatron", model.config):
            arguments = said(model.family, "megatron", model.config)
            if recognise("megatron", arguments, "", {})[0].name == model.family:
                config = arguments
        fields = recognise("megatron", config, "", {})[1]
        router = random.choice(("f32", str(model.config["dtype"])))
        weights.append(content(model, Random(seed), centred=less_one(MEGATRON, fields), router=router))
        sizes = {field: number(model.config, field) for field in ("layers", "mtp", "vocab")}
        sizes |= {"hybrid": bool(value(fields, "hybrid")), "padding": 0.3}
        for to in ("hf", "shared", "trtllm", "megatron"):
            if to == "trtllm" and (to not in SAMPLES[name].dialects or not says(model.family, to, {**model.config, **ALONE})):
                continue
            source = grids(random, model, **widths(model, random))
            pad = 4 * random.randint(1, 5)
            options = {"memory": random.randint(4096, 1 << 15), "padded_vocab_size": -(-sizes["vocab"] // pad) * pad}
            options["dtypes"] = {"*router.weight": router}
            options["written_by"] = "megatron-bridge"  # the weights are drawn of what is said, whatever a builder hands on
            case = {
                "weights": at,
                "config": config,
                "to": "hf" if to == "shared" else to,
                "source": source,
                "options": options,
                "into": spellings(random),
            }
            case |= {"spelling": spellings(random), "model": sizes | {"padded": options["padded_vocab_size"]}}
            case["stream"] = random.random() < 0.3
            if to == "hf":
                case["target"] = {"ranks": random.sample(range(4), random.randint(1, 4))}
                expected.append(dict.fromkeys(case["target"]["ranks"], load(folder)))
            elif to == "megatron":
                case["target"] = grids(random, model, **widths(model, random))
                pad = 4 * random.randint(1, 5)
                options["target_padded_vocab_size"] = -(-sizes["vocab"] // pad) * pad
                expected.append(None)
            elif to == "trtllm":
                while (way := cut(model, "trtllm", random))["tp"] * way["pp"] > 4:
                    pass
                out = tmp_path / f"trtllm{len(cases)}"
                assert carnet.cross(folder, out, to="trtllm", **way).equal
                ranks = random.sample(range(4), way["tp"] * way["pp"])
                case["target"] = {name: way[name] for name in ("tp", "pp", "ep")} | {"ranks": ranks}
                options["parallel_embedding"] = way["parallel_embedding"]
                expected.append({rank: load(out, f"rank{at}.safetensors") for at, rank in enumerate(ranks)})
            else:
                case["target"] = shares(random, model)
                expected.append(dict(parts_of(load(folder), model, case["target"])))
            cases.append(case)
    return weights, cases, expected


# what runs here is megatron-core 0.16, which has no Mamba-1, and computes another sparse attention, and is refused:
# test_megatron_programs.py; it has no layers like Gemma 4's, and of Qwen3.5 test_family_qwen3_5.py has a store of the newest
LATER = {"eagle3", "mamba", "deepseek_v32", "glm_moe_dsa", "gemma4", "gemma4, mixtures", "qwen3_5_moe"}


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in LATER])
def test_a_family_goes_live_from_any_cut_to_any_other(world, tmp_path, name):
    random = Random(crc32(name.encode()))
    weights, cases, expected = draw_cases(name, tmp_path, random, 2)
    found = world.run("cross_families", weights, cases)
    for at, (case, wanted) in enumerate(zip(cases, expected, strict=True)):
        for rank in range(4):
            got = found[rank][at]
            assert not isinstance(got, BaseException), (case, got)
            if wanted is None:
                assert got == [], case
                continue
            assert got.keys() == {n.split("/")[-1] for n in wanted.get(rank, {})}, case
            assert [
                n
                for n, (dtype, shape, data) in wanted.get(rank, {}).items()
                if not same(got[n.split("/")[-1]], dtype, shape, data)
            ] == []


@pytest.mark.parametrize(
    ("name", "wanted", "source", "target"),
    [
        ("deepseek_v3", {"mtp": 1, "tied": False}, {"tp": 2, "pp": 2}, {"tp": 1, "vp": 2}),
        ("deepseek_v3", {"mtp": 1, "tied": False}, {"pp": 2}, {"tp": 2, "pp": 2}),
        ("gpt2", {"tied": True}, {"tp": 2, "pp": 2}, {"pp": 2}),
        ("gpt2", {"tied": True}, {"vp": 2}, {"tp": 2, "vp": 2}),
    ],
)
def test_what_a_stage_holds_again_is_read_and_written(world, name, wanted, source, target):
    """The embedding, where further tokens are predicted or the head is tied; the projection of the former is shared by rows."""
    wanted = {"layers": 2, **wanted}
    model = draw_until(name, lambda config: all(value(config, field) == one for field, one in wanted.items()), ranks=2)
    config = said(model.family, "hf", model.config)
    sizes = {field: number(model.config, field) for field in ("layers", "mtp", "vocab")} | {"hybrid": False, "padding": 0.3}
    options = {"padded_vocab_size": 256, "target_padded_vocab_size": 512}
    case = {"weights": 0, "config": config, "to": "megatron", "options": options, "source": source, "target": target}
    case |= {"spelling": spellings(Random(1)), "into": spellings(Random(2)), "model": sizes | {"padded": 256}}
    weights = content(model, Random(5), centred=(), router=model.config["dtype"])
    assert world.run("cross_families", [weights], [case]) == [[[]]] * 4


def same(got, dtype, shape, data):
    """Say whether a tensor is the expected one; a router may be f32, and a norm to which one was added."""
    if got[1:] == (shape, data):
        return True
    item = dict(TYPES.values())[dtype]
    return got == ("torch.float32", shape, np.frombuffer(data, item).astype(np.float32).tobytes())


# --- what is wrong on one rank, or on all ---------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    """A small model on two ranks: its weights, and a crossing of it."""
    random = Random(7)
    model = draw_until("qwen2_moe", lambda config: config["kv_heads"] == config["layers"] == 2 and config["moe_ffn"] % 2 == 0)
    config = said(model.family, "hf", model.config)
    sizes = {field: number(model.config, field) for field in ("layers", "mtp", "vocab")} | {"hybrid": False, "padding": 0.3}
    spelling = spellings(random) | {"prefix": "", "strided": False}
    case = {"config": config, "source": {"tp": 2, "ranks": [0, 1]}, "target": {"ranks": [2]}, "spelling": spelling}
    padded = {"padded": -(-sizes["vocab"] // 256) * 256}
    return content(model, random, centred=(), router=model.config["dtype"]), case | {"model": sizes | padded}


def test_a_state_that_is_wrong_on_one_rank_is_refused_on_all(world, plain):
    weights, case = plain
    random = Random(3)
    ways = (("hf", 1), ("megatron", 1), ("megatron", 2))  # the second rank of the source, the only one of the target
    cases = [
        case | {"spoil": spoil, "to": to, "rank": rank, "at": random.randint(0, 99)} for spoil in SPOILED for to, rank in ways
    ]
    found = world.run("spoil_states", weights, cases)
    for at, one in enumerate(cases):
        refused_everywhere([found[rank][at] for rank in range(4)], one)


# what no plan can be made of: on one rank, and on all
WISHES = [
    {"source": {"tp": 0}},
    {"source": {"tp": -2}},
    {"source": {"tp": 3}},
    {"source": {"tp": 2.0}},
    {"source": {"tp": "2"}},
    {"source": {"tp": None}},
    {"source": {"tp": 4, "pp": 4}},
    {"source": {"vp": 0}},
    {"source": {"pp": 2, "layers": [[1], [99]]}},
    {"source": {"pp": 2, "layers": [[-1], [5]]}},
    {"source": {"pp": 2, "layers": [2, 2]}},
    {"source": {"pp": 2, "layers": "22"}},
    {"source": {"pp": 2, "vp": 3}},
    {"source": {"ep": 3}},
    {"source": {"ep": 2, "etp": 4}},
    {"source": {"etp": 0}},
    {"source": {"order": "tp-pp"}},
    {"source": {"order": "tp-cp-ep-pp-dp", "tp": 2, "pp": 2, "etp": 1}},
    {"source": {"order": None}},
    {"source": {"ranks": []}},
    {"source": {"ranks": [0, 0]}},
    {"source": {"ranks": [9]}},
    {"source": {"ranks": ["0"]}},
    {"target": {"vp": 2, "tp": 2}},
    {"target": {"cp": 2, "tp": 2}},
    {"target": {"tp": 2, "layers": [[2]]}},
    {"target": {"ep": 2}},
    {"target": {"etp": 2, "tp": 2}},
    {"target": {"tp": 64}},
    {"target": {"pp": 4, "ep": 2, "ranks": [0, 1, 2]}},
    {"to": "gguf"},
    {"to": None},
    {"to": "trtllm", "target": {"pp": 4, "tp": 3}},
    {"memory": 0},
    {"dtypes": {"*": "int3"}},
    {"quantize": "int3"},
    {"quantize": "fp8"},
    {"quantize": "fp8-block"},
    {"style": "none such"},
    {"parallel_embedding": "diagonal"},
    {"kv_cache": "int3"},
    {"kv_scale": -1.0},
    {"activations": "none such"},
    {"exclude": ["*nothing*"]},
    {"padded_vocab_size": 1},
    {"padded_vocab_size": "many"},
    {"source": {"tp": 2}, "padded_vocab_size": 37},
    {"to": "megatron", "target_padded_vocab_size": 1},
    {"config": {}},
    {"config": "/nowhere/config.json"},
    {"config": {"num_layers": "three"}},
]
MISTYPED = [{"source": {"ranks": 3}}, {"memory": None}, {"dtypes": ["*"]}, {"config": None}, {"config": 7}]


def test_a_wish_that_cannot_be_is_refused_on_all_ranks(world, plain):
    _, case = plain
    options = {name: case[name] for name in ("config", "source", "target")}
    cases = [{"options": options, "other": wish, "rank": rank} for wish in WISHES for rank in (None, 2)]
    cases += [{"options": options, "other": wish, "rank": 2} for wish in MISTYPED]
    found = world.run("spoil_options", cases)
    for at, one in enumerate(cases):
        refused_everywhere([found[rank][at] for rank in range(4)], one)


def refused_everywhere(found, case):
    """Every rank must say what is wrong, and soon: no time limit ran out."""
    facts = {name: case[name] for name in ("spoil", "other", "rank", "at", "to") if name in case}
    for rank, (refusal, seconds) in enumerate(found):
        assert refusal is not None, (facts, rank)
        kind, known, text = refusal
        assert known or (rank == case["rank"] and {one[0] for one, _ in found} == {kind, "MachineFailed"}), (
            facts,
            rank,
            refusal,
        )
        assert "does not answer" not in text, (facts, rank, refusal)
        assert seconds < 10, facts


@pytest.mark.parametrize("side", ["source", "target"])
def test_ranks_of_megatron_that_would_share_a_key_are_refused_by_name(world, side):
    config = said("llama", "hf", draw_until("llama", lambda config: config["kv_heads"] == 1 and config["heads"] == 4).config)
    options = {"config": config, "to": "megatron", "source": {}, "target": {}, side: {"tp": 2}}
    for ((refusal, _),) in world.run("spoil_options", [{"options": options, "other": {}, "rank": None}]):
        assert refusal[0] == "NotSupported"
        assert "more ranks of Megatron share a model than it has KV heads" in refusal[2]


def draw_until(name, wanted, ranks=None):
    random = Random(0)
    while True:
        model = draw(name, random, ("hf", "megatron"))
        if ranks in (None, model.ranks) and wanted(model.config):
            return model
