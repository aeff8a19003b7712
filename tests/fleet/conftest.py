"""A Ray cluster of several nodes on this machine: each with its own scheduler, object store and workers."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster
from safetensors.numpy import save_file

import carnet
from tests.stores.conftest import served, store
from tests.stores.server import environment

__all__ = ["served", "store"]  # fixtures
HERE = Path(carnet.__file__).parents[1]
SMALL = {"num_cpus": 1, "object_store_memory": 80 << 20}  # a node


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def new_node(cluster, **given):
    """Add a node to a cluster; it imports this carnet."""
    return cluster.add_node(**SMALL, **given)


@pytest.fixture(scope="session")
def cluster(served) -> Iterator[Cluster]:
    """A cluster of three nodes, which is the one of RAY_ADDRESS; they know the store of the tests."""
    told = {**environment(served[1].port), "PYTHONPATH": str(HERE)}
    before = {name: os.environ.get(name) for name in (*told, "RAY_ADDRESS")}
    os.environ |= told
    made = Cluster(
        initialize_head=True, head_node_args={**SMALL, "include_dashboard": False, "ray_client_server_port": free_port()}
    )
    for _ in range(2):
        new_node(made)
    os.environ["RAY_ADDRESS"] = made.address
    yield made
    made.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A Llama of some megabytes, in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("fleet") / "source"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    layer = {
        "input_layernorm": (128,),
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
        "post_attention_layernorm": (128,),
        "mlp.gate_proj": (512, 128),
        "mlp.up_proj": (512, 128),
        "mlp.down_proj": (128, 512),
    }
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(6) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (1024, 128), "model.norm.weight": (128,), "lm_head.weight": (1024, 128)}
    numbers = np.random.default_rng(0)
    folder.mkdir()
    save_file(
        {name: numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder
