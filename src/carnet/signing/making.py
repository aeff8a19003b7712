"""Signing a target: the digests of its files, a statement of these, and one signature for both."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from carnet.errors import BadCheckpoint, BadRequest
from carnet.examiner import document as documents
from carnet.examiner.document import Document
from carnet.formats.files import TABLE_LIMIT, read_whole
from carnet.formats.side_files import DOCUMENT, SIGNATURE, STATEMENT
from carnet.lineage import Around, identity, parent, sources
from carnet.progress import Callback, Told, verb
from carnet.signing.library import digests_of, hashing_of, library, on_disk
from carnet.signing.statement import statement
from carnet.storage.protocol import FILE, Folder, names_in
from carnet.storage.schemes import PathLike, folder_at

if TYPE_CHECKING:
    from model_signing import manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is signed with: one of a private key, a key with its certificate, a token (PKCS #11), or an identity (Sigstore)."""

    key: PathLike | None = None  # PEM of a private key on P-256, P-384 or P-521
    password: str | None = None  # of the key
    certificate: PathLike | None = None  # of the key, PEM
    chain: Sequence[PathLike] = ()  # certificates that lead to a root
    pkcs11: str | None = None  # URI of a key
    sigstore: bool = False
    identity_token: str | None = None  # for Sigstore; without one a browser is opened, or the machine's own identity is taken
    trust_config: PathLike | None = None  # of another instance of Sigstore


@dataclass(frozen=True, slots=True)
class Signed:
    """What was signed."""

    target: str  # path
    files: tuple[str, ...]
    sources: Mapping[str, str]  # name -> the folder whose document the statement names; "" where it was not found


@verb
def sign(
    out: PathLike,
    key: Key,
    *,
    at: Mapping[str, PathLike] | None = None,
    beside: Sequence[PathLike] = (),
    progress: Callback | None = None,
) -> Signed:
    """Sign a target: write ``carnet.intoto.jsonl`` and ``model.sig`` into it.

    The documents of its sources, which the statement names by their digests, are looked for as ``lineage.follow`` does. ``progress`` is
    called with a ``carnet.Progress``. Raises BadRequest where nobody has compared the target with its source, it is signed already, or
    the key cannot be used; MachineFailed where a token or a service refuses. Nothing is written then.
    """
    told, (folder, said) = Told(progress, "hashing"), _signable(out)
    with library():
        config = _signer(key)
        made = _Both(said, Around(folder, at or {}, beside), config, told)
        with tempfile.NamedTemporaryFile(prefix="carnet-", suffix=".sig") as file:
            config.set_hashing_config(made).sign(Path(str(folder)), file.name)
            signature = file.read()
    if made.changed(folder):
        raise BadCheckpoint(f"{DOCUMENT} changed while the target was signed", {"where": folder}, remedy="run again")
    folder.put(STATEMENT, [made.line])
    folder.put(SIGNATURE, [signature])
    return Signed(str(folder), (*sorted(made.digests), STATEMENT), made.sources)


def _signable(out: PathLike) -> tuple[Folder, Document]:
    """Return the folder of a target that may be signed, and its document."""
    folder = on_disk(out)
    names_in(folder)  # which refuses one that its crossing has not finished
    said = documents.load(folder)
    if said is None or not said.tells:
        what = f"there is no {DOCUMENT}" if said is None else "nobody has compared the target with its source"
        remedy = "carnet verify CKPT OUT --seal, then sign"
        raise BadRequest(f"{what}, and what is signed is not changed afterwards", {"where": folder}, remedy=remedy)
    if said.problems:
        raise BadCheckpoint(said.problems[0].what, {"where": folder / DOCUMENT, "found": said.problems[0].detail})
    if folder.kind(SIGNATURE):
        remedy = f"to sign it anew remove {SIGNATURE} and {STATEMENT}"
        raise BadRequest(f"the target is signed already: there is a {SIGNATURE}", {"where": folder}, remedy=remedy)
    return folder, said


def _signer(key: Key) -> Any:  # noqa: ANN401  model_signing.signing.Config, which may not be installed
    from model_signing import signing
    from model_signing._signing import sign_certificate

    config = signing.Config()
    if key.sigstore:
        trust = None if key.trust_config is None else Path(key.trust_config)
        ambient = key.identity_token is None
        return config.use_sigstore_signer(
            identity_token=key.identity_token, use_ambient_credentials=ambient, trust_config=trust
        )
    chain = [Path(each) for each in key.chain]
    if key.certificate is not None and not chain:
        chain = [Path(key.certificate)]  # model_signing reads no empty one
    if key.pkcs11 is not None and key.certificate is not None:
        made = config.use_pkcs11_certificate_signer(
            pkcs11_uri=key.pkcs11, signing_certificate=Path(key.certificate), certificate_chain=chain
        )
        # a token's of 1.1.1 has certificates in another encoding and lacks a field; that of a file has what bundles want
        material = partial(sign_certificate.Signer._get_verification_material, made._signer)  # noqa: SLF001
        made._signer._get_verification_material = material  # noqa: SLF001
        return made
    if key.pkcs11 is not None:
        return config.use_pkcs11_signer(pkcs11_uri=key.pkcs11)
    if key.key is None:
        raise BadRequest("what is it signed with?", remedy="--key KEY, --pkcs11 URI or --sigstore")
    if key.certificate is not None and key.password is not None:
        raise BadRequest("the key of a certificate cannot have a password here", remedy="openssl pkey -in KEY -out PLAIN")
    if key.certificate is not None:
        return config.use_certificate_signer(private_key=key.key, signing_certificate=key.certificate, certificate_chain=chain)
    # cryptography wants bytes; model_signing hands on what it gets
    password: Any = None if key.password is None else key.password.encode()
    return config.use_elliptic_key_signer(private_key=key.key, password=password)


class _Both:
    """What model_signing asks for digests: it reads every file once, makes the statement of them, and adds that."""

    def __init__(self, said: Document, around: Around, config: Any, told: Told) -> None:  # noqa: ANN401  as above
        self._said, self._around, self._config, self._told = said, around, config, told
        self.line = b""
        self.digests: dict[str, str] = {}
        self.sources: dict[str, str] = {}

    def changed(self, folder: Folder) -> bool:
        """Say whether the document is no longer that of which the statement speaks."""
        return folder.open(DOCUMENT).stamp != self._said.stamp

    def hash(self, model_path: Path) -> "manifest.Manifest":
        """Return the digests of all files and of the statement."""
        from model_signing import manifest

        found = hashing_of(self._told).set_ignored_paths(paths=[SIGNATURE, STATEMENT]).hash(model_path)
        self.digests = digests_of(found)
        self._told.phase("signing")
        self.line = self._signed(statement(self._said.data, self.digests, self._parents(model_path)))
        each = next(iter(found.resource_descriptors()))
        digest = type(each.digest)(each.digest.algorithm, hashlib.sha256(self.line).digest())
        items = [
            manifest.FileManifestItem(path=PurePosixPath(one.identifier), digest=one.digest)
            for one in found.resource_descriptors()
        ]
        items.append(manifest.FileManifestItem(path=PurePosixPath(STATEMENT), digest=digest))
        how = dict(found.serialization_type)
        how["ignore_paths"] = [path for path in how["ignore_paths"] if str(path) != STATEMENT]
        return manifest.Manifest(found.model_name, items, manifest.SerializationType.from_args(how))

    def _parents(self, out: Path) -> dict[str, str]:
        """Return the sha256 of the documents of the sources, by the names of these."""
        found = dict[str, str]()
        for source in sources(self._said.data):
            link = parent(source, self._around, {identity(folder_at(out))})
            folder = folder_at(link.folder) if link.folder else None
            has = folder is not None and folder.kind(DOCUMENT) == FILE
            self.sources[source.name] = link.folder
            if has and folder is not None:
                found[source.name] = hashlib.sha256(read_whole(folder, DOCUMENT, TABLE_LIMIT)[0]).hexdigest()
        return found

    def _signed(self, data: Mapping[str, Any]) -> bytes:
        """Return a statement in its envelope, as a line; one of Sigstore's needs the certificate and the log's entry around it."""
        from google.protobuf.json_format import ParseDict
        from in_toto_attestation.v1.statement_pb2 import Statement

        made = SimpleNamespace(statement=SimpleNamespace(pb=ParseDict(data, Statement())))
        bundle = json.loads(self._config._signer.sign(made).bundle.to_json())  # noqa: SLF001  Config.sign takes digests alone
        said = bundle["dsseEnvelope"] if not bundle["verificationMaterial"].get("tlogEntries") else bundle
        return json.dumps(said, separators=(",", ":")).encode() + b"\n"
