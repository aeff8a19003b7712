"""Let the demo's model answer, with numpy alone: python demo/speak.py CHECKPOINT QUESTION...

CHECKPOINT is the folder that Megatron wrote, or one of Hugging Face's. Nothing of carnet is imported: each side is read as its own
program stores it, so that the same words from both are a third opinion.
"""

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
END, LONGEST = "<|end|>", 160  # the token that begins and ends a text; the most letters of an answer
Floats = NDArray[np.float32]
Weights = dict[str, Floats]


class Sizes(NamedTuple):
    """What tells one Llama from another and is not seen in its weights."""

    layers: int
    dim: int  # of a head
    eps: float  # of the norms
    theta: float  # of the rotary positions


class Bag(dict[str, Any]):
    """What stands for every class that a pickle names: its fields, and nothing of it is imported or run."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # a bag is a key of others

    def __init__(self, *given: object) -> None:
        self.given = given

    def __setstate__(self, fields: object) -> None:
        self.update(fields if isinstance(fields, dict) else {})


class Bags(pickle.Unpickler):
    """A reader of pickles that makes bags."""

    def find_class(self, _: str, name: str) -> type[Bag]:
        """Make a class of bags, whatever the name."""
        return type(name, (Bag,), {})

    def persistent_load(self, _: object) -> None:
        """Let go what a pickle says of storages."""
        return


def unzipped(data: bytes, name: str) -> bytes:
    """Return one file of what torch.save wrote."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(each for each in archive.namelist() if each.endswith(name)))


def numbers(data: bytes, shape: tuple[int, ...]) -> Floats:
    """Return bf16 as f32: the upper halves of its numbers."""
    return (np.frombuffer(data, "<u2", int(np.prod(shape))).astype(np.uint32) << 16).view(np.float32).reshape(shape)


def from_megatron(root: Path) -> tuple[Weights, Sizes]:
    """Put the pieces of four ranks together and take Megatron's tensors apart, by Hugging Face's names."""
    folder = next(root.glob("iter_*"))
    said = Bags(io.BytesIO(unzipped((folder / "common.pt").read_bytes(), "data.pkl"))).load()["args"]
    index = Bags(io.BytesIO((folder / ".metadata").read_bytes())).load()
    whole: Weights = {}
    for piece, place in index["storage_data"].items():
        tensor = index["state_dict_metadata"][piece["fqn"]]
        if "chunks" not in tensor:
            continue  # no weight
        (first,) = piece["offset"].given
        (shape,) = next(each["sizes"].given for each in tensor["chunks"] if each["offsets"].given == (first,))
        data = (folder / place["relative_path"]).read_bytes()[place["offset"] :][: place["length"]]
        into = whole.setdefault(piece["fqn"], np.zeros(tensor["size"].given[0], np.float32))
        into[tuple(slice(begin, begin + size) for begin, size in zip(first, shape, strict=True))] = numbers(
            unzipped(data, "data/0"), shape
        )
    groups, dim, hidden = said["num_query_groups"], said["kv_channels"], said["hidden_size"]
    weights = {
        "model.embed_tokens": whole["embedding.word_embeddings.weight"],
        "model.norm": whole["decoder.final_layernorm.weight"],
    }
    for layer in range(said["num_layers"]):
        own = {name.removeprefix("decoder.layers."): values[layer] for name, values in whole.items() if ".layers." in name}
        # a group of heads is its queries, its key, its value
        qkv = own["self_attention.linear_qkv.weight"].reshape(groups, -1, dim, hidden)
        gate, up = np.split(own["mlp.linear_fc1.weight"], 2)
        parts = {
            "input_layernorm": own["self_attention.linear_qkv.layer_norm_weight"],
            "self_attn.q_proj": qkv[:, :-2].reshape(-1, hidden),
            "self_attn.k_proj": qkv[:, -2].reshape(-1, hidden),
            "self_attn.v_proj": qkv[:, -1].reshape(-1, hidden),
            "self_attn.o_proj": own["self_attention.linear_proj.weight"],
            "post_attention_layernorm": own["mlp.linear_fc1.layer_norm_weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": own["mlp.linear_fc2.weight"],
        }
        weights |= {f"model.layers.{layer}.{name}": values for name, values in parts.items()}
    return weights, Sizes(said["num_layers"], dim, said["layernorm_epsilon"], said["rotary_base"])


def from_hugging_face(folder: Path) -> tuple[Weights, Sizes]:
    """Read model.safetensors: the length of a JSON header, the header, the bytes."""
    data = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    weights = {
        name.removesuffix(".weight"): numbers(data[begin + each["data_offsets"][0] :], tuple(each["shape"]))
        for name, each in header.items()
    }
    said = json.loads((folder / "config.json").read_text())
    theta = said.get("rope_theta") or said["rope_parameters"]["rope_theta"]
    return weights, Sizes(said["num_hidden_layers"], said["head_dim"], said["rms_norm_eps"], theta)


def scores(weights: Weights, sizes: Sizes, tokens: list[int]) -> Floats:
    """Return what a Llama says of the token that follows."""
    length, dim = len(tokens), sizes.dim
    angles = np.arange(length)[:, None] / sizes.theta ** (np.arange(0, dim, 2) / dim)
    cos, sin = (np.tile(each(angles), 2).astype(np.float32) for each in (np.cos, np.sin))
    later = np.triu(np.full((length, length), -np.inf, np.float32), 1)

    def normed(states: Floats, name: str) -> Floats:
        size: Floats = np.sqrt((states**2).mean(-1, keepdims=True) + sizes.eps)
        return states / size * weights[name]

    def linear(states: Floats, name: str) -> Floats:
        product: Floats = states @ weights[name].T
        return product

    def heads(states: Floats, name: str) -> Floats:
        return linear(states, name).reshape(length, -1, dim).swapaxes(0, 1)

    def turned(states: Floats) -> Floats:
        left, right = np.split(states, 2, -1)
        return states * cos + np.concatenate((-right, left), -1) * sin

    states = weights["model.embed_tokens"][tokens]
    for layer in (f"model.layers.{number}." for number in range(sizes.layers)):
        seen = normed(states, layer + "input_layernorm")
        queries, keys = (turned(heads(seen, f"{layer}self_attn.{each}_proj")) for each in "qk")
        values = heads(seen, layer + "self_attn.v_proj")
        keys, values = (each.repeat(len(queries) // len(each), 0) for each in (keys, values))
        weighed = queries @ keys.swapaxes(1, 2) / np.sqrt(dim) + later
        weighed = np.exp(weighed - weighed.max(-1, keepdims=True))
        mixed = (weighed / weighed.sum(-1, keepdims=True) @ values).swapaxes(0, 1).reshape(length, -1)
        states = states + linear(mixed, layer + "self_attn.o_proj")
        seen = normed(states, layer + "post_attention_layernorm")
        gate, up = (linear(seen, f"{layer}mlp.{each}_proj") for each in ("gate", "up"))
        states = states + linear(gate / (1 + np.exp(-gate)) * up, layer + "mlp.down_proj")
    return linear(normed(states[-1], "model.norm"), "model.embed_tokens")


def answer(weights: Weights, sizes: Sizes, vocabulary: dict[str, int], question: str) -> Iterator[str]:
    """Yield the likeliest letters one after the other, up to the end."""
    letters = {number: letter for letter, number in vocabulary.items()}
    tokens = [vocabulary[END], *(vocabulary[letter] for letter in question if letter in vocabulary)]
    for _ in range(LONGEST):
        token = int(scores(weights, sizes, tokens)[: len(vocabulary)].argmax())
        if letters[token] == END:
            return
        yield letters[token]
        tokens.append(token)


def main() -> None:
    """Ask every question and print the answers as they come."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder, questions = Path(sys.argv[1]), sys.argv[2:]
    theirs = (folder / "config.json").exists()
    if not theirs and not (folder / "latest_checkpointed_iteration.txt").exists():
        sys.exit(f"{folder} is no folder of Megatron's or Hugging Face's: demo/checkpoint is one")
    weights, sizes = from_hugging_face(folder) if theirs else from_megatron(folder)
    vocabulary = json.loads(((folder if theirs else HERE / "tokenizer") / "tokenizer.json").read_text())["model"]["vocab"]
    np.seterr(all="ignore")  # what is damaged may say anything
    for question in questions:
        print(f"  {question}", end="", flush=True)
        for letter in answer(weights, sizes, vocabulary, question):
            print(letter, end="", flush=True)
        print()


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
