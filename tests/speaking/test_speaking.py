"""The model of the demo says what it learned: before the border, after it, and by whichever program runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import carnet

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
LEARNED = [story for story in (DEMO / "text.txt").read_text().strip().split("\n\n") if "? " in story[:30]]
QUESTIONS = [story[: story.index("?") + 1] for story in LEARNED]


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "hf"
    assert carnet.cross(DEMO / "checkpoint", out, to="hf", tokenizer=DEMO / "tokenizer")
    return out


def numpy_says(folder):
    done = subprocess.run([sys.executable, DEMO / "speak.py", folder, *QUESTIONS], capture_output=True, text=True, check=True)
    return [line.strip() for line in done.stdout.splitlines()]


def test_the_script_of_numpy_reads_the_answers_that_were_learned_out_of_both_sides(crossed):
    assert len(LEARNED) > 20
    assert numpy_says(DEMO / "checkpoint") == LEARNED
    assert numpy_says(crossed) == LEARNED


def test_the_script_imports_numpy_and_nothing_of_carnet(crossed):
    code = "import runpy, sys; sys.argv = ['', sys.argv[1]]; runpy.run_path(sys.argv.pop(), run_name='read'); "
    code += "print({name.partition('.')[0] for name in sys.modules} & {'carnet', 'torch', 'safetensors'})"
    done = subprocess.run([sys.executable, "-c", code, DEMO / "speak.py"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.referee
def test_transformers_generates_them_from_the_crossed_folder_alone(crossed):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(crossed), AutoTokenizer.from_pretrained(crossed)
    for question, learned in zip(QUESTIONS, LEARNED, strict=True):
        asked = tokenizer(question, return_tensors="pt")
        with torch.no_grad():
            [said] = model.generate(**asked, do_sample=False, max_new_tokens=200)
        assert tokenizer.decode(said, skip_special_tokens=True) == learned
        assert said[-1] == tokenizer.eos_token_id  # it ends by itself: the config says with which token


@pytest.mark.referee
def test_megatron_core_says_the_same_from_what_it_saved():
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    job = [*command, "tests.speaking.toy", DEMO / "checkpoint", QUESTIONS[0]]
    done = subprocess.run(job, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == LEARNED[0]


def test_inspect_takes_the_tokenizer_that_its_refusal_asks_for():
    refused = carnet.inspect(DEMO / "checkpoint")
    assert "--tokenizer" in refused.refusal.remedy
    assert carnet.inspect(DEMO / "checkpoint", tokenizer=DEMO / "tokenizer").inventory.vocabulary.tokens == 49
