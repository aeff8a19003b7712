"""Sums of checkpoints that lie in a store, into a store."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import carnet
from carnet import merging

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


@pytest.mark.parametrize("to", [{"to": "hf", "shard_size": "40k"}, {"to": "trtllm", "tp": 2}], ids=str)
def test_a_sum_of_a_store_s_and_a_disk_s_has_the_same_bytes_in_a_store(store, tmp_path, to):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path / name)
    one, out = store.fill(tmp_path / "a", "a"), f"{store.url}/models/sum"
    assert merging.merge([one, tmp_path / "b"], out, [0.3, 0.7], **to).equal
    assert merging.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "sum", [0.3, 0.7], **to).equal
    names = {path.name for path in (tmp_path / "sum").iterdir()}
    assert names == {path.name for path in (store.folder / "models/sum").iterdir()}
    for name in names - {"carnet.json"}:
        assert (store.folder / "models/sum" / name).read_bytes() == (tmp_path / "sum" / name).read_bytes()
    assert merging.verify([one, tmp_path / "b"], out, [0.3, 0.7]).equal
    with pytest.raises(carnet.BadRequest, match="exists"):
        merging.merge([one, tmp_path / "b"], out, [0.3, 0.7], **to)
