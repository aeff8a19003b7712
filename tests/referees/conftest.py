"""What referees share: one process as Megatron's whole world, on a machine without a GPU; a model that comes back."""

import contextlib
import socket
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import carnet


@pytest.fixture(scope="module")
def megatron_world():
    """Give megatron-core what it asks of CUDA for no purpose here: a device to put tables on, a state of random numbers."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()  # a test of torch's own context manager may have taken them away again

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        tracker = tensor_parallel.get_cuda_rng_tracker()
        patch.setattr(tracker, "fork", lambda *_: contextlib.nullcontext(), raising=True)
        yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _loaded(folder):
    """Return the model that transformers makes of a folder, in float32, after asking it whether it missed or ignored anything."""
    asked: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, said = asked
    assert {what: list(names) for what, names in said.items() if names} == {}
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """Save a model that transformers makes of a config, every parameter and every choosing bias random."""

    def save(config, dtype=torch.float32):
        torch.manual_seed(17)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        chosen = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for tensor in (*model.parameters(), *chosen):
            torch.nn.init.normal_(tensor, std=0.2)
        model.save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    return save


@pytest.fixture
def there_and_again(saved, tmp_path):
    """Take a model of transformers through other layouts back to a folder: the tensors, the logits and the config are the same."""

    def go(config, *stops, spelled_otherwise=()):
        at = saved(config)
        for number, stop in enumerate((*stops, {"to": "hf"})):
            assert carnet.cross(at, tmp_path / f"stop{number}", **stop).equal
            at = tmp_path / f"stop{number}"
        before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(at / "model.safetensors")
        assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            found, expected = (_loaded(folder)(tokens, use_cache=False).logits for folder in (at, tmp_path / "hf"))
        assert expected.std() > 0.1
        assert torch.equal(found, expected)
        ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (at, tmp_path / "hf"))
        different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert different - {"_name_or_path", "transformers_version"} == set(spelled_otherwise)

    return go
