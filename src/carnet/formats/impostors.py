"""What a file is whose name says that it is another: a download that left a stand-in, a pickle that was renamed."""

# how such a file begins: what it is, and what to do
BEGINS = {
    b"version https://git-lfs.github.com/spec/": (
        "a pointer of Git LFS and not the file itself",
        "fetch the files that it stands for: git lfs pull in the cloned folder, or hf download",
    ),
    b"PK\x03\x04": (
        "an archive (torch.save writes such) and no safetensors",
        "load it with transformers and call save_pretrained, which writes safetensors",
    ),
    b"\x80\x02": (
        "a pickle and no safetensors",
        "load it with transformers and call save_pretrained, which writes safetensors",
    ),
    b"<!doctype html": ("a page of the web", "download it again: the server answered with a page"),
    b"<html": ("a page of the web", "download it again: the server answered with a page"),
}
NEEDED = max(map(len, BEGINS))  # bytes


def name_impostor(beginning: bytes) -> tuple[str, str] | None:
    """Return what a file is that begins so, and what to do; None where it is nothing that is known.

    >>> name_impostor(b"<html><body>Access denied")
    ('a page of the web', 'download it again: the server answered with a page')
    """
    beginning = beginning[:NEEDED].lower() if beginning.startswith(b"<") else beginning
    return next((found for magic, found in BEGINS.items() if beginning.startswith(magic)), None)
