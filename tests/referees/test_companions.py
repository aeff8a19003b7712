"""Folders as they are published and as Megatron leaves them cross into ones that transformers uses: it loads, templates, stops."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import carnet
from carnet.errors import BadCheckpoint, BadRequest

pytestmark = pytest.mark.referee
GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEMPLATES = {"default": "{{ messages[0].content }}", "tool_use": "tools: {{ messages[0].content }}"}
MODEL = """from transformers import LlamaForCausalLM
from .shared.helping import twice
from .configuration_own import OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def doubled(self):
        return twice(self.config.num_hidden_layers)
"""
CONFIG = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    own = True\n"
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def tokenizer(folder, words=60, eos=7, **more):
    """Save a tokenizer of so many words, w0 to w59, two of which are special."""
    model = WordLevel({f"w{at}": at for at in range(words)}, unk_token="w0")
    plain = Tokenizer(model)
    plain.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="w1", eos_token=f"w{eos}", **more)
    fast.chat_template = TEMPLATES
    fast.save_pretrained(folder)
    return fast


def model(folder, **more):
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=7, pad_token_id=None, **more))
    made.save_pretrained(folder)
    return made


def same_bytes(one, other):
    return (one.read_bytes(), other.read_bytes()).count(one.read_bytes()) == 2


def test_everything_beside_the_weights_goes_along_or_is_named(tmp_path):
    source, target = tmp_path / "m", tmp_path / "out"
    model(source)
    tokenizer(source)
    goes = "README.md LICENSE tekken.json qwen.tiktoken preprocessor_config.json video_preprocessor_config.json".split()
    goes += ["custom_generate/generate.py", "custom_generate/requirements.txt", "tokenizer.model.v3"]
    stays = "adapter_config.json adapter_model.safetensors pytorch_model.bin loose.py .gitattributes what.dat".split()
    for name in (*goes, *stays):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    (source / "original").mkdir()
    verdict = carnet.cross(source, target, to="hf")
    assert verdict.equal
    named = [name for names in verdict.examination.dropped.values() for name in names]
    assert sorted(named) == sorted([*stays, "original/"])
    assert all(same_bytes(source / name, target / name) for name in (*goes, "generation_config.json", "tokenizer.json"))
    planned = carnet.plan(source, to="hf")
    assert sorted(name for names in planned.dropped.values() for name in names) == sorted(named)
    assert "lacks" not in verdict.notes
    loaded = AutoTokenizer.from_pretrained(target)
    assert loaded.chat_template == TEMPLATES
    talk = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(talk, tokenize=False, chat_template="tool_use") == "tools: hi"


def test_names_that_no_terminal_shows_stay_behind_under_what_can_be_shown(tmp_path):
    model(tmp_path / "m")
    for name in (b"README\xff.md", b"x\xff.dat", b"LICENSE\x1b[31m"):
        (tmp_path / "m" / os.fsdecode(name)).touch()
    verdict = carnet.cross(tmp_path / "m", tmp_path / "out", to="hf")
    assert verdict.examination.dropped == {
        "files that carnet does not know": ("x\\udcff.dat",),
        "papers": ("LICENSE\\x1b[31m", "README\\udcff.md"),
    }


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "additional_chat_templates/a.jinja"])
@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_a_fifo_and_a_link_that_leads_out_are_refused_before_anything_is_written(kind, name, tmp_path):
    model(tmp_path / "m")
    (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "m" / name) if kind == "fifo" else (tmp_path / "m" / name).symlink_to("/etc/hostname")
    with pytest.raises(BadCheckpoint, match="is not a regular file" if kind == "fifo" else "leads out of the folder"):
        carnet.cross(tmp_path / "m", tmp_path / "out", to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_code_that_a_config_names_goes_along_with_what_it_imports_and_transformers_runs_it(tmp_path, monkeypatch):
    source, target = tmp_path / "m", tmp_path / "out"
    model(source)
    code = {
        "modeling_own.py": MODEL.replace(".shared.helping", ".helping"),
        "configuration_own.py": CONFIG,
        "helping.py": "from .deeper import two\ndef twice(x):\n    return two * x\n",
        "deeper.py": "two = 2\n",
        "unnamed.py": "raise SystemExit\n",
    }
    for name, text in code.items():
        (source / name).write_text(text)
    said = json.loads((source / "config.json").read_text())
    remote = {"AutoModel": "someone/else--modeling_other.Other"}
    (source / "config.json").write_text(json.dumps({**said, "auto_map": {**AUTO_MAP, **remote, "AutoModelForX": "gone.X"}}))
    verdict = carnet.cross(source, target, to="hf")
    assert verdict.examination.dropped == {"code that no config names": ("unnamed.py",)}
    assert json.loads((target / "config.json").read_text())["auto_map"] == {**AUTO_MAP, **remote}
    shutil.rmtree(source)
    loaded = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    assert (type(loaded).__name__, loaded.doubled()) == ("OwnModel", 4)
    assert AutoConfig.from_pretrained(target, trust_remote_code=True).own


def test_a_model_from_megatron_stops_where_the_tokenizer_s_folder_says(tmp_path):
    source = GOLDENS / "llama_te_pp2_vpp"
    plain, target = tmp_path / "plain", tmp_path / "out"
    verdict = carnet.cross(source, plain, to="hf")
    assert verdict.notes["lacks"].startswith("a tokenizer and the id of the token that ends a text: --tokenizer DIR")
    prompt = torch.tensor([[3, 4, 5]])
    endless = AutoModelForCausalLM.from_pretrained(plain)
    said = endless.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    assert len(said) == 9
    end = said[5]
    for folder, generation in (("with", True), ("without", False)):
        tokenizer(tmp_path / folder, 251, end)
        if generation:
            GenerationConfig(eos_token_id=[end, 250], bos_token_id=1).save_pretrained(tmp_path / folder)
        verdict = carnet.cross(source, target / folder, to="hf", tokenizer=tmp_path / folder)
        assert verdict.equal
        assert "lacks" not in verdict.notes
        assert json.loads((target / folder / "config.json").read_text())["eos_token_id"] == ([end, 250] if generation else end)
        loaded = AutoModelForCausalLM.from_pretrained(target / folder)
        assert loaded.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist() == said[: said.index(end, 3) + 1]
        assert (target / folder / "additional_chat_templates/tool_use.jinja").is_file()


@pytest.mark.parametrize("said", ['{"temperature": 0.6}', '{"eos_token_id": null}', "{"])
def test_a_generation_config_that_ends_no_text_hides_the_config_s_end_and_that_is_said(tmp_path, said):
    made = model(tmp_path / "m")
    tokenizer(tmp_path / "m")
    assert "lacks" not in carnet.cross(tmp_path / "m", tmp_path / "ends", to="hf").notes
    (tmp_path / "m/generation_config.json").write_text(said)
    line = "an eos_token_id in generation_config.json, without which no text ends: write it there"
    assert carnet.plan(tmp_path / "m", to="hf").notes["lacks"] == line
    assert carnet.cross(tmp_path / "m", tmp_path / "out", to="hf").notes["lacks"] == line
    if said != "{":  # which transformers does not load
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id is None
        assert made.config.eos_token_id == 7
    (tmp_path / "m/generation_config.json").unlink()
    assert "lacks" not in carnet.cross(tmp_path / "m", tmp_path / "none", to="hf").notes
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "none").generation_config.eos_token_id == 7


def test_ids_that_are_contradicted_are_said_and_left_out(tmp_path):
    tokenizer(tmp_path / "t", 251, 7)
    GenerationConfig(eos_token_id=9, bos_token_id=1).save_pretrained(tmp_path / "t")
    source = GOLDENS / "llama_te_pp2_vpp"
    plan = carnet.plan(source, to="hf", tokenizer=tmp_path / "t")
    assert "eos: 9 of generation_config.json, 7 of the tokenizer" in plan.notes["token ids"]
    config = json.loads(next(text.text for text in plan.texts if text.name == "config.json"))
    assert "eos_token_id" not in config
    assert config["bos_token_id"] == 1


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", [7, [7, 9]])
def test_the_id_that_ends_a_text_survives_megatron(tmp_path, eos, where):
    model(tmp_path / "m")
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "m" / name).read_text())
        said["eos_token_id"] = eos if name == where else None
        (tmp_path / "m" / name).write_text(json.dumps(said))
    carnet.cross(tmp_path / "m", tmp_path / "meg", to="megatron")
    carnet.cross(tmp_path / "meg", tmp_path / "back", to="hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] == eos


def test_a_tokenizer_with_more_tokens_than_rows_is_refused_and_one_with_fewer_is_said(tmp_path):
    source = GOLDENS / "llama_te_pp2_vpp"  # 251 tokens, 256 rows
    for words in (200, 251, 254, 300):
        tokenizer(tmp_path / str(words), words)
    with pytest.raises(BadRequest, match="the tokenizer has more tokens than the model has rows") as refusal:
        carnet.plan(source, to="hf", tokenizer=tmp_path / "254")
    assert refusal.value.remedy == "--vocab-size 254"
    assert carnet.plan(source, to="hf", tokenizer=tmp_path / "254", vocab_size=254).proof["vocabulary rows left out"] == 2
    with pytest.raises(BadRequest, match="the tokenizer has more tokens than the model has rows") as refusal:
        carnet.plan(source, to="hf", tokenizer=tmp_path / "300")
    assert "trained with" in refusal.value.remedy
    assert (
        carnet.plan(source, to="hf", tokenizer=tmp_path / "200").notes["tokenizer"].startswith("200 tokens; the last 51 rows")
    )
    assert "tokenizer" not in carnet.plan(source, to="hf", tokenizer=tmp_path / "251").notes


def test_the_tokenizer_answers_for_a_run_that_had_a_hugging_face_tokenizer(tmp_path):
    source = shutil.copytree(GOLDENS / "llama_te_pp2_vpp", tmp_path / "meg")
    common = next(source.rglob("common.pt"))
    state = torch.load(common, weights_only=False)
    state["args"].tokenizer_type, state["args"].vocab_size = "HuggingFaceTokenizer", 200
    torch.save(state, common)
    tokenizer(tmp_path / "t", 240)
    with pytest.raises(BadRequest, match="do not say how many tokens the vocabulary has"):
        carnet.cross(source, tmp_path / "no", to="hf")
    verdict = carnet.cross(source, tmp_path / "out", to="hf", tokenizer=tmp_path / "t")
    assert (verdict.equal, verdict.vocabulary.tokens, verdict.vocabulary.padding) == (True, 240, 16)
    assert json.loads((tmp_path / "out/carnet.json").read_text())["vocabulary"]["left out as padding"] == 16
    assert "16 left out as padding (the tokenizer)" in verdict.notes["vocabulary"]


logging.getLogger("transformers").setLevel(logging.ERROR)
