"""torch_dist folders whose parts contradict each other or lead out of the folder."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from carnet.errors import BadCheckpoint, BadRequest, CarnetError, MachineFailed, NotSupported
from carnet.formats.detect import open_checkpoint
from carnet.inventory.survey import take


def refusal(checkpoint, kind: type[CarnetError] = BadCheckpoint) -> str:
    with pytest.raises(kind) as error:
        open_checkpoint(checkpoint.root)
    return str(error.value)


def relocated(name: str, **changes: object):
    """A change of .metadata that moves the item of a tensor."""

    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == name)
        metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)

    return change


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "..", "", "a\\b", "a\0b"])
def test_a_data_file_outside_of_the_folder_is_refused_by_name(megatron, path):
    (megatron.root.parent / "outside").write_bytes(b"x" * 100_000)
    megatron.edit(relocated("decoder.weight", relative_path=path))
    assert "leads out of the checkpoint" in refusal(megatron)


def test_a_link_that_leads_out_of_the_folder_is_refused_by_name(megatron):
    outside = megatron.root.parent / "outside.distcp"
    (megatron.root / "__0_0.distcp").rename(outside)
    (megatron.root / "__0_0.distcp").symlink_to(outside)
    assert refusal(megatron).splitlines()[0] == "the file name '__0_0.distcp' leads out of the checkpoint"


def test_a_link_that_stays_in_the_folder_is_followed(megatron):
    (megatron.root / "__0_0.distcp").rename(megatron.root / "moved")
    (megatron.root / "__0_0.distcp").symlink_to("moved")
    assert open_checkpoint(megatron.root).tensors["", "decoder.bias"].chunks[0].file == "__0_0.distcp"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "common.pt"])
def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_hang(megatron, name):
    (megatron.root / name).unlink()
    os.mkfifo(megatron.root / name)
    assert refusal(megatron).splitlines()[0] == f"{name} is not a regular file"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_a_missing_file_is_named(megatron, name):
    (megatron.root / name).unlink()
    assert refusal(megatron).splitlines()[0] == f"{name} is missing"


def test_without_a_config_a_missing_common_state_is_named(megatron):
    (megatron.root / "common.pt").unlink()
    with pytest.raises(BadCheckpoint) as error:
        take(open_checkpoint(megatron.root))
    assert error.value.what == "the training arguments are missing"
    assert "common.pt" in str(error.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "common.pt"])
@pytest.mark.parametrize("left", [0, 1, 10, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(megatron, name, left):
    path = megatron.root / name
    size = path.stat().st_size
    os.truncate(path, left if isinstance(left, int) else int(size * left))
    assert name in refusal(megatron).splitlines()[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_the_machine_s_fault(megatron):
    (megatron.root / ".metadata").chmod(0)
    assert refusal(megatron, MachineFailed).splitlines()[0] == "cannot read .metadata"


def test_a_link_to_itself_is_the_machine_s_fault(megatron):
    (megatron.root / ".metadata").unlink()
    (megatron.root / ".metadata").symlink_to(".metadata")
    text = refusal(megatron, MachineFailed)
    assert text.splitlines()[0] == "cannot read .metadata"
    assert "  reason    Too many levels of symbolic links" in text


def test_an_item_beyond_the_end_of_its_file_is_an_error(megatron):
    megatron.edit(relocated("decoder.weight", length=1 << 40))
    assert "__0_0.distcp" in refusal(megatron).splitlines()[0]


def test_two_items_in_one_place_are_an_error(megatron):
    megatron.edit(relocated("decoder.weight", offset=10))
    assert refusal(megatron).splitlines()[0] == "two items of __0_0.distcp overlap"


@pytest.mark.parametrize(
    "changes", [{"offset": -1}, {"length": 0}, {"length": -5}, {"offset": True}, {"offset": 1.5}, {"offset": "1"}]
)
def test_an_impossible_place_is_an_error(megatron, changes):
    megatron.edit(relocated("decoder.weight", **changes))
    assert "an item of __0_0.distcp has an impossible place" in refusal(megatron)


def test_transformed_items_are_not_read_as_if_they_were_plain(megatron):
    megatron.edit(relocated("decoder.weight", transform_descriptors=["zstd"]))
    assert "are transformed (compressed)" in refusal(megatron, NotSupported)


def chunked(*boxes: tuple[tuple[int, ...], tuple[int, ...]]):
    """A change of .metadata that gives decoder.weight (3, 4) other chunks."""

    def change(metadata):
        chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(shape)) for start, shape in boxes]
        metadata.state_dict_metadata["decoder.weight"].chunks = chunks

    return change


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([], "nothing covers (3, 4) from (0, 0)"),
        ([((0, 0), (2, 4))], "nothing covers (1, 4) from (2, 0)"),
        ([((0, 0), (3, 4)), ((1, 0), (1, 4))], "overlap"),
        ([((0, 0), (3, 4)), ((0, 0), (3, 4))], "overlap"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], "overlap"),
        ([((0, 0), (4, 4))], "they reach beyond the tensor"),
        ([((0, 0), (3, 2)), ((0, 3), (3, 1))], "nothing covers (3, 1) from (0, 2)"),
    ],
)
def test_chunks_that_do_not_tile_a_tensor_are_an_error_about_it(megatron, boxes, reason):
    megatron.edit(chunked(*boxes))
    text = refusal(megatron)
    assert text.splitlines()[0] == "the chunks of 'decoder.weight' do not make up the tensor"
    assert reason in text


def test_a_chunk_that_no_file_holds_is_an_error_about_its_tensor(megatron):
    megatron.edit(chunked(((0, 0), (2, 4)), ((2, 0), (1, 4))))
    assert refusal(megatron).splitlines()[0] == "a chunk of 'decoder.weight' is stored in no file"


@pytest.mark.parametrize("size", [(-1, 4), (True, 4), (1.0, 4), ("3", 4), (1 << 70, 4), tuple([1] * 65)])
def test_an_impossible_shape_is_an_error(megatron, size):
    megatron.edit(lambda metadata: setattr(metadata.state_dict_metadata["decoder.weight"], "size", size))
    assert "a tensor's size is not a shape" in refusal(megatron)


def test_a_chunk_of_another_rank_is_an_error(megatron):
    megatron.edit(chunked(((0,), (12,))))
    assert "a chunk has another rank than its tensor" in refusal(megatron)


def test_an_item_of_another_shape_than_described_is_an_error_about_its_tensor(megatron):
    def change(metadata):
        metadata.state_dict_metadata["decoder.weight"].size = torch.Size([4, 3])
        chunked(((0, 0), (4, 3)))(metadata)

    megatron.edit(change)
    assert refusal(megatron).splitlines()[0] == "an item of 'decoder.weight' is not the chunk that .metadata describes"


def test_an_item_of_another_type_than_described_is_an_error_about_its_tensor(megatron):
    megatron.edit(lambda metadata: setattr(metadata.state_dict_metadata["decoder.weight"].properties, "dtype", torch.float16))
    text = refusal(megatron)
    assert text.splitlines()[0] == "an item of 'decoder.weight' is not the chunk that .metadata describes"
    assert "  expected  f16 (3, 4)" in text
    assert "  found     bf16 (3, 4)" in text


def test_an_item_of_something_undescribed_is_an_error(megatron):
    megatron.edit(lambda metadata: metadata.state_dict_metadata.pop("decoder.weight"))
    assert refusal(megatron).splitlines()[0] == "an item names 'decoder.weight', which .metadata does not describe"


def test_an_object_without_an_item_is_an_error(megatron):
    megatron.edit(lambda metadata: metadata.state_dict_metadata.update({"rng": BytesStorageMetadata()}))
    assert refusal(megatron).splitlines()[0] == "'rng' is stored in no file"


def test_an_unknown_element_type_is_refused_where_it_would_be_read(megatron):
    megatron.edit(lambda metadata: setattr(metadata.state_dict_metadata["decoder.weight"].properties, "dtype", torch.complex64))
    assert refusal(megatron, NotSupported).splitlines()[0] == "the tensor 'decoder.weight' has an unknown element type"


def test_another_storage_backend_is_refused_by_name(megatron):
    (megatron.root / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert refusal(megatron, NotSupported).splitlines()[0] == "the checkpoint format 'zarr' is not read"


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '{"a": 1e999}', "9" * 9000]
)
def test_broken_json_is_an_error_that_names_the_file(megatron, content):
    (megatron.root / "metadata.json").write_text(content)
    assert refusal(megatron).startswith("metadata.json is ")


@pytest.mark.parametrize("content", ["4", "../../etc", "", "iter_0000003/..", "3 4", "٣", "9" * 4000, "0x3"])
def test_a_tracker_that_points_nowhere_is_an_error_that_lists_what_is_here(megatron, content):
    (megatron.root.parent / "latest_checkpointed_iteration.txt").write_text(content)
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(megatron.root.parent)
    assert str(error.value).startswith("latest_checkpointed_iteration.txt says ")
    assert "  found     iter_0000003" in str(error.value)


def test_several_iterations_without_a_tracker_are_a_choice_that_is_not_made(megatron):
    (megatron.root.parent / "latest_checkpointed_iteration.txt").unlink()
    (megatron.root.parent / "iter_0000009").mkdir()
    with pytest.raises(BadRequest) as error:
        open_checkpoint(megatron.root.parent)
    assert "  found     iter_0000003, iter_0000009" in str(error.value)


def test_arguments_that_are_missing_are_an_error(megatron):
    torch.save({"iteration": 3}, megatron.root / "common.pt")
    with pytest.raises(BadCheckpoint) as error:
        take(open_checkpoint(megatron.root))
    assert error.value.what == "the training arguments are missing"


def test_two_items_of_one_chunk_are_an_error(megatron):
    def change(metadata):
        index = megatron.index("decoder.weight")
        metadata.storage_data[MetadataIndex("decoder.weigh!", index.offset)] = metadata.storage_data[index]

    megatron.edit(change)
    path = megatron.root / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"decoder.weigh!", b"decoder.weight"))
    assert "two items have the same name and place" in refusal(megatron)


def test_a_file_in_place_of_the_folder_is_a_request_that_cannot_be(megatron):
    with pytest.raises(BadRequest) as error:
        open_checkpoint(Path(megatron.root / "common.pt"))
    assert str(error.value).splitlines()[0].endswith("common.pt is not a folder")
