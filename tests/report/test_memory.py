"""What carnet promises of memory holds for pictures too: tensors are drawn tile by tile."""

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import carnet
from tests.peak import SAMPLED
from tests.report.reading import MODEL

BUDGET = 100_000_000
CHILD = f"""
{SAMPLED}
from carnet.report.gathering import of_target
thread.start()
page = of_target(sys.argv[1] + "/" + sys.argv[2], sys.argv[1] + "/hf", memory={BUDGET}, threads=1)
stop()
print(len(page.damages), len(page.losses), peak)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose embedding is as large as the budget, and targets with damages in it and in codes."""
    made = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=50_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=1,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made / "hf")
    for name, quantize in (("plain", None), ("codes", "mxfp8")):
        carnet.cross(made / "hf", made / name, to="hf", quantize=quantize)
        tensors = load_file(made / name / MODEL)
        tensors["model.embed_tokens.weight"][49_000:, 5] += 1
        if quantize:
            tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[4000:, :9] = 1
        save_file(tensors, made / name / MODEL, metadata={"format": "pt"})
    return made


@pytest.mark.parametrize(("name", "damaged", "lost"), [("plain", 1, 0), ("codes", 2, 6)])
def test_drawing_stays_inside_the_budget(folder, name, damaged, lost):
    done = subprocess.run([sys.executable, "-c", CHILD, folder, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    damages, losses, peak = map(int, done.stdout.split())
    assert (damages, losses) == (damaged, lost)
    assert peak <= BUDGET
