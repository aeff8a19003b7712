"""Train the model of the demo with the real megatron-core, on four ranks without a GPU, and save it as Megatron-LM does; or ask it.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc-per-node 4 -m tests.speaking.toy demo/checkpoint
    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc-per-node 1 -m tests.speaking.toy demo/checkpoint 'Who are you?'

Training takes some minutes. What it learns is demo/text.txt, a character at a time; what it wrote is in the repository.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling

from tests.optimizer.ranks import OnCpu, save, step, trained, without_gpu

DEMO = Path(__file__).parents[2] / "demo"
END, LENGTH, BATCH, STEPS = "<|end|>", 160, 16, 2000
ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 56,
    "ffn_hidden_size": 112,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 14,
    "max_position_embeddings": 512,
    "tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer_model": "demo/tokenizer",
    "make_vocab_size_divisible_by": 32,
    "padded_vocab_size": 64,
    "bf16": True,
}


def spell(stories):
    """Write the tokenizer: a character a token, and one that stands before and after every text."""
    characters = sorted(set("".join(stories)))
    vocabulary = {each: number for number, each in enumerate([END, *characters])}
    added = {"id": 0, "content": END, "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    single = [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    begin = {"type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}]}
    begin["special_tokens"] = {END: {"id": END, "ids": [0], "tokens": [END]}}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [added],
        "post_processor": begin,
        "decoder": {"type": "Fuse"},
        "model": model,
    }
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "model_max_length": 512}
    folder = DEMO / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1, ensure_ascii=False) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=1) + "\n")
    return vocabulary


def batches(stories, vocabulary):
    """Yield windows of all stories one after the other, in an order that is always the same."""
    stream = torch.tensor([each for story in stories for each in (0, *(vocabulary[letter] for letter in story))])
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(stream), (BATCH, 1), generator=generator)
        yield stream[(starts + torch.arange(LENGTH + 1)) % len(stream)]


def train(root, job, stories, vocabulary):
    *parts, said = trained(job)
    for number, batch in zip(range(STEPS), batches(stories, vocabulary), strict=False):
        loss = step(batch, *parts)
        if dist.get_rank() == 0 and number % 100 == 0:
            print(f"step {number}  loss {loss:.3f}", flush=True)
    save({**job, "save": root, "no_save_optim": True}, {**said, "vocab_size": len(vocabulary)}, parts, STEPS)


def ask(root, job, vocabulary, question):
    """Load the model and print what it finds likeliest, letter by letter."""
    [model], *_ = trained(job)
    model.eval()
    state = {"model": model.sharded_state_dict(metadata={})}
    loaded = dist_checkpointing.load(state, f"{root}/iter_{STEPS:07d}", strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    model.load_state_dict(loaded["model"])
    letters = {number: letter for letter, number in vocabulary.items()}
    tokens = [0, *(vocabulary[letter] for letter in question)]
    while len(tokens) < 2 or tokens[-1]:
        with torch.no_grad():
            scores = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
        tokens.append(int(scores[0, -1, : len(vocabulary)].argmax()))
    print("".join(letters[each] for each in tokens[1:-1]))


def main():
    root, *questions = sys.argv[1:]
    dist.init_process_group("gloo")
    without_gpu()
    cut = {"tp": 1, "pp": 1} if questions else {"tp": 2, "pp": 2}
    parallel_state.initialize_model_parallel(*cut.values())
    job = {**cut, "form": "plain", "bf16": True, "tied": True, "decay": STEPS, "arguments": ARGUMENTS}
    stories = (DEMO / "text.txt").read_text().strip().split("\n\n")
    with OnCpu():
        if questions:
            vocabulary = json.loads((DEMO / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
            ask(root, job, vocabulary, *questions)
        else:
            train(root, job, stories, spell(stories))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
