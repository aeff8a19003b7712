"""The in-toto statement of a target: its files, and by what crossing they came from what sources (SLSA provenance)."""

from collections.abc import Mapping
from typing import Any

from carnet.examiner import document as documents
from carnet.formats.side_files import DOCUMENT
from carnet.lineage import sources

PREDICATE = "https://slsa.dev/provenance/v1"
# what the parameters of a statement mean: those of the document of this version
BUILD = f"urn:carnet:crossing:{documents.VERSION}"
BUILDER = "urn:carnet"


def statement(data: Mapping[str, object], digests: Mapping[str, str], parents: Mapping[str, str]) -> dict[str, Any]:
    """Return the in-toto statement of a target: its files, and by what crossing they came from what sources.

    ``data`` is its document, ``digests`` are the SHA-256 of its files, ``parents`` those of the documents of its sources.
    """
    said, merged = data.get("request"), data.get("merge")
    asked = {name: value for name, value in said.items() if value not in (None, [])} if isinstance(said, Mapping) else {}
    if isinstance(merged, Mapping):
        asked["merge"] = {key: merged.get(key) for key in ("method", "weights", "keep")}
    of = [
        {
            "name": f"{source.name}/{label}",
            "digest": {"xxh3_128": digest} | ({"sha256": source.sha256[label]} if label in source.sha256 else {}),
        }
        for source in sources(data)
        for label, (_, digest) in source.tensors.items()
        if digest
    ]
    of += [{"name": f"{name}/{DOCUMENT}", "digest": {"sha256": digest}} for name, digest in parents.items()]
    of += [
        {"name": f"--{name} {each['name']}", "digest": {"xxh3_128": each["digest"]}}
        for name, each in asked.items()
        if _is_file(each)
    ]
    predicate = {
        "buildDefinition": {
            "buildType": BUILD,
            "externalParameters": asked,
            "internalParameters": {key: data[key] for key in ("family", "chain") if key in data},
            "resolvedDependencies": of,
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": data.get("versions")},
            "byproducts": [{"name": DOCUMENT, "digest": {"sha256": digests[DOCUMENT]}}],
        },
    }
    subject = [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())]
    return {"_type": "https://in-toto.io/Statement/v1", "subject": subject, "predicateType": PREDICATE, "predicate": predicate}


def _is_file(value: object) -> bool:
    return isinstance(value, Mapping) and {*value} == {"name", "digest"}
