"""A target in a store is drawn like one on the disk."""

from tests.report.reading import GOLDENS, Read, call


def test_a_target_in_a_store_is_drawn_like_one_on_the_disk(store, tmp_path):
    ckpt, out = store.fill(GOLDENS / "llama_te_pp2_vpp", "ckpt"), f"{store.url}/models/hf"
    assert call("cross", ckpt, out, "--to", "hf", "--report", tmp_path / "crossed.html").exit_code == 0
    assert call("report", out, ckpt, "-o", tmp_path / "examined.html").exit_code == 0
    assert (
        call("cross", GOLDENS / "llama_te_pp2_vpp", tmp_path / "hf", "--to", "hf", "--report", tmp_path / "here.html").exit_code
        == 0
    )
    crossed, examined, here = (Read(tmp_path / f"{name}.html").rows("streams") for name in ("crossed", "examined", "here"))
    assert crossed == examined == here
    assert len(here) > 10
