"""Classes that also see: the text model crosses as any other, and what is beside it goes along bit for bit, also through Megatron."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import carnet
from carnet.cli import main
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from tests.referees.towers import CLASSES, IMAGES, logits, save

pytestmark = pytest.mark.referee

THERE = {"to": "megatron", "tp": 2, "accept": ["needs"]}
QWEN = "Qwen3VLForConditionalGeneration"
SPLIT = {
    "Qwen3_5MoeForConditionalGeneration"
}  # transformers writes a tensor for each expert, the published files have one for all
PROJECTED = ["vision_tower.*", "multi_modal_projector.*"]
DROPPED = {  # what is beside the text model
    "Gemma3ForConditionalGeneration": PROJECTED,
    "Gemma4ForConditionalGeneration": ["model.vision_tower.*", "model.embed_vision.*"],
    "Mistral3ForConditionalGeneration": PROJECTED,
    "KimiK25ForConditionalGeneration": ["vision_tower.*", "mm_projector.*"],
    "Llama4ForConditionalGeneration": ["vision_model.*", "multi_modal_projector.*"],
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return the folder of a class's model, made once."""
    made = {}

    def of(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = save(name, tmp_path_factory.mktemp("towers") / name, dtype)
        return made[name, dtype]

    return of


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_sees_comes_back_from_megatron_as_it_was(name, model, tmp_path):
    before = model(name)
    went = carnet.cross(before, tmp_path / "megatron", **THERE)
    assert went.equal
    assert "wrapper" in went.needs["fields"]
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    assert carnet.verify(before, tmp_path / "back").equal
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", before))
    assert len(ours) == len(theirs) or name in SPLIT
    tower = [key for key in theirs if not key.startswith(("model.layers", "model.language_model", "language_model"))]
    assert [key for key in tower if key in ours and not torch.equal(ours[key], theirs[key])] == []
    assert torch.equal(logits(name, tmp_path / "back"), logits(name, before))
    if name in IMAGES:
        assert torch.equal(logits(name, tmp_path / "back", image=True), logits(name, before, image=True))


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_of_such_a_class_is_written_under_its_own_names(name, model, tmp_path):
    assert carnet.cross(model(name), tmp_path / "hf", to="hf").equal
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", model(name)))
    assert ours.keys() == theirs.keys() or name in SPLIT
    assert [key for key in ours.keys() & theirs.keys() if not torch.equal(ours[key], theirs[key])] == []
    assert torch.equal(logits(name, tmp_path / "hf"), logits(name, model(name)))


@pytest.mark.parametrize("name", [QWEN, "Gemma3ForConditionalGeneration"])
def test_the_text_alone_is_quantized_and_the_config_excludes_the_rest(name, model, tmp_path):
    before = model(name, torch.bfloat16)
    assert carnet.cross(before, tmp_path / "fp8", to="hf", quantize="fp8-channel", exclude=["*self_attn*"]).equal
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "fp8", before))
    coded = {key for key, tensor in ours.items() if tensor.dtype == torch.float8_e4m3fn}
    assert coded
    assert all(".mlp." in key and "language_model" in key for key in coded)
    assert [key for key in theirs if key not in coded and not torch.equal(ours[key], theirs[key])] == []
    said = json.loads((tmp_path / "fp8/config.json").read_text())
    assert ({"model.visual*", "vision_tower*"} & {*said["quantization_config"]["ignore"]}) != set()
    assert carnet.cross(tmp_path / "fp8", tmp_path / "plain", to="hf", dtype="bf16").equal
    said["quantization_config"]["ignore"] = [name for name in said["quantization_config"]["ignore"] if "vis" not in name]
    (tmp_path / "fp8/config.json").write_text(json.dumps(said))
    (found,) = carnet.verify(before, tmp_path / "fp8").findings
    assert found.what == "the config does not exclude what is plain"


def of_store(folder):
    """Return the tensors of a store as torch itself reads them."""
    reader = FileSystemReader(folder / "iter_0000001")
    found = {
        key: each for key, each in reader.read_metadata().state_dict_metadata.items() if isinstance(each, TensorStorageMetadata)
    }
    state = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in found.items()}
    load(state, storage_reader=reader, no_dist=True)
    return state


def test_megatron_bridge_finds_the_tower_under_its_own_names(model, tmp_path):
    """Names and orders as Megatron-Bridge's qwen3_vl_bridge.py and its ConcatenatedQKVMapping have them: a head's q, k, v together."""
    assert carnet.cross(model(QWEN), tmp_path / "megatron", **THERE).equal
    ours, theirs = of_store(tmp_path / "megatron"), load_file(model(QWEN) / "model.safetensors")
    ours = {key.removeprefix("vision_model."): tensor for key, tensor in ours.items() if key.startswith("vision_model.")}
    theirs = {key.removeprefix("model.visual."): tensor for key, tensor in theirs.items() if key.startswith("model.visual.")}
    heads, depth, merged = 2, 2, {"linear_fc1": "linear_fc1", "linear_fc2": "linear_fc2", "patch_norm": "norm"}
    expected = {f"patch_embed.proj.{last}": theirs[f"patch_embed.proj.{last}"] for last in ("weight", "bias")}
    expected["pos_embed.weight"] = theirs["pos_embed.weight"]
    for last in ("weight", "bias"):
        of = {
            "self_attention.linear_proj.": f"attn.proj.{last}",
            "self_attention.linear_qkv.layer_norm_": f"norm1.{last}",
            "mlp.linear_fc1.layer_norm_": f"norm2.{last}",
            "mlp.linear_fc1.": f"mlp.linear_fc1.{last}",
            "mlp.linear_fc2.": f"mlp.linear_fc2.{last}",
        }
        for name, each in of.items():
            expected[f"decoder.layers.{name}{last}"] = torch.stack([theirs[f"blocks.{n}.{each}"] for n in range(depth)])
        blocks = [theirs[f"blocks.{n}.attn.qkv.{last}"] for n in range(depth)]
        apart = [block.view(3, heads, -1, *block.shape[1:]).transpose(0, 1).reshape(block.shape) for block in blocks]
        expected[f"decoder.layers.self_attention.linear_qkv.{last}"] = torch.stack(apart)
        for name, each in merged.items():
            expected[f"merger.{name}.{last}"] = theirs[f"merger.{each}.{last}"]
            expected[f"decoder.deepstack_merger_list.{name}.{last}"] = theirs[f"deepstack_merger_list.0.{each}.{last}"][None]
    assert ours.keys() == expected.keys()
    assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []


@pytest.mark.parametrize("name", CLASSES)
def test_the_text_model_says_to_a_text_what_the_class_around_it_says(name, model, loaded, tmp_path):
    assert carnet.cross(model(name), tmp_path / "text", to="hf", drop=DROPPED.get(name.split(",")[0], ["*visual.*"])).equal
    tokens = torch.randint(20, 150, (1, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = loaded(tmp_path / "text")(tokens, use_cache=False).logits
    assert torch.allclose(found, logits(name, model(name)), atol=1e-5)


def test_without_what_is_beside_it_the_model_is_the_text_alone(model, tmp_path):
    assert carnet.cross(model(QWEN), tmp_path / "text", to="hf", drop=["model.visual.*"]).equal
    said = json.loads((tmp_path / "text/config.json").read_text())
    assert said["architectures"] == ["Qwen3ForCausalLM"]
    assert "vision_config" not in said
    assert carnet.cross(model(QWEN), tmp_path / "ranks", to="trtllm", tp=2, drop=["model.visual.*"]).equal
    with pytest.raises(NotSupported, match="no place for what a model sees or hears with"):
        carnet.plan(model(QWEN), to="trtllm")


def _bits(tensors):
    tensors["model.visual.merger.norm.weight"][3] += 1e-3


def _exchanged(tensors):
    one, other = (f"model.visual.blocks.{block}.norm1.weight" for block in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _lost(tensors):
    del tensors["model.visual.pos_embed.weight"]


def _added(tensors):
    tensors["model.visual.extra.weight"] = torch.ones(2)


def _cast(tensors):
    tensors["model.visual.pos_embed.weight"] = tensors["model.visual.pos_embed.weight"].double()


def _flat(tensors):
    tensors["model.visual.pos_embed.weight"] = tensors["model.visual.pos_embed.weight"].reshape(-1)


def _grown(tensors):
    tensors["model.visual.pos_embed.weight"] = torch.nn.functional.pad(tensors["model.visual.pos_embed.weight"], (0, 0, 0, 1))


@pytest.mark.parametrize("damage", [_bits, _exchanged, _lost, _added, _cast, _flat, _grown])
def test_a_damaged_tower_is_found(damage, model, tmp_path):
    assert carnet.cross(model(QWEN), tmp_path / "hf", to="hf").equal
    tensors = load_file(tmp_path / "hf/model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    assert not carnet.verify(model(QWEN), tmp_path / "hf").equal


@pytest.mark.parametrize(
    "key",
    [
        "vision_config.num_heads",
        "vision_config.rope_parameters.rope_theta",
        "image_token_id",
        "text_config.model_type",
        "model_type",
    ],
)
def test_a_changed_word_about_the_tower_is_found(key, model, tmp_path):
    assert carnet.cross(model(QWEN), tmp_path / "hf", to="hf").equal
    said = json.loads((tmp_path / "hf/config.json").read_text())
    *above, last = key.split(".")
    inner = said
    for part in above:
        inner = inner[part]
    inner[last] = f"{inner[last]}x" if isinstance(inner[last], str) else inner[last] + 1
    (tmp_path / "hf/config.json").write_text(json.dumps(said))
    found = carnet.verify(model(QWEN), tmp_path / "hf").findings
    assert {each.stored or each.where for each in found} <= {"config.json", "config", "model.visual.blocks.0.attn.qkv.bias"}
    assert found


def test_a_text_model_alone_is_not_called_one_that_sees(model, tmp_path):
    (tmp_path / "text").mkdir()
    tensors = {key: tensor for key, tensor in load_file(model(QWEN) / "model.safetensors").items() if "visual" not in key}
    save_file(tensors, tmp_path / "text/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text/config.json").write_text((model(QWEN) / "config.json").read_text())
    with pytest.raises(BadCheckpoint, match="a text model alone"):
        carnet.plan(tmp_path / "text", to="hf")


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("Qwen")])
def test_positions_without_a_type_are_the_usual_ones(name, model, tmp_path):
    config = json.loads((model(name) / "config.json").read_text())
    del config["text_config"]["rope_parameters"]["rope_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert carnet.cross(model(name), tmp_path / "hf", to="hf", config=tmp_path / "config.json").equal


def test_another_text_model_inside_is_refused_by_its_name(model, tmp_path):
    config = json.loads((model(QWEN) / "config.json").read_text())
    config["text_config"]["model_type"] = "ministral3"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotSupported, match="does not know the text model 'ministral3'"):
        carnet.plan(model(QWEN), to="hf", config=tmp_path / "config.json")


@pytest.mark.parametrize("said", [[], "x", 3, None])
def test_nonsense_in_place_of_the_text_models_config_is_refused(said, model, tmp_path):
    config = json.loads((model(QWEN) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": said}))
    with pytest.raises(BadCheckpoint, match="'text_config' is not a record"):
        carnet.plan(model(QWEN), to="hf", config=tmp_path / "config.json")


@pytest.mark.parametrize(
    "said", ["", "{", "[]", '{"architectures": ["X"]}', f'{{"architectures": ["{QWEN}"], "text_config": 1}}', "[" * 9999]
)
def test_nonsense_of_a_wrapper_in_a_stores_arguments_is_refused(said, model, tmp_path):
    assert carnet.cross(model(QWEN), tmp_path / "megatron", **THERE).equal
    config = carnet.inspect(tmp_path / "megatron").checkpoint.config
    (tmp_path / "args.json").write_text(json.dumps({**config, "carnet_needs": {**config["carnet_needs"], "wrapper": said}}))
    with pytest.raises((BadCheckpoint, NotSupported)):
        carnet.plan(tmp_path / "megatron", to="hf", config=tmp_path / "args.json")


def test_inspect_says_what_the_text_model_is_inside_of(model):
    said = CliRunner().invoke(main, ["inspect", str(model(QWEN))]).output
    assert f"inside             {QWEN}, with " in said
    assert "vision_config" not in said


@pytest.fixture
def trained(model, tmp_path):
    """Return a Megatron checkpoint of the text alone."""
    assert carnet.cross(model(QWEN), tmp_path / "trained", to="megatron", tp=2, drop=["model.visual.*"]).equal
    return tmp_path / "trained"


def test_a_folder_lends_its_tower_to_a_text_model_that_was_trained(trained, model, tmp_path):
    said = carnet.cross(trained, tmp_path / "hf", to="hf", tower=model(QWEN))
    assert said.equal
    assert carnet.verify(model(QWEN), tmp_path / "hf").equal
    assert carnet.verify(trained, tmp_path / "hf", tower=model(QWEN)).equal
    assert carnet.verify(tmp_path / "hf").equal
    assert torch.equal(logits(QWEN, tmp_path / "hf", image=True), logits(QWEN, model(QWEN), image=True))
    request = json.loads((tmp_path / "hf/carnet.json").read_text())["request"]
    assert request["tower"] == str(model(QWEN))
    assert not carnet.verify(trained, tmp_path / "hf").equal  # nobody says where the tower is from


def test_it_is_lent_to_megatron_too(trained, model, tmp_path):
    assert carnet.cross(trained, tmp_path / "whole", to="megatron", tower=model(QWEN), accept=["needs"]).equal
    assert carnet.cross(tmp_path / "whole", tmp_path / "hf", to="hf").equal
    assert carnet.verify(model(QWEN), tmp_path / "hf").equal


def test_a_plan_with_a_lent_tower_is_saved_and_run(trained, model, tmp_path):
    runner = CliRunner()
    words = ["plan", trained, "--to", "hf", "--tower", model(QWEN), "-o", tmp_path / "x.plan"]
    assert runner.invoke(main, [*map(str, words)]).exit_code == 0
    assert runner.invoke(main, ["run", str(tmp_path / "x.plan"), str(tmp_path / "hf")]).exit_code == 0
    assert carnet.verify(trained, tmp_path / "hf", plan=tmp_path / "x.plan").equal


def test_a_tower_that_was_trained_is_never_replaced(model, tmp_path):
    assert carnet.cross(model(QWEN), tmp_path / "megatron", **THERE).equal
    with pytest.raises(BadRequest, match="has a tower of its own"):
        carnet.plan(tmp_path / "megatron", to="hf", tower=model(QWEN))


def test_what_lends_no_tower_is_refused(trained, model, tmp_path):
    assert carnet.cross(trained, tmp_path / "text", to="hf").equal
    with pytest.raises(BadRequest, match="a folder without a tower"):
        carnet.plan(trained, to="hf", tower=tmp_path / "text")
    with pytest.raises(BadRequest, match="is for a checkpoint of Megatron's"):
        carnet.plan(model(QWEN), to="hf", tower=model(QWEN))
    with pytest.raises(NotSupported, match="no known family"):
        carnet.plan(trained, to="hf", tower=model("Gemma3ForConditionalGeneration"))


def test_a_folder_that_lends_only_its_config_or_another_width_is_refused(trained, model, tmp_path):
    said = json.loads((model(QWEN) / "config.json").read_text())
    tensors = load_file(model(QWEN) / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "visual" not in name}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(BadRequest, match="a folder without a tower"):
        carnet.plan(trained, to="hf", tower=tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**said, "text_config": {**said["text_config"], "hidden_size": 128}}))
    with pytest.raises(BadRequest, match="for a text model of another hidden_size"):
        carnet.plan(trained, to="hf", tower=tmp_path)


def test_a_tower_that_changes_before_it_is_written_is_an_error(trained, model, tmp_path):
    shutil.copytree(model(QWEN), tmp_path / "lender")
    plan = carnet.plan(trained, to="hf", tower=tmp_path / "lender")
    with (tmp_path / "lender/model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    with pytest.raises(BadRequest, match="not the one that was planned"):
        carnet.run(plan, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"])
def test_the_layer_for_a_further_token_stands_beside_the_tower_and_is_the_text_models(name, model, tmp_path):
    """The hub has it above all prefixes, Megatron-Bridge below the text model's: models/qwen/qwen35_bridge.py."""
    shutil.copytree(model(name), tmp_path / "hf")
    held = load_file(tmp_path / "hf/model.safetensors")
    last = "model.language_model.layers.3."  # which attends
    like = {key.replace(last, "mtp.layers.0."): tensor * 2 for key, tensor in held.items() if key.startswith(last)}
    norm = held["model.language_model.norm.weight"]
    around = {
        f"mtp.{key}.weight": norm * by for by, key in enumerate(("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), 3)
    }
    further = {**like, **around, "mtp.fc.weight": torch.randn(64, 128, generator=torch.Generator().manual_seed(3))}
    save_file({**held, **further}, tmp_path / "hf/model.safetensors")
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", **THERE).equal
    stored = {stored for _, stored in carnet.inspect(tmp_path / "megatron").checkpoint.tensors}
    assert "language_model.mtp.layers.0.eh_proj.weight" in stored
    assert "language_model.mtp.layers.0.transformer_layer.self_attention.linear_proj.weight" in stored
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    assert carnet.verify(tmp_path / "hf", tmp_path / "back").equal
    found = load_file(tmp_path / "back/model.safetensors")
    assert [key for key in further if key in found and not torch.equal(found[key], further[key])] == []
    assert around.keys() <= found.keys()


def test_kimi_vl_is_kimi_k2_5_with_another_name_for_its_projector(model, tmp_path):
    """transformers has no class of it; names: vLLM's models/kimi_vl.py."""
    shutil.copytree(model("KimiK25ForConditionalGeneration"), tmp_path / "hf")
    held = load_file(tmp_path / "hf/model.safetensors")
    held = {key.replace("mm_projector.", "multi_modal_projector."): tensor for key, tensor in held.items()}
    save_file(held, tmp_path / "hf/model.safetensors")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config |= {"architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl"}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", **THERE).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    found = load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == held.keys()
    assert [key for key in held if not torch.equal(found[key], held[key])] == []
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "kimi_vl"


AGAIN = {
    "a projection": ("layers.1.self_attn.o_proj.weight", "model.language_model.layers.1.self_attn.o_proj.weight"),
    "one that transformers loads, too": ("layers.1.mlp.up_proj.weight", "language_model.layers.1.mlp.up_proj.weight"),
    "the head": ("embed_tokens.weight", "lm_head.weight"),
}


@pytest.mark.parametrize(("of", "name"), AGAIN.values(), ids=AGAIN)
def test_a_tensor_of_the_text_under_the_name_of_another_release_is_none_of_the_tower(of, name, model, tmp_path):
    """Which of the two transformers loads no file says."""
    shutil.copytree(model("Mistral3ForConditionalGeneration"), tmp_path / "hf")
    held = load_file(tmp_path / "hf/model.safetensors")
    tensor = held[f"language_model.model.{of}"].flip(0).contiguous()
    save_file({**held, name: tensor}, tmp_path / "hf/model.safetensors", {"format": "pt"})
    for target in ({"to": "hf"}, THERE):
        with pytest.raises(NotSupported, match="a tensor that carnet does not know") as refused:
            carnet.plan(tmp_path / "hf", **target)
        assert refused.value.facts["tensor"] == name
    assert carnet.cross(tmp_path / "hf", tmp_path / "out", to="hf", drop=(name,)).equal
