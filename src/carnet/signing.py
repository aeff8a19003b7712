"""A target signed as OpenSSF's `model_signing` signs models (OMS), with a statement of where it came from beside.

::

    every file of OUT ──sha256──┬─> carnet.intoto.jsonl   in-toto: these files, from those sources, by this request (SLSA provenance)
                                └─> model.sig             OMS: the digests of all files, that of the statement among them

Both are signed with one key, and each file is read once. ``pip install 'carnet[sign]'`` brings the library.
"""

import base64
import binascii
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from carnet.errors import BadCheckpoint, BadRequest, CarnetError, MachineFailed, shown
from carnet.examiner import document as documents
from carnet.examiner.compare import Finding
from carnet.examiner.document import Document
from carnet.formats.files import TABLE_LIMIT, read_whole
from carnet.formats.side_files import DOCUMENT, SIGNATURE, STATEMENT
from carnet.lineage import Around, identity, parent, sources
from carnet.plans.options import here
from carnet.progress import verb
from carnet.storage.protocol import FILE, Folder, names_in
from carnet.storage.schemes import PathLike, folder_at

if TYPE_CHECKING:
    from model_signing import manifest

INSTALL = "pip install 'carnet[sign]'"
PREDICATE = "https://slsa.dev/provenance/v1"
# what the parameters of a statement mean: those of the document of this version
BUILD = f"urn:carnet:crossing:{documents.VERSION}"
BUILDER = "urn:carnet"
GIT = {".git", ".gitattributes", ".github", ".gitignore"}  # what model_signing's own command leaves out by itself


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whose signature is believed: a public key's, certificates' below some roots, or an identity's (Sigstore)."""

    public_key: PathLike | None = None
    certificate_chain: Sequence[PathLike] = ()
    identity: str | None = None
    identity_provider: str | None = None
    trust_config: PathLike | None = None

    def __str__(self) -> str:
        if self.identity is not None:
            return f"{shown(self.identity)} of {shown(str(self.identity_provider))}"
        return f"the key {Path(self.public_key).name}" if self.public_key is not None else "a certificate of the chain given"


@dataclass(frozen=True, slots=True)
class Signed:
    """What was signed."""

    target: str  # path
    files: tuple[str, ...]
    sources: Mapping[str, str]  # name -> the folder whose document the statement names; "" where it was not found


@dataclass(frozen=True, slots=True)
class Checked:
    """A signature that was checked; false where something is wrong."""

    by: str
    files: tuple[str, ...]  # that it is of
    findings: tuple[Finding, ...]
    left_out: tuple[str, ...] = ()  # what whoever signed left out

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        if self.findings:
            return f"broken: {self.findings[0].what}"
        but = f", but not of {', '.join(map(shown, self.left_out))}" if self.left_out else ""
        return f"by {self.by}, of {len(self.files)} files{but}"


@verb
def sign(out: PathLike, key: Key, *, at: Mapping[str, PathLike] | None = None, beside: Sequence[PathLike] = ()) -> Signed:
    """Sign a target: write ``carnet.intoto.jsonl`` and ``model.sig`` into it.

    The documents of its sources, which the statement names by their digests, are looked for as ``lineage.follow`` does.
    """
    folder, said = _signable(out)
    with _library():
        config = _signer(key)
        made = _Both(said, Around(folder, at or {}, beside), config)
        with tempfile.NamedTemporaryFile(prefix="carnet-", suffix=".sig") as file:
            config.set_hashing_config(made).sign(Path(str(folder)), file.name)
            signature = file.read()
    if made.changed(folder):
        raise BadCheckpoint(f"{DOCUMENT} changed while the target was signed", {"where": folder}, remedy="run again")
    folder.put(STATEMENT, [made.line])
    folder.put(SIGNATURE, [signature])
    return Signed(str(folder), (*sorted(made.digests), STATEMENT), made.sources)


@verb
def check(out: PathLike, trust: Trust) -> Checked:
    """Compare every file of a target with its signature, and say whose that is."""
    folder = _on_disk(out)
    if folder.kind(SIGNATURE) != FILE:
        raise BadRequest(
            f"the target is not signed: there is no {SIGNATURE}", {"where": folder}, remedy="carnet sign OUT --key KEY"
        )
    raw = read_whole(folder, SIGNATURE, TABLE_LIMIT)[0]
    with _library():
        verifier, found = _verifier(trust), list[Finding]()
        with tempfile.NamedTemporaryFile(prefix="carnet-", suffix=".sig") as file:  # what is checked is what is read below
            file.write(raw)
            file.flush()
            try:
                verifier.verify(Path(str(folder)), file.name)
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001  every verifier has errors of its own, and what is no proof is a finding
                found += verifier.found or [Finding("the signature is not believed", SIGNATURE, SIGNATURE, _words(error))]
    said = _payload(raw)
    if said is None or (found and not verifier.found):
        return Checked(str(trust), (), tuple(found))
    how = said.get("predicate") or {}  # before 1.0 there was none, and a subject for each file
    names = {str(each["name"]): str(each["digest"]) for each in how.get("resources") or said["subject"]}
    left = sorted({str(each) for each in how.get("serialization", {}).get("ignore_paths", ())} - GIT - {SIGNATURE})
    found += _stale(folder, names) if not found and STATEMENT in names else []
    return Checked(str(trust), tuple(names), tuple(found), tuple(left))


def _signable(out: PathLike) -> tuple[Folder, Document]:
    """Return the folder of a target that may be signed, and its document."""
    folder = _on_disk(out)
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


def _on_disk(out: PathLike) -> Folder:
    folder = folder_at(here("out", out))
    if not folder.kind():
        raise BadRequest(f"{folder} does not exist", {"expected": "the folder of a target"})
    return folder


@contextmanager
def _library() -> Iterator[None]:
    """Say how the library comes here where it is not, and in a line what it refuses; what it prints is talk."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except CarnetError:
        raise
    except ModuleNotFoundError as missing:
        raise MachineFailed("what signs models is not installed", {"missing": missing.name}, remedy=INSTALL) from missing
    except (TypeError, ValueError) as error:
        raise BadRequest("this key, certificate or folder cannot be used", {"reason": _words(error)}) from error
    except Exception as error:  # a service, a token and a transport have errors of their own
        raise MachineFailed("what signs models failed", {"reason": _words(error)}) from error


def _words(error: BaseException) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)


def _signer(key: Key) -> Any:  # noqa: ANN401  model_signing.signing.Config, which may not be installed
    from model_signing import signing

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
        return config.use_pkcs11_certificate_signer(
            pkcs11_uri=key.pkcs11, signing_certificate=Path(key.certificate), certificate_chain=chain
        )
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


def _verifier(trust: Trust) -> Any:  # noqa: ANN401  model_signing.verifying.Config, which may not be installed
    from model_signing import hashing, verifying

    class Verifier(verifying.Config):  # type: ignore[misc]  # its types are not looked at: they come with an extra
        """Keeps what differs as findings."""

        found: list[Finding] = []  # noqa: RUF012  set anew when something differs

        def _get_manifest_diff(self, actual: "manifest.Manifest", expected: "manifest.Manifest") -> list[str]:
            self.found = _differing(_digests(actual), _digests(expected))
            return super()._get_manifest_diff(actual, expected)  # type: ignore[no-any-return]

    made = Verifier().set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE]))
    if trust.public_key is not None:
        return made.use_elliptic_key_verifier(public_key=trust.public_key)
    if trust.certificate_chain:
        return made.use_certificate_verifier(certificate_chain=trust.certificate_chain)
    if trust.identity is None or trust.identity_provider is None:
        remedy = "--public-key KEY, --certificate-chain CERTIFICATES, or --identity NAME with --identity-provider URL"
        raise BadRequest("whose signature is believed?", remedy=remedy)
    config = None if trust.trust_config is None else Path(trust.trust_config)
    return made.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.identity_provider, trust_config=config)


def _digests(of: "manifest.Manifest") -> dict[str, str]:
    return {each.identifier: each.digest.digest_hex for each in of.resource_descriptors()}


def _differing(actual: Mapping[str, str], expected: Mapping[str, str]) -> list[Finding]:
    """Return what differs between the files that are there and those that were signed."""
    found = list[Finding]()
    for name in sorted(actual.keys() | expected.keys()):
        if name not in expected:
            found.append(Finding("not signed", shown(name), shown(name), "it was added to what was signed"))
        elif name not in actual:
            found.append(Finding("missing", shown(name), shown(name), "it was signed, the target lacks it"))
        elif actual[name] != expected[name]:
            detail = f"signed with sha256 {expected[name]}, found {actual[name]}"
            found.append(Finding("file differs from the signed one", shown(name), shown(name), detail))
    return found


def _payload(raw: bytes) -> Any:  # noqa: ANN401  JSON
    """Return what an envelope or a bundle says, None where it says nothing."""
    try:
        said = json.loads(raw)
        return json.loads(base64.b64decode(said.get("dsseEnvelope", said)["payload"], validate=True))
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
        return None


def _stale(folder: Folder, names: Mapping[str, str]) -> list[Finding]:
    """Return whether a statement tells of other files than those that were signed: somebody signed it again after a change."""
    said = _payload(read_whole(folder, STATEMENT, TABLE_LIMIT)[0])
    subjects = said.get("subject") if isinstance(said, Mapping) else None
    try:
        there = {each["name"]: each["digest"]["sha256"] for each in subjects or ()}
    except (KeyError, TypeError):
        there = {}
    odd = sorted(name for name in (there.keys() | names.keys()) - {STATEMENT} if there.get(name) != names.get(name))
    detail = f"it does not tell of {shown(odd[0])} as it is" if odd else ""
    return [Finding("the statement is of other files", STATEMENT, STATEMENT, detail)] if odd else []


class _Both:
    """What model_signing asks for digests: it reads every file once, makes the statement of them, and adds that."""

    def __init__(self, said: Document, around: Around, config: Any) -> None:  # noqa: ANN401  as above
        self._said, self._around, self._config = said, around, config
        self.line = b""
        self.digests: dict[str, str] = {}
        self.sources: dict[str, str] = {}

    def changed(self, folder: Folder) -> bool:
        """Say whether the document is no longer that of which the statement speaks."""
        return folder.open(DOCUMENT).stamp != self._said.stamp

    def hash(self, model_path: Path) -> "manifest.Manifest":
        """Return the digests of all files and of the statement."""
        from model_signing import hashing, manifest

        found = hashing.Config().set_ignored_paths(paths=[SIGNATURE, STATEMENT]).hash(model_path)
        self.digests = _digests(found)
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


def statement(data: Mapping[str, object], digests: Mapping[str, str], parents: Mapping[str, str]) -> dict[str, Any]:
    """Return the in-toto statement of a target: its files, and by what crossing they came from what sources.

    ``data`` is its document, ``digests`` are the SHA-256 of its files, ``parents`` those of the documents of its sources.
    """
    said, merged = data.get("request"), data.get("merge")
    asked = {name: value for name, value in said.items() if value not in (None, [])} if isinstance(said, Mapping) else {}
    if isinstance(merged, Mapping):
        asked["merge"] = {key: merged.get(key) for key in ("method", "weights", "keep")}
    of = [
        {"name": f"{source.name}/{label}", "digest": {"xxh3_128": digest} | _sha256(data, source.name, label)}
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


def _sha256(data: Mapping[str, object], name: str, label: str) -> dict[str, str]:
    """Return the SHA-256 of a tensor of the source, where its document has it."""
    said: Any = data.get("source")
    found = said["tensors"].get(label, {}).get("sha256") if isinstance(said, Mapping) and said.get("name") == name else None
    return {} if found is None else {"sha256": str(found)}


def _is_file(value: object) -> bool:
    return isinstance(value, Mapping) and {*value} == {"name", "digest"}
