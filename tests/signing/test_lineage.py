"""A target is followed back to where it came from, and what does not hold is named."""

import json
import shutil

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import carnet
from carnet import deltas, lineage, signing
from carnet.cli import main
from carnet.examiner import document as documents
from carnet.signing import Key


def said(*words, code=0):
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def names(found):
    return [each.folder.rsplit("/chain/", 1)[-1] for each in found.stages]


def test_a_chain_leads_back_to_the_store_of_the_training(chain):
    found = lineage.follow(chain / "ranks")
    assert found
    assert names(found) == ["ranks", "hf", "run/iter_0000001"]
    assert [[link.tensors for link in each.links] for each in found.stages] == [[39], [0], []]
    assert [each.state for each in found.stages] == ["proven", "proven", ""]
    read = lineage.follow(chain / "ranks", read=True)
    assert read.stages[1].links[0].tensors == 9


def test_a_longer_chain_over_every_layout_is_followed(chain):
    assert carnet.cross(chain / "ranks", chain / "store", to="megatron", tp=2)
    assert carnet.cross(chain / "store", chain / "last", to="hf", dtype="f32")
    assert names(lineage.follow(chain / "last")) == ["last", "store", "ranks", "hf", "run/iter_0000001"]
    assert carnet.cross(chain / "fp8", chain / "plain", to="hf", dtype="bf16")
    assert names(lineage.follow(chain / "plain", read=True)) == ["plain", "fp8", "hf", "run/iter_0000001"]


def test_a_folder_that_has_another_name_now_is_found_by_its_digests(chain):
    (chain / "hf").rename(chain / "renamed")
    assert names(lineage.follow(chain / "ranks")) == ["ranks", "renamed", "run/iter_0000001"]


def test_a_copy_of_a_copy_is_not_its_own_source(chain):
    assert carnet.cross(chain / "hf", chain / "one", to="hf")
    assert carnet.cross(chain / "one", chain / "two", to="hf")
    assert names(lineage.follow(chain / "two")) == ["two", "one", "hf", "run/iter_0000001"]


def test_a_folder_that_moved_away_is_missing_until_it_is_said_where(chain, tmp_path):
    (tmp_path / "archive/2026").mkdir(parents=True)
    shutil.move(chain / "hf", tmp_path / "archive/2026/hf")
    output = said("lineage", chain / "ranks", code=3)
    assert "its source 'hf' is not here; --at hf=FOLDER says where it lies" in output
    place = tmp_path / "archive/2026/hf"
    assert "back to" in said("lineage", chain / "ranks", "--at", f"hf={place}")
    assert "back to" in said("lineage", chain / "ranks", "--beside", tmp_path / "archive", "--beside", chain)
    assert "is no place" in said("lineage", chain / "ranks", "--at", "hf", code=2)


def test_a_source_that_was_made_again_otherwise_is_named_with_its_tensor(chain):
    shutil.rmtree(chain / "hf")
    assert carnet.cross(chain / "run", chain / "hf", to="hf", dtype="f16")
    found = json.loads(said("lineage", chain / "ranks", "--json", code=3))
    assert found["whole"] is False
    assert "model.embed_tokens.weight has another digest there" in found["stages"][0]["links"][0]["problem"]


def test_a_first_source_that_changed_is_found_when_it_is_read(chain):
    assert carnet.cross(chain / "hf", chain / "other", to="hf")
    (chain / "hf/carnet.json").unlink()
    tensors = load_file(chain / "hf/model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, chain / "hf/model.safetensors", {"format": "pt"})
    assert lineage.follow(chain / "other")
    found = lineage.follow(chain / "other", read=True)
    assert [words for _, words in found.problems] == [
        f"{chain / 'hf'} is not what it was made from: lm_head.weight has another digest there; --at hf=FOLDER says where it lies"
    ]
    del tensors["lm_head.weight"]
    save_file(tensors, chain / "hf/model.safetensors", {"format": "pt"})
    assert not lineage.follow(chain / "other")


def test_what_nobody_compared_and_what_was_altered_is_named(chain):
    carnet.run(carnet.plan(chain / "hf", to="hf"), chain / "written")
    assert "nobody has compared it with its source" in said("lineage", chain / "written", code=3)
    document = json.loads((chain / "hf/carnet.json").read_text())
    document["request"]["tp"] = 8
    (chain / "hf/carnet.json").write_text(json.dumps(document))
    assert "the carnet was altered" in said("lineage", chain / "ranks", code=3)
    (chain / "hf/carnet.json").write_text("{")
    assert not lineage.follow(chain / "ranks")


def test_a_sum_has_several_parents(chain):
    tensors = load_file(chain / "hf/model.safetensors")
    shutil.copytree(chain / "hf", chain / "tuned")
    (chain / "tuned/carnet.json").unlink()
    save_file({name: value * 2 for name, value in tensors.items()}, chain / "tuned/model.safetensors", {"format": "pt"})
    assert carnet.merge([chain / "hf", chain / "tuned"], chain / "soup", [0.5, 0.5])
    found = lineage.follow(chain / "soup", read=True)
    assert found
    assert names(found) == ["soup", "hf", "tuned", "run/iter_0000001"]
    assert [link.tensors for link in found.stages[0].links] == [39, 39]
    shutil.rmtree(chain / "tuned")
    assert [words.split(";")[0] for _, words in lineage.follow(chain / "soup").problems] == ["its source 'tuned' is not here"]


def test_deltas_are_followed_step_by_step_to_their_base(chain):
    tensors = load_file(chain / "hf/model.safetensors")
    for at in (1, 2):
        shutil.copytree(chain / "hf", chain / f"step{at}")
        (chain / f"step{at}/carnet.json").unlink()
        changed = {name: value + at if name == "lm_head.weight" else value for name, value in tensors.items()}
        save_file(changed, chain / f"step{at}/model.safetensors", {"format": "pt"})
    deltas.delta(chain / "hf", chain / "step1", chain / "d1")
    deltas.delta(chain / "step1", chain / "step2", chain / "d2", after=chain / "d1")
    deltas.apply(chain / "hf", [chain / "d1", chain / "d2"], chain / "applied")
    found = lineage.follow(chain / "applied")
    assert found
    assert names(found) == ["applied", "d1", "d2", "hf", "run/iter_0000001"]
    shutil.rmtree(chain / "d2")
    assert [words.split(";")[0] for _, words in lineage.follow(chain / "applied").problems] == [
        "the delta 000001 to 000002 is not here"
    ]


def test_a_delta_leads_to_both_its_versions(chain):
    tensors = load_file(chain / "hf/model.safetensors")
    shutil.copytree(chain / "hf", chain / "tuned")
    save_file({name: value * 2 for name, value in tensors.items()}, chain / "tuned/model.safetensors", {"format": "pt"})
    (chain / "tuned/carnet.json").unlink()
    assert carnet.cross(chain / "tuned", chain / "next", to="hf")
    deltas.delta(chain / "hf", chain / "next", chain / "d1")
    found = lineage.follow(chain / "d1")
    assert found
    assert names(found) == ["d1", "hf", "next", "run/iter_0000001", "tuned"]
    assert [(link.name, link.tensors) for link in found.stages[0].links] == [("000000", 39), ("000001", 39)]
    deltas.apply(chain / "hf", [chain / "d1"], chain / "applied")
    shutil.rmtree(chain / "next")
    assert lineage.follow(chain / "applied")  # where it leads to is what was made
    assert names(lineage.follow(chain / "d1")) == ["d1", "hf", "applied", "run/iter_0000001"]
    (chain / "applied").rename(chain.parent / "elsewhere/away")
    lost = lineage.follow(chain / "d1", beside=[chain]).problems
    assert [words for _, words in lost] == ["its source '000001' is not here; --at 000001=FOLDER says where it lies"]
    assert lineage.follow(chain / "d1", beside=[chain], at={"000001": chain.parent / "elsewhere/away"})


def test_signatures_along_the_way_are_checked_by_the_key_that_is_said(chain, keys, make_keys):
    for name in ("hf", "ranks"):
        signing.sign(chain / name, Key(key=keys.key))
    assert "not checked" in said("lineage", chain / "ranks")
    assert said("lineage", chain / "ranks", "--public-key", keys.public).count("by the key public") == 2
    assert "the signature is not believed" in said("lineage", chain / "ranks", "--public-key", make_keys().public, code=3)
    tensors = load_file(chain / "hf/model.safetensors")
    save_file(
        {name: torch.zeros_like(value) for name, value in tensors.items()}, chain / "hf/model.safetensors", {"format": "pt"}
    )
    assert "model.safetensors" in said("lineage", chain / "ranks", "--public-key", keys.public, code=3)


def test_a_folder_without_a_document_has_no_lineage(chain):
    assert "nothing says where this came from" in said("lineage", chain / "run", code=1)


def test_documents_that_were_made_up_prove_nothing(chain):
    true = json.loads((chain / "ranks/carnet.json").read_text())
    merge = {"merge": {"sources": {"x": {"tensors": 3}}, "names": []}}
    for damage in ({"source": {}}, {"source": 3}, {"source": {"tensors": {"a": 1}}}, {"dropped": {"a": 3}, **merge}):
        (chain / "ranks/carnet.json").write_text(documents.text(documents.sealed({**true, **damage})))
        assert not lineage.follow(chain / "ranks")
    (chain / "ranks/carnet.json").write_text(documents.text(documents.sealed({**true, "dropped": {"a": 3}})))
    assert lineage.follow(chain / "ranks")
