"""model.sig is what OpenSSF's own command writes and reads, and the statement beside is in-toto's."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.json_format import Parse
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message
from safetensors.torch import load_file, save_file
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

import carnet
from carnet import signing
from carnet.cli import main
from carnet.examiner import document as documents
from carnet.examiner.tensor_files import digest, tensor_files_of
from carnet.formats.detect import open_checkpoint
from carnet.signing import Key, Trust
from carnet.storage.schemes import folder_at
from tests.signing.conftest import private
from tests.terminal import on_a_terminal


def said(*words, code=0):
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def of(findings):
    return [(finding.what, finding.where) for finding in findings]


def test_their_command_believes_our_signature_and_we_believe_theirs(chain, keys, theirs):
    said("sign", chain / "hf", "--key", keys.key)
    code, words = theirs("verify", "key", chain / "hf", "--signature", chain / "hf/model.sig", "--public_key", keys.public)
    assert code == 0, words
    ours = json.loads((chain / "hf/model.sig").read_text())
    (chain / "hf/model.sig").unlink()
    code, words = theirs("sign", "key", chain / "hf", "--signature", chain / "hf/model.sig", "--private_key", keys.key)
    assert code == 0, words
    checked = signing.check(chain / "hf", Trust(public_key=keys.public))
    assert checked
    assert set(checked.files) == {"carnet.json", "config.json", "model.safetensors", "carnet.intoto.jsonl"}
    payload, other = (
        json.loads(base64.b64decode(each["dsseEnvelope"]["payload"]))
        for each in (ours, json.loads((chain / "hf/model.sig").read_text()))
    )
    for each in (payload, other):
        each["predicate"]["serialization"]["ignore_paths"].sort()
    assert payload == other
    assert ours["verificationMaterial"] == json.loads((chain / "hf/model.sig").read_text())["verificationMaterial"]


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=["P-384", "P-521"])
def test_other_curves_sign(chain, make_keys, theirs, curve):
    keys = make_keys(curve)
    signing.sign(chain / "hf", Key(key=keys.key))
    assert signing.check(chain / "hf", Trust(public_key=keys.public))
    assert theirs("verify", "key", chain / "hf", "--signature", chain / "hf/model.sig", "--public_key", keys.public)[0] == 0


def test_a_certificate_is_believed_by_its_root_and_by_no_other(chain, keys, make_keys, theirs):
    said("sign", chain / "hf", "--key", keys.key, "--certificate", keys.certificate)
    assert "of 4 files" in said("verify", chain / "hf", "--signature", "--certificate-chain", keys.root)
    code, words = theirs(
        "verify", "certificate", chain / "hf", "--signature", chain / "hf/model.sig", "--certificate_chain", keys.root
    )
    assert code == 0, words
    found = signing.check(chain / "hf", Trust(certificate_chain=[make_keys().root]))
    assert of(found.findings) == [("the signature is not believed", "model.sig")]


def test_a_key_that_is_encrypted_needs_its_password(chain, keys, tmp_path):
    key = serialization.load_pem_private_key(keys.key.read_bytes(), None)
    locked, word = private(tmp_path / "locked", key, "open sesame"), tmp_path / "word"
    word.write_text("open sesame\n")
    assert "Password was not given" in said("sign", chain / "hf", "--key", locked, code=1)
    assert [*(chain / "hf").glob("*.sig"), *(chain / "hf").glob("*.jsonl")] == []
    said("sign", chain / "hf", "--key", locked, "--password-file", word)
    assert signing.check(chain / "hf", Trust(public_key=keys.public))


def test_what_was_changed_added_or_taken_away_is_named(chain, keys):
    signing.sign(chain / "ranks", Key(key=keys.key))
    with (chain / "ranks/rank1.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    (chain / "ranks/rank0.safetensors").rename(chain / "ranks/rank2.safetensors")
    assert of(signing.check(chain / "ranks", Trust(public_key=keys.public)).findings) == [
        ("missing", "rank0.safetensors"),
        ("file differs from the signed one", "rank1.safetensors"),
        ("not signed", "rank2.safetensors"),
    ]


def test_verify_says_the_file_by_the_signature_and_the_tensor_by_the_carnet(chain, keys):
    signing.sign(chain / "hf", Key(key=keys.key))
    before = said("verify", chain / "hf", "--signature", "--public-key", keys.public)
    assert "signature          by the key public, of 4 files" in before
    with (chain / "hf/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    found = json.loads(said("verify", chain / "hf", "--signature", "--public-key", keys.public, "--json", code=3))
    assert [(each["what"], each["where"]) for each in found["findings"]] == [
        ("file differs from the signed one", "model.safetensors"),
        ("digest differs", "lm_head.weight"),
    ]
    assert found["notes"]["signature"] == "broken: file differs from the signed one"


def test_a_document_that_was_made_to_fit_is_found_by_the_signature_alone(chain, keys):
    signing.sign(chain / "hf", Key(key=keys.key))
    with (chain / "hf/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    signature = (chain / "hf/model.sig").read_bytes()
    (chain / "hf/model.sig").unlink()
    document = json.loads((chain / "hf/carnet.json").read_text())
    checkpoint = open_checkpoint(folder_at(chain / "hf"))
    files = tensor_files_of(checkpoint)
    document["target"]["tensors"]["lm_head.weight"]["digest"] = digest(files, checkpoint.tensors["", "lm_head.weight"])
    files.files.close()
    (chain / "hf/carnet.json").write_text(documents.text(documents.sealed(document)))
    assert carnet.verify(chain / "hf")
    (chain / "hf/model.sig").write_bytes(signature)
    found = signing.check(chain / "hf", Trust(public_key=keys.public)).findings
    assert [finding.where for finding in found] == ["carnet.json", "model.safetensors"]


def test_another_key_is_not_believed(chain, keys, make_keys):
    signing.sign(chain / "hf", Key(key=keys.key))
    output = said("verify", chain / "hf", "--signature", "--public-key", make_keys().public, code=3)
    assert "the signature is not believed" in output
    assert "Key mismatch" in output


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"verificationMaterial": 3}', b"\xff\x00", b"[" * 100_000])
def test_a_signature_that_is_none_is_a_finding(chain, keys, damage):
    signing.sign(chain / "hf", Key(key=keys.key))
    (chain / "hf/model.sig").write_bytes(damage)
    found = signing.check(chain / "hf", Trust(public_key=keys.public))
    assert of(found.findings) == [("the signature is not believed", "model.sig")]


def test_a_signature_over_an_older_statement_is_found(chain, keys, theirs):
    signing.sign(chain / "hf", Key(key=keys.key))
    (chain / "hf/README.md").write_text("Now with words.\n")
    (chain / "hf/model.sig").unlink()
    theirs("sign", "key", chain / "hf", "--signature", chain / "hf/model.sig", "--private_key", keys.key)
    found = signing.check(chain / "hf", Trust(public_key=keys.public))
    assert of(found.findings) == [("the statement is of other files", "carnet.intoto.jsonl")]
    assert "README.md" in found.findings[0].detail


def test_what_the_signer_left_out_is_said(chain, keys, theirs):
    (chain / "hf/README.md").write_text("Words.\n")
    signature = ("--signature", chain / "hf/model.sig", "--private_key", keys.key, "--ignore-paths", chain / "hf/README.md")
    assert theirs("sign", "key", chain / "hf", *signature)[0] == 0
    assert str(signing.check(chain / "hf", Trust(public_key=keys.public))).endswith("but not of README.md")


def test_the_statement_is_in_totos_and_signed_as_dsse_says(chain, keys):
    said("sign", chain / "ranks", "--key", keys.key)
    lines = (chain / "ranks/carnet.intoto.jsonl").read_text().splitlines()
    assert len(lines) == 1
    envelope = Envelope.from_dict(json.loads(lines[0]))
    public = SSlibKey.from_crypto(serialization.load_pem_public_key(keys.public.read_bytes()))
    envelope.signatures[""].keyid = public.keyid
    assert envelope.verify([public], 1)  # securesystemslib's, of TUF and in-toto
    Statement.copy_from_pb(Parse(envelope.payload, Message())).validate()
    statement = json.loads(envelope.payload)
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    files = {path.name: path for path in (chain / "ranks").iterdir()}
    assert {each["name"]: each["digest"]["sha256"] for each in statement["subject"]} == {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if name not in ("model.sig", "carnet.intoto.jsonl")
    }
    document, built = json.loads((chain / "ranks/carnet.json").read_text()), statement["predicate"]["buildDefinition"]
    came_from = {each["name"]: each["digest"] for each in built["resolvedDependencies"]}
    source = hashlib.sha256((chain / "hf/carnet.json").read_bytes()).hexdigest()
    assert came_from.pop("hf/carnet.json") == {"sha256": source}
    assert came_from == {f"hf/{label}": {"xxh3_128": each["digest"]} for label, each in document["source"]["tensors"].items()}
    assert (built["externalParameters"]["to"], built["externalParameters"]["tp"]) == ("trtllm", 2)
    assert statement["predicate"]["runDetails"]["builder"]["version"]["carnet"] == carnet.__version__
    byproduct = {"name": "carnet.json", "digest": {"sha256": hashlib.sha256(files["carnet.json"].read_bytes()).hexdigest()}}
    assert statement["predicate"]["runDetails"]["byproducts"] == [byproduct]


def test_sha256_of_tensors_stands_in_the_document_and_the_statement_where_it_is_asked_for(chain, keys):
    assert "equal" in said("cross", chain / "hf", chain / "both", "--to", "hf", "--dtype", "f32", "--digest", "sha256")
    document = json.loads((chain / "both/carnet.json").read_text())
    assert document["digest"] == "xxh3-128, sha256"
    for folder, side in (("hf", "source"), ("both", "target")):
        held, described = load_file(chain / folder / "model.safetensors"), document[side]["tensors"]
        assert held.keys() == described.keys()
        for name, tensor in held.items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert described[name]["sha256"] == hashlib.sha256(raw).hexdigest()
    for options in ({}, {"digest": "sha256"}):
        assert carnet.verify(chain / "hf", chain / "both", dtype="f32", **options)
    signing.sign(chain / "both", Key(key=keys.key))
    statement = json.loads(base64.b64decode(json.loads((chain / "both/carnet.intoto.jsonl").read_text())["payload"]))
    came_from = {each["name"]: each["digest"] for each in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert came_from["hf/lm_head.weight"]["sha256"] == document["source"]["tensors"]["lm_head.weight"]["sha256"]
    document["target"]["tensors"]["lm_head.weight"]["sha256"] = "0" * 64
    (chain / "both/carnet.json").write_text(documents.text(documents.sealed(document)))
    assert of(carnet.verify(chain / "both").findings) == [("sha256 differs", "lm_head.weight")]
    assert not carnet.verify(chain / "hf", chain / "both", dtype="f32", digest="sha256")


def test_the_statement_of_a_sum_has_the_sha256_of_all_its_sources(chain, keys):
    tensors = load_file(chain / "hf/model.safetensors")
    shutil.copytree(chain / "hf", chain / "tuned")
    save_file({name: value * 2 for name, value in tensors.items()}, chain / "tuned/model.safetensors", {"format": "pt"})
    (chain / "tuned/carnet.json").unlink()
    assert carnet.merge([chain / "hf", chain / "tuned"], chain / "soup", [0.5, 0.5], digest="sha256")
    signing.sign(chain / "soup", Key(key=keys.key))
    statement = json.loads(base64.b64decode(json.loads((chain / "soup/carnet.intoto.jsonl").read_text())["payload"]))
    came_from = {each["name"]: each["digest"] for each in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    for folder in ("hf", "tuned"):
        for name, tensor in load_file(chain / folder / "model.safetensors").items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert came_from[f"{folder}/{name}"]["sha256"] == hashlib.sha256(raw).hexdigest()


def test_a_signed_folder_is_a_source_whose_signature_stays_behind(chain, keys):
    signing.sign(chain / "hf", Key(key=keys.key))
    verdict = carnet.cross(chain / "hf", chain / "again", to="hf", dtype="f32")
    assert verdict
    assert {path.name for path in (chain / "again").iterdir()} == {"carnet.json", "config.json", "model.safetensors"}
    assert verdict.examination.dropped["signatures"] == ("carnet.intoto.jsonl", "model.sig")
    assert carnet.verify(chain / "run", chain / "hf")


@pytest.mark.parametrize("to", ["megatron", "trtllm", "hf"])
def test_a_signed_target_of_every_layout_is_read_and_verified(chain, keys, to):
    assert carnet.cross(chain / "hf", chain / "target", to=to)
    signing.sign(chain / "target", Key(key=keys.key))
    assert carnet.verify(chain / "target")
    assert carnet.verify(chain / "hf", chain / "target")
    assert carnet.cross(chain / "target", chain / "back", to="hf")


def test_the_document_of_a_signed_folder_is_not_written_again(chain, keys, theirs):
    signing.sign(chain / "hf", Key(key=keys.key))
    before = (chain / "hf/carnet.json").read_bytes()
    assert "stays as it was signed" in carnet.verify(chain / "run", chain / "hf", seal=True).document
    assert (chain / "hf/carnet.json").read_bytes() == before
    plan = carnet.plan(chain / "run", to="hf")
    carnet.run(plan, chain / "written")
    theirs("sign", "key", chain / "written", "--signature", chain / "written/model.sig", "--private_key", keys.key)
    verdict = carnet.verify(chain / "run", chain / "written")
    assert verdict
    assert "stays as it was signed" in verdict.document
    assert signing.check(chain / "written", Trust(public_key=keys.public))


def test_what_is_not_proven_or_signed_already_is_not_signed(chain, keys):
    carnet.run(carnet.plan(chain / "run", to="hf"), chain / "written")
    assert "nobody has compared the target with its source" in said("sign", chain / "written", "--key", keys.key, code=1)
    said("sign", chain / "hf", "--key", keys.key)
    assert "signed already" in said("sign", chain / "hf", "--key", keys.key, code=1)
    assert "there is no carnet.json" in said("sign", chain / "run", "--key", keys.key, code=1)
    assert "the target is not signed" in said("verify", chain / "ranks", "--public-key", keys.public, code=1)


def test_words_that_do_not_go_together_are_usage_errors(chain, keys):
    assert "sign with what?" in said("sign", chain / "hf", code=2)
    assert "whose signature is believed?" in said("verify", chain / "hf", "--signature", code=2)
    assert "whose signature is believed?" in said("verify", chain / "hf", "--identity", "me", code=2)
    assert "cannot be used" in said("sign", chain / "hf", "--key", keys.public, code=1)
    assert (
        "cannot be used" in said("verify", chain / "hf", "--public-key", keys.key, code=1)
        if (chain / "hf/model.sig").exists()
        else True
    )


@pytest.mark.parametrize("verb", ["sign", "verify"])
def test_where_sigstore_does_not_answer_that_is_said_and_nothing_is_written(chain, keys, tmp_path, verb):
    words = ["--sigstore", "--identity-token", token()]
    if verb == "verify":
        signing.sign(chain / "hf", Key(key=keys.key))
        words = ["--identity", "somebody@example.com", "--identity-provider", "https://accounts.example.com"]
    before = {path.name: path.read_bytes() for path in (chain / "hf").iterdir()}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {
        **os.environ,
        **nowhere,
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "carnet", verb, str(chain / "hf"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, lines[0]) == (1, "", "carnet: Sigstore does not answer")
    assert lines[-1].startswith("  try: let this machine reach Sigstore")
    assert len(lines) == 3
    assert {path.name: path.read_bytes() for path in (chain / "hf").iterdir()} == before


def token():
    """Return the token of an identity, as far as anybody can tell without asking who gave it."""
    now = int(time.time())
    who = {"aud": "sigstore", "iss": "https://accounts.example.com", "sub": "somebody", "email": "somebody@example.com"}
    parts = {"alg": "none"}, {**who, "email_verified": True, "iat": now, "nbf": now, "exp": now + 600}
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(each).encode()).rstrip(b"=").decode() for each in parts), "c2ln"])


def test_progress_is_told_on_the_thread_that_called_until_all_is_read(chain, keys):
    told = []

    def show(at):
        told.append((at, threading.current_thread()))

    signing.sign(chain / "hf", Key(key=keys.key), progress=show)
    size = sum(
        path.stat().st_size for path in (chain / "hf").iterdir() if path.name not in ("model.sig", "carnet.intoto.jsonl")
    )
    assert told[-1][0] == carnet.Progress("signing", size, size)
    assert {thread for _, thread in told} == {threading.main_thread()}
    told.clear()
    assert signing.check(chain / "hf", Trust(public_key=keys.public), progress=show)
    assert told[-1][0].done == told[-1][0].total > size
    assert {thread for _, thread in told} == {threading.main_thread()}


def test_a_bar_shows_how_far_the_hashing_is(chain, keys):
    shown = on_a_terminal("-m", "carnet", "sign", chain / "hf", "--key", keys.key)
    assert [*dict.fromkeys(line.split()[0] for line in shown if "━" in line)] == ["hashing", "signing"]
    shown = on_a_terminal("-m", "carnet", "verify", chain / "hf", "--public-key", keys.public)
    assert [*dict.fromkeys(line.split()[0] for line in shown if "━" in line)] == ["hashing", "examining"]


@pytest.mark.parametrize("verb", ["sign", "check"])
def test_a_callback_that_raises_stops_the_hashing_and_nothing_is_written(chain, keys, verb):
    if verb == "check":
        signing.sign(chain / "hf", Key(key=keys.key))
    before = sorted(path.name for path in (chain / "hf").iterdir())

    def stop(at):
        if at.total:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        {
            "sign": lambda: signing.sign(chain / "hf", Key(key=keys.key), progress=stop),
            "check": lambda: signing.check(chain / "hf", Trust(public_key=keys.public), progress=stop),
        }[verb]()
    assert sorted(path.name for path in (chain / "hf").iterdir()) == before


def test_without_the_extra_the_refusal_says_how_it_comes(chain, keys, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/model_signing.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'model_signing'\", name='model_signing')"
    )
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'bare')!r}); from carnet.__main__ import main; sys.exit(main())"
    words = [sys.executable, "-c", program, "sign", str(chain / "hf"), "--key", str(keys.key)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'carnet[sign]'" in done.stderr
