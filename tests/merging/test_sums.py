"""Sums are those of torch, whatever the layouts, and the same bytes whoever many work."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import carnet
from carnet import merging
from carnet.cli import main
from tests.merging.conftest import SIZES, WEIGHTS, differences, linear, same, tensors


def files(folder):
    """Return the bytes of every file of tensors."""
    found = {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.suffix in (".safetensors", ".distcp")
    }
    assert found
    return found


@pytest.mark.parametrize("dtype", [None, "f32", "f16"])
def test_a_linear_sum_is_that_of_torch(runs, tmp_path, dtype):
    assert merging.merge(runs.hf, tmp_path / "out", WEIGHTS, dtype=dtype)
    wanted = {None: None, "f32": torch.float32, "f16": torch.float16}[dtype]
    assert same(tensors(tmp_path / "out"), linear(runs.hf, WEIGHTS, wanted))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == SIZES["hidden_size"]


@pytest.mark.parametrize("weights", [(1.0, 0.7), (0.4, -2.5)])
def test_a_base_and_what_others_differ_from_it_are_those_of_torch(runs, tmp_path, weights):
    assert merging.merge(runs.hf, tmp_path / "out", weights, method="task_arithmetic")
    assert same(tensors(tmp_path / "out"), differences(runs.hf, weights))
    assert merging.verify(runs.hf, tmp_path / "out", weights, method="task_arithmetic")
    assert not merging.verify(runs.hf, tmp_path / "out", weights[::-1], method="task_arithmetic")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("mixed", [(1, 0, 0), (1, 1, 1), (0, 1, 1)])
def test_sums_do_not_depend_on_the_layouts(runs, tmp_path, mixed, method):
    weights = WEIGHTS if method == "linear" else WEIGHTS[1:]
    sources = [(plain, other)[at] for plain, other, at in zip(runs.hf, runs.other, mixed, strict=True)]
    for name, each in (("plain", runs.hf), ("mixed", sources)):
        assert merging.merge(each, tmp_path / name, weights, method=method, vocab_size=96)
    assert files(tmp_path / "mixed") == files(tmp_path / "plain")
    assert merging.verify(sources, tmp_path / "mixed", weights, method=method, vocab_size=96)


TARGETS = [
    ("megatron", {"tp": 2, "pp": 2}),
    ("megatron", {"spelling": "local"}),
    ("trtllm", {"tp": 4}),
    ("trtllm", {"pp": 2, "tp": 2}),
]


@pytest.mark.parametrize(("to", "cut"), TARGETS)
def test_a_sum_in_another_layout_is_the_sum_crossed(runs, tmp_path, to, cut):
    merging.merge(runs.hf, tmp_path / "hf", WEIGHTS)
    carnet.cross(tmp_path / "hf", tmp_path / "crossed", to=to, **cut)
    for name, sources in (("plain", runs.hf), ("other", runs.other)):
        assert merging.merge(sources, tmp_path / name, WEIGHTS, to=to, vocab_size=96, **cut)
        assert files(tmp_path / name) == files(tmp_path / "crossed")
        assert carnet.verify(tmp_path / name)


FAMILIES = {
    "Mixtral": {"num_local_experts": 2, "num_key_value_heads": 2, "intermediate_size": 64},
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_summed_and_proven_in_any_layout(family, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} if family != "GPT2" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=96, bos_token_id=1, eos_token_id=2, **sizes, **FAMILIES[family]
    )
    kind = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    for name in "ab":
        model = kind(config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name)
    accept = ("needs",) if family == "Gemma2" else ()
    carnet.cross(tmp_path / "b", tmp_path / "b-megatron", to="megatron", accept=accept)
    sources = [tmp_path / "a", tmp_path / "b"]
    assert merging.merge(sources, tmp_path / "out", [0.25, 0.75])
    assert same(tensors(tmp_path / "out"), linear(sources, [0.25, 0.75]))
    assert merging.merge([sources[0], tmp_path / "b-megatron"], tmp_path / "mixed", [0.25, 0.75], vocab_size=96, accept=accept)
    assert merging.merge(sources, tmp_path / "megatron", [0.25, 0.75], to="megatron", tp=2, accept=accept)


@pytest.mark.parametrize("pattern", ["*norm*", "layers.*.attention.q", "model.layers.1.*", "lm_head.weight"])
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_what_is_kept_is_the_first_ones(runs, tmp_path, pattern, to):
    assert merging.merge(runs.hf, tmp_path / "out", WEIGHTS, keep=pattern, to=to)
    assert merging.verify(runs.hf, tmp_path / "out", WEIGHTS, keep=[pattern])
    assert not merging.verify(runs.hf, tmp_path / "out", WEIGHTS)
    carnet.cross(tmp_path / "out", tmp_path / "back", to="hf", vocab_size=96)
    found, first, sums = tensors(tmp_path / "back"), tensors(runs.hf[0]), linear(runs.hf, WEIGHTS)
    kept = {name for name in found if torch.equal(found[name], first[name])}
    expected = {
        "*norm*": {name for name in found if "norm" in name},
        "layers.*.attention.q": {name for name in found if "q_proj" in name},
        "model.layers.1.*": {name for name in found if ".1." in name},
        "lm_head.weight": {"lm_head.weight"},
    }[pattern]
    assert kept == expected
    assert all(torch.equal(found[name], sums[name]) for name in found.keys() - kept)


def test_a_checkpoint_counts_with_the_numbers_that_it_has(runs, tmp_path):
    """Of f32 no bit is lost before the sum; the type of the target is that of the first."""
    shutil.copytree(runs.hf[1], tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    fine = {name: value.float() + 1e-6 for name, value in tensors(runs.hf[1]).items()}
    save_file(fine, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    assert merging.merge([runs.hf[0], tmp_path / "b"], tmp_path / "out", [0.5, 0.5])
    assert same(tensors(tmp_path / "out"), linear([runs.hf[0], tmp_path / "b"], [0.5, 0.5]))
    assert merging.merge([tmp_path / "b", runs.hf[0]], tmp_path / "f32", [0.5, 0.5])
    assert same(tensors(tmp_path / "f32"), linear([tmp_path / "b", runs.hf[0]], [0.5, 0.5], torch.float32))


@pytest.mark.parametrize("means", [{"threads": 1}, {"threads": 7}, {"memory": "91M", "threads": 2}])
def test_the_bytes_do_not_depend_on_who_works(runs, tmp_path, means):
    merging.merge(runs.other, tmp_path / "one", WEIGHTS, vocab_size=96)
    merging.merge(runs.other, tmp_path / "other", WEIGHTS, vocab_size=96, **means)
    assert files(tmp_path / "one") == files(tmp_path / "other")


class Killed(Exception):
    pass


def test_a_merge_that_was_stopped_goes_on_where_it_stopped(runs, tmp_path):
    def stop(at):
        if at.done > at.total // 3:
            raise Killed

    with pytest.raises(Killed):
        merging.merge(runs.hf, tmp_path / "out", WEIGHTS, threads=1, memory="91M", progress=stop)
    again = []
    assert not (tmp_path / "out").exists()
    assert merging.merge(runs.hf, tmp_path / "out", WEIGHTS, threads=1, memory="91M", progress=again.append)
    assert next(at for at in again if at.total).done > 0
    assert same(tensors(tmp_path / "out"), linear(runs.hf, WEIGHTS))


def test_a_merge_with_other_weights_does_not_go_on(runs, tmp_path):
    def stop(at):
        if at.done > at.total // 3:
            raise Killed

    with pytest.raises(Killed):
        merging.merge(runs.hf, tmp_path / "out", WEIGHTS, threads=1, progress=stop)
    with pytest.raises(carnet.BadRequest, match="another plan"):
        merging.merge(runs.hf, tmp_path / "out", WEIGHTS[::-1])


def test_the_document_names_all_sources(runs, tmp_path, capsys):
    main(
        ["merge", *map(str, runs.hf), str(tmp_path / "out"), "--weights", "0.5,0.3,0.5", "--keep", "*norm*"],
        standalone_mode=False,
    )
    told = capsys.readouterr().out
    assert "they sum to 1.3" in told
    assert "0.5 x " in told
    assert "*norm*" in told
    said = json.loads((tmp_path / "out" / "carnet.json").read_text())["merge"]
    assert (said["method"], said["keep"], said["names"]) == ("linear", ["*norm*"], ["a", "b", "c"])
    names = {name for path in runs.hf[1].glob("*.safetensors") for name in load_file(path)}
    assert {len(said["sources"]), *said["sources"]} == {2, "2", "3"}
    assert said["sources"]["2"]["tensors"].keys() == names
