"""Real models of megatron-core on four ranks go live to another cut: the same bytes as the crossing of their files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import carnet
from carnet.errors import CarnetError
from carnet.live import Grid
from tests.live.conftest import World

DENSE = {"layers": 4, "hidden": 32, "ffn": 48, "heads": 8, "kv": 4, "vocab": 97, "padded": 256}
MIXTURE = DENSE | {"experts": 4, "ffn": 24, "moe_ffn": 24}


def held(path):
    """Return the tensors of a file as the ranks return theirs."""
    found = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name).contiguous()
            found[name] = str(tensor.dtype), tuple(tensor.shape), tensor.view(-1).view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize(
    ("sizes", "cut", "target"),
    [
        (DENSE, {"tp": 2, "pp": 2}, {"tp": 4}),
        (DENSE, {"tp": 4}, {"ranks": (0,)}),
        (DENSE | {"tied": True}, {"tp": 2}, {"tp": 2, "pp": 2}),
        (MIXTURE, {"ep": 2}, {"tp": 2, "ranks": (1, 3)}),
    ],
)
@pytest.mark.parametrize("memory", [1 << 30, 1 << 14])
def test_ranks_of_tensorrt_get_the_bytes_of_the_crossing_of_files(world, tmp_path, sizes, cut, target, memory):
    found = world.run("cross", sizes, cut, target, "trtllm", str(tmp_path / "megatron"), {"memory": memory})
    assert found[0][2]["rounds"] == 1 if memory == 1 << 30 else found[0][2]["rounds"] > 1
    sizes_of = {name: target.get(name, 1) for name in ("tp", "pp")}
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="trtllm", **sizes_of).equal
    for at, rank in enumerate(target.get("ranks", range(4))):
        assert found[rank][0] == held(tmp_path / f"out/rank{at}.safetensors")
        assert json.loads(found[rank][1]["config.json"]) == json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(("sizes", "cut", "ranks"), [(DENSE, {"tp": 2, "pp": 2}, (0, 2)), (MIXTURE, {"tp": 2, "ep": 2}, (3,))])
def test_every_rank_of_an_engine_gets_the_whole_model(world, tmp_path, sizes, cut, ranks):
    found = world.run("cross", sizes, cut, {"ranks": ranks}, "hf", str(tmp_path / "megatron"))
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="hf").equal
    expected = held(tmp_path / "out/model.safetensors")
    assert [rank for rank in range(4) if found[rank][0]] == list(ranks)
    assert all(found[rank][0] == expected for rank in ranks)


# along which dimension transformers' own plans of tensor parallelism cut a projection
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head", "w1", "w3")
COLUMNS = ("o_proj", "down_proj", "w2")


@pytest.mark.parametrize(("sizes", "cut"), [(DENSE, {"pp": 4}), (MIXTURE, {"ep": 4}), (MIXTURE, {"tp": 2, "ep": 2, "etp": 1})])
def test_a_rank_of_an_engine_gets_its_part_under_the_names_of_hugging_face(world, tmp_path, sizes, cut):
    found = world.run("cross", sizes, cut, {"tp": 2}, "hf", str(tmp_path / "megatron"))
    whole = world.run("cross", sizes, cut, {"ranks": (0,)}, "hf", str(tmp_path / "again"))[0][0]
    for rank in range(4):
        assert found[rank][0].keys() == whole.keys()
        for name, part in found[rank][0].items():
            module = name.split(".")[-2]
            dim = 0 if module in ROWS else 1 if module in COLUMNS else None
            tensor = as_tensor(whole[name])
            if dim == 0 and len(tensor) % 2:
                tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
            assert torch.equal(as_tensor(part), tensor if dim is None else tensor.chunk(2, dim)[rank % 2]), name


def as_tensor(part):
    dtype, shape, data = part
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype.removeprefix("torch."))).view(shape)


def calibration():
    """Return what calibration would have found, for every linear layer of a dense model."""
    found = {}
    for layer in range(DENSE["layers"]):
        for number, module in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            found[f"model.layers.{layer}.self_attn.{module}.input_amax"] = 3.0 + layer + number / 4
        found |= {f"model.layers.{layer}.self_attn.{name}_proj.{name}_amax": 600.0 + layer for name in "kv"}
        for number, module in enumerate(("gate_proj", "up_proj", "down_proj")):
            found[f"model.layers.{layer}.mlp.{module}.input_amax"] = 9.0 + layer + number / 4
    return found


@pytest.mark.parametrize("cache", [None, "fp8"])
@pytest.mark.parametrize("scales", [None, "1.x", "2.x"])
def test_weights_that_become_fp8_on_the_way_have_one_scale_on_all_ranks(world, tmp_path, cache, scales):
    amax = {name: torch.tensor(value) for name, value in calibration().items()}
    save_file(amax, tmp_path / "amax.safetensors")
    options = {"quantize": "fp8", "kv_cache": cache}
    found = world.run(
        "cross",
        *(DENSE, {"tp": 2, "pp": 2}, {"tp": 4}, "trtllm", str(tmp_path / "megatron")),
        *(options | {"calibration": calibration()}, scales),
    )
    made = {"quantize": "fp8", "kv_cache": cache, "amax": tmp_path / "amax.safetensors"}
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="trtllm", tp=4, **made).equal
    for rank in range(4):
        assert found[rank][0] == held(tmp_path / f"out/rank{rank}.safetensors")
        assert json.loads(found[rank][1]["config.json"]) == json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
    ("sizes", "cut", "target", "to", "options"),
    [
        (DENSE, {"tp": 2, "pp": 2}, {}, "hf", {}),
        (
            DENSE,
            {"tp": 2},
            {"ranks": (1, 3)},
            "hf",
            {"quantize": "fp8", "style": "compressed-tensors", "activations": "dynamic"},
        ),
        (MIXTURE, {"tp": 2, "ep": 2}, {"tp": 2, "pp": 2}, "trtllm", {"memory": 1 << 15}),
    ],
)
def test_files_that_ranks_write_together_are_those_of_the_crossing_of_files(world, tmp_path, sizes, cut, target, to, options):
    outs = [str(tmp_path / "together"), str(tmp_path / "together"), "/proc/nowhere"]
    refused = world.run("save_together", sizes, cut, target, to, str(tmp_path / "megatron"), options, outs)
    assert all(not first and "exists" in second and "nowhere" in third for first, second, third in refused)
    cuts = {} if to == "hf" else {name: target.get(name, 1) for name in ("tp", "pp")}
    wish = {name: value for name, value in options.items() if name != "memory"}
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to=to, **cuts, **wish).equal
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "together").iterdir()
    )
    for path in (tmp_path / "out").iterdir():
        assert path.name == "carnet.json" or path.read_bytes() == (tmp_path / "together" / path.name).read_bytes()
    assert not (tmp_path / "together.partial").exists()
    verdict = carnet.verify(tmp_path / "megatron", tmp_path / "together", seal=True)
    assert verdict.equal
    assert json.loads((tmp_path / "together/carnet.json").read_text())["state"] == "proven"


# rows of whole blocks on every rank, in both cuts
WIDE = DENSE | {"hidden": 128, "ffn": 128}
MOES = MIXTURE | {"hidden": 64, "ffn": 64, "moe_ffn": 64}


@pytest.mark.parametrize(
    ("sizes", "cut", "target", "scheme", "style"),
    [
        (WIDE, {"tp": 2, "pp": 2}, {"ranks": (1, 2)}, "nvfp4", "modelopt"),
        (WIDE, {"tp": 4}, {"ranks": (0,)}, "nvfp4", "compressed-tensors"),
        (WIDE, {"tp": 4}, {"ranks": (3,)}, "mxfp8", "modelopt"),
        (WIDE, {"tp": 2}, {"ranks": (1,)}, "mxfp8", "compressed-tensors"),
        (WIDE, {"tp": 2}, {"ranks": (0,)}, "mxfp4", "modelopt"),
        (MOES, {"tp": 2, "ep": 2}, {"ranks": (3,)}, "nvfp4", "compressed-tensors"),
        (MOES, {"ep": 4}, {"ranks": (0, 1)}, "mxfp8", "modelopt"),
    ],
)
@pytest.mark.parametrize("memory", [1 << 30, 1 << 14])
def test_codes_and_scales_of_blocks_are_those_of_the_crossing_of_files(
    world, tmp_path, sizes, cut, target, scheme, style, memory
):
    wish = {"quantize": scheme, "style": style}
    if scheme == "nvfp4" and style == "modelopt":
        save_file({name: torch.tensor(value) for name, value in calibration().items()}, tmp_path / "amax.safetensors")
        options, made = wish | {"calibration": calibration()}, wish | {"amax": tmp_path / "amax.safetensors"}
    else:
        options = made = wish | ({"activations": "dynamic"} if scheme == "nvfp4" else {})
    found = world.run("cross", sizes, cut, target, "hf", str(tmp_path / "megatron"), options | {"memory": memory})
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="hf", **made).equal
    for rank in target["ranks"]:
        assert found[rank][0] == held(tmp_path / "out/model.safetensors")
        for name in ("config.json", "hf_quant_config.json"):
            if (tmp_path / "out" / name).exists():
                assert json.loads(found[rank][1][name]) == json.loads((tmp_path / "out" / name).read_text())


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8"])
def test_blocks_of_a_part_are_those_of_the_whole(world, tmp_path, scheme):
    options = {"quantize": scheme, "style": "compressed-tensors", "activations": None if scheme == "mxfp8" else "dynamic"}
    whole = world.run("cross", WIDE, {"pp": 2}, {"ranks": (0,)}, "hf", str(tmp_path / "megatron"), options)[0][0]
    parts = world.run("cross", WIDE, {"pp": 2}, {"tp": 2}, "hf", str(tmp_path / "again"), options)
    names = [name for name in whole if name.endswith(("proj.weight", "weight_packed", "weight_scale"))]
    assert len(names) == 2 * 7 * WIDE["layers"]
    for name in names:
        dim = 1 if name.split(".")[-2] in COLUMNS else 0
        expected = as_tensor(whole[name]).view(torch.uint8).chunk(2, dim)
        pair = [as_tensor(parts[rank][0][name]).view(torch.uint8) for rank in (0, 1)]
        assert all(torch.equal(part, each) for part, each in zip(pair, expected, strict=True)), name


def test_codes_of_a_part_are_those_of_the_whole(world, tmp_path):
    options = {"quantize": "fp8", "style": "compressed-tensors", "activations": "dynamic"}
    whole = world.run("cross", DENSE, {"pp": 2}, {"ranks": (0,)}, "hf", str(tmp_path / "megatron"), options)[0][0]
    parts = world.run("cross", DENSE, {"pp": 2}, {"tp": 2}, "hf", str(tmp_path / "again"), options)
    assert sum("float8" in dtype for dtype, _, _ in whole.values()) == 7 * DENSE["layers"]
    for name in (name for name in whole if name.endswith(("proj.weight", "weight_scale"))):
        dim = 1 if name.split(".")[-2] in COLUMNS else 0
        pair = [as_tensor(parts[rank][0][name]) for rank in (0, 1)]
        codes = as_tensor(whole[name])
        expected = (codes, codes) if name.endswith("scale") else codes.view(torch.uint8).chunk(2, dim)
        assert all(torch.equal(part.view(each.dtype), each) for part, each in zip(pair, expected, strict=True)), name


def test_norms_that_are_stored_less_one_arrive_whole_and_exact_however_the_target_is_cut(world):
    for shared, whole in world.run("less_one", DENSE):
        assert shared == whole
        assert {dtype for dtype, _, _ in whole.values()} == {"torch.float32"}
        assert len(whole) == 2 * DENSE["layers"] + 1


def test_what_is_no_state_is_an_error_on_all_ranks_where_scales_are_looked_for(world):
    assert all(
        isinstance(error, CarnetError) and "a state is a module" in str(error) for error in world.ask("odd_state", DENSE)
    )


@pytest.mark.parametrize("scales", [None, "2.x"])
def test_a_weight_that_is_no_number_is_refused_on_all_ranks(world, scales):
    for error in world.ask("no_number", DENSE, scales):
        assert isinstance(error, CarnetError)
        assert "is not a number, so it has no scale" in str(error)


@pytest.mark.parametrize("style", ["compressed-tensors", "modelopt"])
def test_fp8_under_the_names_of_hugging_face_is_that_of_the_crossing_of_files(world, tmp_path, style):
    save_file({name: torch.tensor(value) for name, value in calibration().items()}, tmp_path / "amax.safetensors")
    options = {"quantize": "fp8", "style": style, "calibration": calibration()}
    found = world.run("cross", DENSE, {"tp": 2}, {"ranks": (1, 2)}, "hf", str(tmp_path / "megatron"), options)
    made = {"quantize": "fp8", "style": style, "amax": tmp_path / "amax.safetensors"}
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="hf", **made).equal
    assert found[1][0] == found[2][0] == held(tmp_path / "out/model.safetensors")
    for name in ("config.json", "hf_quant_config.json"):
        if (tmp_path / "out" / name).exists():
            assert json.loads(found[1][1][name]) == json.loads((tmp_path / "out" / name).read_text())


@pytest.mark.parametrize(
    ("sizes", "cut", "target"),
    [
        (DENSE, {"tp": 2, "pp": 2}, {"tp": 4}),
        (DENSE, {"tp": 4}, {}),
        (DENSE | {"tied": True}, {"tp": 2}, {"tp": 1}),
        (MIXTURE, {"ep": 2}, {"tp": 2}),
        (MIXTURE, {"tp": 2, "ep": 2}, {"tp": 2, "ep": 2, "etp": 1}),
    ],
)
def test_a_model_takes_the_weights_of_another_that_is_cut_otherwise(world, sizes, cut, target):
    found = world.run("to_modules", sizes, cut, target)
    assert all(same for same, _ in found)
    assert [count > 30 for _, count in found] == [True, False, False, False]


def test_the_chunks_of_a_virtual_pipeline_go_where_their_layers_are(world, tmp_path):
    found = world.run("virtual", DENSE, str(tmp_path / "megatron"))
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="hf").equal
    assert found[2] == held(tmp_path / "out/model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "own", "word"),
    [
        ("shape", "BadCheckpoint", "the shape of 'output_layer.weight'"),
        ("loss", "BadCheckpoint", "lacks 'layers.1.mlp.down'"),
        ("more", "NotSupported", "a tensor that carnet does not know"),
        ("type", "BadRequest", "the element type of"),
        ("config", "BadRequest", "different configs, grids or options"),
        ("bug", "", ""),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(world, spoil, own, word):
    found = world.ask("refused", DENSE, {"tp": 2}, spoil, 1)
    assert all(isinstance(error, BaseException) for error in found), found
    if own:
        assert {type(error).__name__ for error in found} == {own}
        assert all(word in str(error) for error in found)
    assert world.run("refused", DENSE, {"tp": 2}, "none", 9)  # and the next one goes well


@pytest.mark.parametrize(
    ("cut", "target", "options", "word"),
    [
        ({"pp": 3}, {}, {}, "do not make up whole copies"),
        ({"pp": 2}, {"ranks": (0, 0)}, {}, "each once"),
        ({"pp": 2}, {"ranks": (7,)}, {}, "each once"),
        ({}, {"tp": 8}, {}, "do not make up whole copies"),
        ({}, {}, {"to": "gguf"}, "to cannot be 'gguf'"),
        ({}, {}, {"dtype": "int3"}, "dtype cannot be 'int3'"),
        ({}, {}, {"dtype": "f8_e4m3"}, "dtype cannot be 'f8_e4m3'"),
        ({}, {"ranks": 3}, {}, "each once"),
        ({}, {}, {"memory": None}, "the memory for buckets is too little"),
        ({}, {}, {"memory": 100}, "the memory for buckets is too little"),
        ({}, {}, {"quantize": "fp8-block"}, "scales of blocks"),
        ({}, {}, {"quantize": "fp8-channel", "style": "compressed-tensors"}, "scales of blocks"),
        (
            {"tp": 4},
            {},
            {"quantize": "mxfp8", "exclude": ["*.down_proj"], "padded_vocab_size": 256},
            "ranks cut through blocks",
        ),
        ({}, {}, {"quantize": "fp8"}, "nothing says how large the activations"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_before_anything_moves(world, cut, target, options, word):
    for error in world.ask("wish", DENSE, cut, target, options):
        assert isinstance(error, CarnetError)
        assert word in str(error)


@pytest.mark.parametrize(
    ("kind", "word"), [("arrival", "layers.1.mlp.down"), ("copy", "two ranks that should hold the same do not"), ("", "")]
)
def test_digests_on_both_ends_find_one_bit(world, kind, word):
    found = world.ask("damaged", DENSE, {"tp": 2}, {"tp": 4}, kind)
    if word:
        assert all(isinstance(error, CarnetError) and word in str(error) for error in found), found
    else:
        assert set(found) == {found[0]}


@pytest.mark.parametrize(
    ("cut", "uneven", "said"),
    [
        ({"tp": 2, "pp": 2}, False, {"tp": 2, "pp": 2, "etp": 2, "layers": [[2], [2]]}),
        ({"pp": 2}, True, {"pp": 2, "etp": 1, "layers": [[3], [1]]}),
        ({"tp": 2, "ep": 2, "etp": 1}, False, {"tp": 2, "ep": 2, "etp": 1, "layers": [[4]]}),
    ],
)
def test_megatrons_own_state_says_the_grid(world, cut, uneven, said):
    assert world.run("grids", MIXTURE, cut, uneven) == [Grid(**said)] * 4


def test_another_order_of_ranks_is_noticed_where_it_matters(world):
    found = world.ask("orders", DENSE)
    assert [isinstance(each, CarnetError) for each in found] == [False, True, True, False]
    assert found[0][0] == "tp-cp-ep-pp-dp"
    assert "the ranks are in another order" in str(found[1])


def test_the_page_of_the_documentation_does_what_it_shows(world):
    page = (Path(__file__).parents[2] / "docs/live.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    found = world.run("page", DENSE, code)
    assert [bool(names) for names, _ in found] == [True, True, False, False]
    assert all(same for _, same in found)


def test_a_run_does_again_only_what_has_changed(world):
    assert world.run("again", DENSE) == [((1, True), 3, True, "the crossing is closed")] * 4


def test_what_stands_beside_a_target_stays(world, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/journal.jsonl").write_text("of another crossing")
    found = world.run("save_together", DENSE, {}, {}, "hf", str(tmp_path / "megatron"), {}, [str(tmp_path / "out")] * 2)
    assert all("journal.jsonl is not a journal of carnet" in said for each in found for said in each), found
    assert (tmp_path / "out.partial/journal.jsonl").read_text() == "of another crossing"
    assert not (tmp_path / "out").exists()


def test_nobody_waits_for_a_rank_that_is_gone():
    other = World(3)
    try:
        what, facts = other.ask("leave", 2, ranks=(0, 1, 2), gone=(2,))[0]
        assert what == "a rank of the job does not answer"
        assert facts["time limit"] == "3 s"
    finally:
        other.close()
