"""carnet expect from end to end: the digests of what each rank holds by rules of its own, and a server that says something else."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import carnet
from carnet.cli.engines import expect as command
from carnet.engines.comparing import compare
from carnet.engines.expected import save
from carnet.engines.table import ENGINES
from carnet.errors import BadOption, BadRequest
from tests.referees.engine_ranks import SCALES, SIZES, Worker

MEGATRON = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"
MODELS = {"llama": LlamaConfig(**SIZES), "tied": LlamaConfig(**SIZES, tie_word_embeddings=True)}
# the names of a file -> those by which vLLM digests: of a tensor that has two, the one that was registered first
FIRST = {"tied": {"lm_head.weight": "model.embed_tokens.weight"}}
KEY = "dp0:pp0:pcp0:tp{}:{}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, config in MODELS.items():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        made[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(made[name])
    return made


def by_the_rules(folder, name, tp):
    """Return the digests of all ranks, of tensors that no code of carnet's has made."""
    whole, said, found = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), {}
    for rank in range(tp):
        for stored, tensor in Worker(whole, said, rank, tp).everything():
            if not stored.endswith(SCALES):
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[KEY.format(rank, FIRST.get(name, {}).get(stored, stored))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_digests_are_those_of_what_each_rank_holds(folders, name, tp):
    found = carnet.expect(folders[name], tp=tp)
    assert found.checksums == by_the_rules(folders[name], name, tp)
    assert not found.coded


def test_any_layout_of_the_same_weights_has_the_same_digests(folders, tmp_path):
    wanted = carnet.expect(folders["llama"], tp=2).checksums
    for to, more in (("megatron", {"tp": 2, "spelling": "local"}), ("trtllm", {"tp": 4}), ("vllm", {"tp": 1})):
        assert carnet.cross(folders["llama"], tmp_path / to, to=to, **more).equal
        assert carnet.expect(tmp_path / to, tp=2, vocab_size=97).checksums == wanted, to


def test_stages_and_types_are_those_that_the_engine_was_started_with():
    found, cast = carnet.expect(MEGATRON, tp=2, pp=2).checksums, carnet.expect(MEGATRON, tp=2, pp=2, dtype="fp16").checksums
    assert {key.rpartition(":")[0] for key in found} == {f"dp0:pp{pp}:pcp0:tp{tp}" for pp in (0, 1) for tp in (0, 1)}
    assert found.keys() == cast.keys()
    assert not {*found.values()} & {*cast.values()}


def test_codes_and_their_scales_are_expected_as_they_are_loaded_and_no_difference_where_a_kernel_packs_them(tmp_path):
    torch.manual_seed(3)
    wide = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "num_attention_heads": 4})
    AutoModelForCausalLM.from_config(wide).bfloat16().save_pretrained(tmp_path / "plain")
    coded = {"quantize": "fp8-block", "style": "compressed-tensors"}
    assert carnet.cross(tmp_path / "plain", tmp_path / "coded", to="hf", **coded).equal
    found = carnet.expect(tmp_path / "coded", tp=2)
    name = KEY.format(1, "model.layers.1.self_attn.o_proj.weight")
    tensor = load_file(tmp_path / "coded/model.safetensors")["model.layers.1.self_attn.o_proj.weight"].chunk(2, 1)[1]
    assert found.checksums[name] == hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    assert {name, f"{name}_scale", KEY.format(1, "model.layers.1.self_attn.attn.k_scale")} <= found.coded
    assert not any("norm" in key or "embed" in key or "lm_head" in key for key in found.coded)
    kept = {key: digest for key, digest in found.checksums.items() if ".attn." not in key}
    seen = compare(found, kept | {name: "0" * 64})
    assert seen
    assert {each.name for each in seen.different} == set()
    assert name.rpartition(":")[2] in {each.name for each in seen.apart}


def test_nothing_is_written_beside_the_checkpoint(folders):
    before = sorted(path.name for path in folders["llama"].parent.rglob("*"))
    carnet.expect(folders["llama"], tp=2)
    assert sorted(path.name for path in folders["llama"].parent.rglob("*")) == before


def test_what_is_saved_is_what_was_found_and_other_options_are_refused(folders, tmp_path):
    found, saved = carnet.expect(folders["llama"], tp=2), tmp_path / "expected.json"
    assert run(folders["llama"], "--tp", 2, "-o", saved)[0] == 0
    assert json.loads(saved.read_text())["checksums"] == found.checksums
    kept = carnet.expect(saved)
    assert (kept.checksums, kept.tp, kept.release, kept.coded) == (found.checksums, 2, "0.32", frozenset())
    assert carnet.expect(saved, tp=2, engine="vllm").checksums == found.checksums
    with pytest.raises(BadRequest, match="saved with other options"):
        carnet.expect(saved, tp=4)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"carnet-expected": 1}', '{"carnet-expected": 2}', '{"carnet-expected": 1, "checksums": 3}']
)
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadRequest, match="expected digests"):
        carnet.expect(tmp_path / "x.json")


def test_what_is_no_file_of_digests_is_not_replaced(folders, tmp_path):
    expected, weights = carnet.expect(folders["llama"]), tmp_path / "model.safetensors"
    shutil.copy(folders["llama"] / "model.safetensors", weights)
    with pytest.raises(BadRequest, match="exists and holds no expected digests"):
        save(expected, weights)
    assert weights.read_bytes() == (folders["llama"] / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(weights)
    for place, said in (
        (weights, "no expected digests"),
        (tmp_path / "no" / "x.json", "not exist"),
        (tmp_path / "link", "link"),
    ):
        code, _, told = run(tmp_path, "-o", place)  # of no checkpoint: it is said before one is read
        assert code == 1
        assert said in told
    for _ in range(2):
        save(expected, tmp_path / "x.json")
    assert carnet.expect(tmp_path / "x.json").checksums == expected.checksums


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tp", float("inf")),
        ("tp", 2.5),
        ("tp", "2"),
        ("checksums", {}),
        ("checksums", {"dp0:pp0:pcp0:tp0:model.norm.weight": None}),
        ("checksums", {"dp0:pp0:pcp0:tp0:model.norm.weight": "E3B0"}),
        ("other checksums", [{}]),
    ],
)
def test_a_file_that_says_what_no_digest_can_be_is_refused(folders, tmp_path, key, value):
    save(carnet.expect(folders["llama"]), tmp_path / "x.json")
    said = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**said, key: value}))
    with pytest.raises(BadRequest, match="holds no expected digests"):
        carnet.expect(tmp_path / "x.json")


def test_an_engine_that_nobody_knows_is_a_wrong_option(folders):
    with pytest.raises(BadOption, match="no engine is called 'tgi'"):
        carnet.expect(folders["llama"], engine="tgi")


def test_the_command_knows_the_engines():
    option = next(param for param in command.params if param.name == "engine")
    assert option.metavar == f"[{'|'.join(ENGINES)}]"


# --- beside a server ----------------------------------------------------------------------------------------------------------


class Says(BaseHTTPRequestHandler):
    """Says the digests that its server has."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"checksums": self.server.digests}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = HTTPServer(("127.0.0.1", 0), Says)
    thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def run(*words):
    done = subprocess.run(
        [sys.executable, "-m", "carnet", "expect", *map(str, words)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_the_exit_code_says_what_was_found(folders, server, tmp_path):
    held, url = by_the_rules(folders["llama"], "llama", 2), f"http://127.0.0.1:{server.server_port}"
    saved = tmp_path / "e.json"
    assert run(folders["llama"], "--tp", 2, "-o", saved)[0] == 0
    server.digests = held
    code, out, _ = run(saved, "--against", url)
    assert code == 0
    assert re.search(r"^equal +http://127.0.0.1:\d+ holds ", out)
    assert "30 of 30 parameters of all ranks: 30 equal, 0 different" in out

    name = "model.layers.1.self_attn.qkv_proj.weight"
    server.digests = held | {KEY.format(0, name): held[KEY.format(1, name)], KEY.format(1, name): held[KEY.format(0, name)]}
    code, out, _ = run(saved, "--against", url)
    assert code == 3
    assert [line.split() for line in out.splitlines() if line.startswith(name)] == [
        [name, f"dp0:pp0:pcp0:tp{rank}", "holds", KEY.format(1 - rank, name)] for rank in (0, 1)
    ]
    code, out, _ = run(saved, "--against", url, "--json")
    assert (code, json.loads(out)["equal"], len(json.loads(out)["different"])) == (3, False, 2)

    server.digests = dict.fromkeys(held, hashlib.sha256().hexdigest())
    code, out, err = run(saved, "--against", url)
    assert code == 1
    assert "30: packed by the engine: no bytes are left" in out
    assert err.startswith("carnet: nothing that the engine holds can be compared")


def test_a_wrong_url_is_a_usage_error_and_a_silent_port_is_not(folders):
    assert run(folders["llama"], "--against", "localhost:8000")[0] == 2
    code, out, err = run(folders["llama"], "--against", "http://127.0.0.1:1")
    assert (code, out) == (1, "")
    assert "Connection refused" in err
