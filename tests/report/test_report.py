"""Reports of real crossings: their numbers are those of --json, nothing in them asks the network, no name in them is code."""

import json
import shutil
import sys
import zlib
from base64 import b64decode

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import carnet
from bench.published import published, shapes
from bench.skeleton import nbytes, write
from carnet.examiner.scales import octaves
from carnet.quantize.recipes import BY_NAME
from carnet.report import html, running
from carnet.report.flow import flow
from carnet.report.held import Held, held_in
from carnet.report.page import Page
from carnet.report.running import MOST, Run
from tests.report.reading import HOSTILE, MODEL, Read, call


def pixels(url):
    """Return how opaque the pixels of an image are, 0 to 255."""
    raw, at, data, shape = b64decode(url.partition("base64,")[2]), 8, b"", (0, 0)
    while at < len(raw):
        size, kind = int.from_bytes(raw[at : at + 4]), raw[at + 4 : at + 8]
        body = raw[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(raw[at + 8 + size : at + 12 + size])
        if kind == b"IHDR":
            shape = int.from_bytes(body[4:8]), int.from_bytes(body[:4])
        data += body if kind == b"IDAT" else b""
        at += 12 + size
    return np.frombuffer(zlib.decompress(data), np.uint8).reshape(shape[0], shape[1] + 1)[:, 1:]


def as_json(*words):
    return json.loads(call(*words, "--json").stdout)


@pytest.mark.parametrize(("out", "source"), [("hf", "run"), ("fp8", "hf"), ("ranks", "run"), ("f32", "run")])
def test_its_bands_have_the_bytes_of_the_files_headers(crossed, out, source):
    found = Read(crossed / f"{out}.html")
    here = as_json("inspect", crossed / out, "--tensors")["tensors"]
    there = as_json("inspect", crossed / source, "--tensors")
    rows = found.rows("streams")
    parts = {"embedding", "attention", "MLP", "head", "norms", "other"}
    assert {row[0] for row in rows} & parts == {row[0] for row in rows if row[0] in parts}
    assert sum(int(row[3]) for row in rows if row[0] in parts) == sum(each["nbytes"] for each in here.values())
    stored = sum(each["nbytes"] for each in there["tensors"].values()) + sum(there["objects"].values())
    assert sum(int(row[3]) for row in rows if row[0] not in parts) == stored
    attention = sum(each["nbytes"] for name, each in here.items() if "attn" in name or "attention." in name)
    assert sum(int(row[3]) for row in rows if row[0] == "attention") == attention


def test_a_band_is_named_by_what_became_of_its_bytes(crossed):
    fates = {out: {row[2] for row in Read(crossed / f"{out}.html").rows("streams")} for out in ("hf", "fp8", "ranks", "f32")}
    assert fates == {
        "hf": {"as it is", "padding", "left behind"},
        "fp8": {"as it is", "quantized"},
        "ranks": {"as it is", "padding", "stored again", "left behind"},
        "f32": {"as it is", "cast", "padding", "left behind"},
    }


def test_codes_that_are_carried_are_as_they_are_and_codes_that_are_read_are_dequantized(crossed, tmp_path):
    for name, words, fate in (("kept", (), "as it is"), ("read", ("--dtype", "bf16"), "dequantized")):
        html_file = tmp_path / f"{name}.html"
        assert call("cross", crossed / "fp8", tmp_path / name, "--to", "hf", *words, "--report", html_file).exit_code == 0
        found = {row[2] for row in Read(html_file).rows("streams") if row[0] == "MLP"}
        assert call("report", tmp_path / name, "-o", html_file).exit_code == 0  # the document says the same
        assert found == {row[2] for row in Read(html_file).rows("streams") if row[0] == "MLP"} == {fate}


def test_what_codes_lose_is_what_verify_says_and_what_torch_computes(crossed):
    call("report", crossed / "fp8", crossed / "hf", "-o", crossed / "again.html")
    found, codes = Read(crossed / "again.html"), as_json("verify", crossed / "hf", crossed / "fp8")["codes"]
    worst = [[row[0], round(float(row[1]), 3), int(row[2])] for row in found.rows("worst")]
    assert worst == [[each["tensor"], each["snr dB"], each["saturated"]] for each in codes["worst"]]
    assert f"{codes['weights']} weights" in found.text
    assert f"{codes['snr dB']:.1f} dB over all" in found.text
    ours, theirs = (load_file(crossed / name / MODEL) for name in ("hf", "fp8"))
    kinds = {row[0].split("modelopt")[0].strip(): float(row[2]) for row in found.rows("kinds")}
    assert len(kinds) == 7
    for kind, module in {"attention.q": "self_attn.q_proj", "mlp.down": "mlp.down_proj"}.items():
        signal = noise = 0.0
        for layer in range(4):
            name = f"model.layers.{layer}.{module}.weight"
            weight, scale = ours[name].double(), theirs[f"{name}_scale"].double().reshape(-1, 1)
            signal += float(weight.square().sum())
            noise += float((theirs[name].double() * scale - weight).square().sum())
        assert kinds[kind] == pytest.approx(10 * np.log10(signal / noise), abs=1e-4)


def test_scales_are_counted_by_powers_of_two():
    for name, scale in (
        ("modelopt/mxfp8", np.array([127, 127, 120, 0], np.uint8)),
        ("modelopt/fp8-channel", np.float32([1.5, 1, 2**-7, 0])),
    ):
        found = octaves(BY_NAME[name], scale, None)
        assert (found[0], found[-7]) == (2, 1)


def test_a_document_alone_is_drawn_as_it_says_and_says_what_it_does_not_know(crossed):
    assert call("report", crossed / "fp8", "-o", crossed / "alone.html").exit_code == 0
    found, codes = Read(crossed / "alone.html"), json.loads((crossed / "fp8/carnet.json").read_text())["proof"]["codes"]
    assert [float(row[1]) for row in found.rows("worst")] == [each["snr dB"] for each in codes["worst"]]
    assert "nothing was examined for this report" in found.text
    assert "was not recorded" in found.text
    assert not found.images
    ours = as_json("inspect", crossed / "hf", "--tensors")["tensors"]
    assert sum(int(row[3]) for row in found.rows("streams") if row[0] == "hf") == sum(each["nbytes"] for each in ours.values())


def test_damages_are_listed_as_verify_lists_them_and_drawn_where_they_are(damaged):
    told = call("report", damaged / "bad-hf", damaged / "run", "-o", damaged / "bad-hf.html")
    assert told.exit_code == 3
    found, said = Read(damaged / "bad-hf.html"), as_json("verify", damaged / "run", damaged / "bad-hf")["findings"]
    assert found.rows("findings") == [[each["what"], each["where"], each["stored"], each["detail"]] for each in said]
    drawn = {pixels(url).shape: pixels(url) for url in found.images}
    assert np.argwhere(drawn[64, 64]).tolist() == [[5, 7]]
    assert {*np.argwhere(drawn[96, 64])[:, 0].tolist()} == {*range(20, 40)}


def test_wrong_codes_and_wrong_scales_are_drawn_where_they_are(damaged):
    assert call("report", damaged / "bad-fp8", damaged / "hf", "-o", damaged / "bad-fp8.html").exit_code == 3
    found = Read(damaged / "bad-fp8.html")
    codes, scales = (next(pixels(url) for url in found.images if pixels(url).shape == shape) for shape in ((64, 64), (96, 64)))
    rows, columns = np.nonzero(codes)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 8, 10, 29)
    assert np.argwhere(scales.any(axis=1)).ravel().tolist() == [4]


def test_what_a_file_calls_a_tensor_is_text(damaged):
    call("report", damaged / "bad-hf", damaged / "run", "-o", damaged / "hostile.html")
    found = Read(damaged / "hostile.html")
    assert HOSTILE in found.text
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "foreignobject"}
    assert not [name for _, said in found.tags for name in said if name.startswith("on") or name == "style"]


@pytest.mark.parametrize("out", ["hf", "fp8", "ranks"])
def test_nothing_in_it_is_fetched(crossed, out):
    found = Read(crossed / f"{out}.html")
    addresses = [
        value for _, said in found.tags for name, value in said.items() if name in ("href", "src", "action", "xlink:href")
    ]
    assert all(each.startswith("data:image/png;base64,") for each in addresses)
    policy = next(said["content"] for _, said in found.tags if said.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    text = (crossed / f"{out}.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "url(http" not in text


def test_a_report_changes_nothing_of_the_target(crossed, tmp_path):
    carnet.cross(crossed / "run", tmp_path / "hf", to="hf")
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (crossed / "hf" / file.name).read_bytes(), file.name


def test_the_course_of_a_run_is_kept_in_few_samples(monkeypatch):
    monkeypatch.setattr(running, "private_memory", lambda: 1)  # a look that takes no time is taken at every call
    run = Run(every=0.0)
    for done in range(10 * MOST):
        run(carnet.Progress("writing", done, 10 * MOST))
    assert 0 < len(run.samples) < 2 * MOST
    assert [each.done for each in run.samples] == sorted(each.done for each in run.samples)


def test_a_checkpoint_alone_is_drawn_by_its_headers(crossed, tmp_path):
    done = call("inspect", crossed / "run", "--html", tmp_path / "run.html")
    assert done.exit_code == 0
    assert "family             llama" in done.stdout
    found = Read(tmp_path / "run.html")
    assert {row[1] for row in found.rows("streams")} >= {"embedding", "attention", "MLP", "norms", "head"}
    assert "layers 0-3 \N{MULTIPLICATION SIGN} 4" in " ".join(found.text.split())


def test_one_that_is_not_understood_is_drawn_with_why(crossed, tmp_path):
    broken = shutil.copytree(crossed / "hf", tmp_path / "hf")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    assert call("inspect", broken, "--html", tmp_path / "x.html").exit_code == 1
    assert "NobodyForCausalLM" in Read(tmp_path / "x.html").text


def test_an_altered_document_is_a_finding(crossed, tmp_path):
    copy = shutil.copytree(crossed / "hf", tmp_path / "hf")
    document = (copy / "carnet.json").read_text().replace('"family": "llama"', '"family": "mistral"')
    (copy / "carnet.json").write_text(document)
    assert call("report", copy, "-o", tmp_path / "x.html").exit_code == 3
    assert "the carnet was altered" in Read(tmp_path / "x.html").text


def test_a_report_goes_where_nobody_else_has_a_file(crossed, tmp_path):
    (tmp_path / "letter.html").write_text("<p>mine</p>")
    for words in (
        ("report", crossed / "hf", "-o"),
        ("inspect", crossed / "hf", "--html"),
        ("cross", crossed / "run", tmp_path / "out", "--to", "hf", "--report"),
    ):
        done = call(*words, tmp_path / "letter.html")
        assert done.exit_code == 1
        assert "exists and is not a report" in done.stderr
    assert (tmp_path / "letter.html").read_text() == "<p>mine</p>"
    assert not (tmp_path / "out").exists()
    (tmp_path / "link").symlink_to(crossed / "hf")
    for place, why in (
        (crossed / "hf/report.html", "no part of a target"),
        (tmp_path / "link/report.html", "no part of a target"),
        (tmp_path / "none/report.html", "there is no folder"),
    ):
        done = call("report", crossed / "hf", "-o", place)
        assert (done.exit_code, why in done.stderr) == (1, True), done.stderr
    done = call("cross", crossed / "run", tmp_path / "out", "--to", "hf", "--report", tmp_path / "out")
    assert (done.exit_code, "no part of a target" in done.stderr, (tmp_path / "out").exists()) == (1, True, False)
    for _ in range(2):  # its own it replaces
        assert call("report", crossed / "hf", "-o", tmp_path / "again.html").exit_code == 0
    assert [*tmp_path.glob(".*")] == []


def test_where_there_is_no_document_the_source_is_asked_for(crossed, tmp_path):
    copy = shutil.copytree(crossed / "hf", tmp_path / "hf")
    (copy / "carnet.json").unlink()
    done = call("report", copy, "-o", tmp_path / "x.html")
    assert (done.exit_code, "carnet report OUT SRC" in done.stderr) == (1, True)
    assert call("report", copy, crossed / "run", "-o", tmp_path / "x.html").exit_code == 0
    assert call("report", crossed / "hf", "--dtype", "bf16", "-o", tmp_path / "y.html").exit_code == 1


def test_options_mean_what_they_mean_to_verify(crossed, tmp_path):
    words = ("report", crossed / "f32", crossed / "run", "-o", tmp_path / "x.html")
    assert call(*words).exit_code == 3
    assert call(*words, "--dtype", "f32").exit_code == 0
    carnet_plan = tmp_path / "f32.plan"
    assert call("plan", crossed / "run", "--to", "hf", "--dtype", "f32", "-o", carnet_plan).exit_code == 0
    assert call(*words, "--plan", carnet_plan).exit_code == 0


def test_weights_of_tied_models_are_told_as_stored_again(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    assert call("cross", tmp_path / "hf", tmp_path / "ranks", "--to", "trtllm", "--report", tmp_path / "x.html").exit_code == 0
    rows = Read(tmp_path / "x.html").rows("streams")
    assert [int(row[3]) for row in rows if row[2] == "stored again"] == [64 * 32 * 2]


def test_json_is_what_is_drawn(crossed, tmp_path):
    done = call("report", crossed / "fp8", crossed / "hf", "-o", tmp_path / "x.html", "--json")
    said, found = json.loads(done.stdout), Read(tmp_path / "x.html")
    streams = [[each["start"], each["end"], each["fate"], str(each["nbytes"])] for each in said["flow"]["streams"]]
    assert found.rows("streams") == streams
    kinds = {row[0].split("modelopt")[0].strip(): (round(float(row[2]), 3), int(row[3])) for row in found.rows("kinds")}
    assert kinds == {each["name"]: (each["snr dB"], each["saturated"]) for each in said["loss"]["kinds"]}
    assert sum(each["weights"] for each in said["loss"]["kinds"]) == said["loss"]["weights"] == 28
    assert all(
        sum(each["octaves"].values()) == each["elements"] // 64 for each in said["loss"]["kinds"] if each["name"] != "mlp.down"
    )
    assert len(found.images) == len(said["pictures"]["lost"]) == 6


def test_without_the_library_a_report_is_refused_before_anything_is_written(crossed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = call("cross", crossed / "run", tmp_path / "hf", "--to", "hf", "--report", tmp_path / "x.html")
    assert (done.exit_code, "pip install 'carnet[report]'" in done.stderr) == (1, True)
    assert not (tmp_path / "hf").exists()
    assert call("cross", crossed / "run", tmp_path / "hf", "--to", "hf").exit_code == 0


def test_a_target_that_nobody_examined_says_so(crossed, tmp_path):
    assert call("plan", crossed / "run", "--to", "hf", "-o", tmp_path / "x.plan").exit_code == 0
    assert call("run", tmp_path / "x.plan", tmp_path / "hf").exit_code == 0
    assert call("report", tmp_path / "hf", "-o", tmp_path / "x.html").exit_code == 0
    assert "compared with its source by nobody" in Read(tmp_path / "x.html").text
    assert call("report", tmp_path / "hf", crossed / "run", "-o", tmp_path / "x.html").exit_code == 0
    assert json.loads((tmp_path / "hf/carnet.json").read_text())["state"] == "proven"  # as verify finishes it
    assert "documentproven" in Read(tmp_path / "x.html").text


def test_what_was_asked_for_of_another_kind_is_refused(crossed, tmp_path):
    carnet.merge([crossed / "hf", crossed / "hf"], tmp_path / "sum", weights=[0.5, 0.5])
    assert call("report", tmp_path / "sum", "-o", tmp_path / "x.html").exit_code == 0
    done = call("report", tmp_path / "sum", crossed / "hf", "-o", tmp_path / "x.html")
    assert (done.exit_code, "a sum is not examined for a report" in done.stderr) == (1, True)


@pytest.mark.referee
def test_deepseek_v3_in_its_own_size_is_a_small_report(tmp_path):
    name, config = next(each for each in published() if "DeepSeek-V3" in each[0])
    tensors = shapes(config)
    write(tmp_path, tensors, config)
    assert call("inspect", tmp_path, "--html", tmp_path / "x.html").exit_code == 0, name
    found = Read(tmp_path / "x.html")
    assert (tmp_path / "x.html").stat().st_size < 200_000
    assert sum(int(row[3]) for row in found.rows("streams")) == sum(map(nbytes, tensors.values())) > 1_300_000_000_000
    assert found.text.count("parameters each") == 2  # dense layers and mixtures
    assert "layers 3-60" in found.text


def test_a_document_of_as_many_tensors_is_drawn_from_its_words(tmp_path):
    side = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": {
            "dtype": "f8_e4m3",
            "shape": [2048, 7168],
            "digest": "0" * 32,
            "layout": f"expert moe_ffn hidden: layers.{layer}.moe.{part} (expert moe_ffn)",
        }
        for layer in range(58)
        for expert in range(256)
        for part in ("gate", "up", "down")
    }
    page = Page("big", "v3", "said", {}, flow(held_in({"tensors": side}), held_in({"tensors": side}), "v3"))
    html.write(page, tmp_path / "x.html")
    assert [int(row[3]) for row in Read(tmp_path / "x.html").rows("streams")] == [58 * 256 * 3 * 2048 * 7168] * 2
    assert (tmp_path / "x.html").stat().st_size < 100_000


def test_many_files_are_runs_of_files_and_a_number_is_not_cut():
    files = [f"model-{number:05}-of-00163.safetensors" for number in range(1, 164)]
    rows = [Held(file, {"embed": 1}, "bf16", (1,), 2, {file: 2}) for file in reversed(files)]
    found = flow([*rows, Held("state", {}, "", (), 5, {"": 5}, left="random state")], [])
    first, *_, last, rest = found.sources.items()
    assert (first, last, rest) == (("00001 … 00021 (21)", 42), ("00148 … 00163 (16)", 32), ("other files", 5))
