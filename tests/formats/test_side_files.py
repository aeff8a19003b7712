"""What stands beside a model's tensors: what each file is, and which of them may be read."""

import os
import re

import pytest

from carnet.errors import BadCheckpoint
from carnet.formats.files import read_whole
from carnet.formats.side_files import check_asset, kind_of, side_files
from carnet.storage.schemes import folder_at

PUBLISHED = {  # names in folders as they are published, and what becomes of them in a target of the same layout
    "tokenizer": """tokenizer.json tokenizer_config.json tokenizer.4.7.0.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt tokenizer.model tokenizer.model.v3 tekken.json qwen.tiktoken hy.tiktoken tiktoken.model
    spiece.model sentencepiece.bpe.model vocab.txt chat_template.jinja chat_template.json
    additional_chat_templates/tool_use.jinja processor_config.json preprocessor_config.json
    video_preprocessor_config.json generation_config.json SYSTEM_PROMPT.txt""",
    "model": """README.md LICENSE LICENSE.txt NOTICE USE_POLICY.md custom_generate/generate.py
    custom_generate/requirements.txt modules.json 1_Pooling/config.json config_sentence_transformers.json""",
    "named": """modeling_x.py configuration_x.py""",
    "": """adapter_config.json adapter_model.safetensors pytorch_model.bin pytorch_model-00001-of-00002.bin
    consolidated.safetensors params.json original/consolidated.00.pth model.gguf training_args.bin optimizer.pt
    trainer_state.json .gitattributes recipe.yaml figures/a.png x.dat""",
    "anew": """config.json model.safetensors.index.json hf_quant_config.json carnet.json""",
}
UNREAD = (
    "README.md LICENSE .gitattributes figures/benchmark.png NOTICE evaluation.pdf training_args.bin trainer_state.json".split()
)


@pytest.mark.parametrize("along", PUBLISHED)
def test_every_published_name_goes_along_stays_or_is_written_anew(along):
    assert {name: kind_of(name).along for name in PUBLISHED[along].split()} == dict.fromkeys(PUBLISHED[along].split(), along)


def test_nobody_loads_papers_pictures_and_states_of_training_and_all_else_is_loaded():
    assert [name for name in UNREAD if kind_of(name).loaded] == []
    named = [name for names in PUBLISHED.values() for name in names.split()]
    assert {name for name in named if not kind_of(name).loaded} == {
        *(
            "README.md",
            "LICENSE",
            "LICENSE.txt",
            "NOTICE",
            "USE_POLICY.md",
            "training_args.bin",
            "optimizer.pt",
            "trainer_state.json",
        ),
        *(".gitattributes", "recipe.yaml", "figures/a.png"),
    }


def test_folders_of_which_nothing_goes_along_are_one_name(tmp_path):
    for name in (
        "custom_generate/generate.py",
        "original/a.pth",
        "original/b/c.pth",
        "config.json",
        "x.dat",
        "1_Pooling/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert side_files(folder_at(tmp_path), {"config.json"}) == [
        "1_Pooling/config.json",
        "custom_generate/generate.py",
        "original/",
        "x.dat",
    ]


def test_a_file_of_the_hugging_face_cache_is_read(tmp_path):
    (tmp_path / "models--x/blobs").mkdir(parents=True)
    (tmp_path / "models--x/blobs/ab12").write_text("{}")
    root = tmp_path / "models--x/snapshots/1234"
    root.mkdir(parents=True)
    (root / "tokenizer.json").symlink_to("../../blobs/ab12")
    check_asset(folder_at(root), "tokenizer.json")
    assert read_whole(folder_at(root), "tokenizer.json")[0] == b"{}"


@pytest.mark.parametrize("what", ["fifo", "link out", "folder", "link to nothing", "ring"])
def test_what_is_no_file_of_the_folder_is_refused(tmp_path, what):
    root, path = tmp_path / "m", tmp_path / "m/tokenizer.json"
    root.mkdir()
    (tmp_path / "secret").write_text("{}")
    match what:
        case "fifo":
            os.mkfifo(path)
        case "link out":
            path.symlink_to("../secret")
        case "folder":
            path.mkdir()
        case "link to nothing":
            path.symlink_to("nothing")
        case _:
            path.symlink_to("tokenizer.json")
    said = (
        "leads out of the folder"
        if what == "link out"
        else "not a regular file"
        if what in ("fifo", "folder")
        else "cannot be read"
    )
    with pytest.raises(BadCheckpoint, match=re.escape(said)):
        check_asset(folder_at(root), "tokenizer.json")
