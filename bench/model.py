"""Write the Hugging Face folder that is quantized: a Llama of 0.6 billion random bf16 weights, saved by transformers itself.

Beside it lies a file of largest activations, one number for every layer: the same for all, because no figure here depends on them.
"""

import shutil
import sys
from pathlib import Path

AMAX = 3.5


def prepare(work: Path) -> tuple[Path, Path]:
    """Return the model's folder and the file of activations, written where they are not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n")
    folder, amaxes = work / "hf-llama", work / "amax.safetensors"
    if not amaxes.exists():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        _write(folder, amaxes)
    return folder, amaxes


def _write(folder: Path, amaxes: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    linear = [name for name, module in model.named_modules() if name.endswith("_proj") and isinstance(module, torch.nn.Linear)]
    save_file({f"{name}.input_amax": torch.tensor(AMAX, dtype=torch.float32) for name in linear}, amaxes)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
