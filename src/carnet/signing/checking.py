"""Checking a signature: every file beside what was signed, and whose it is."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carnet.errors import BadRequest, shown
from carnet.examiner.compare import Finding
from carnet.formats.files import TABLE_LIMIT, read_whole
from carnet.formats.side_files import SIGNATURE, STATEMENT
from carnet.progress import Callback, Told, verb
from carnet.signing.library import digests_of, hashing_of, library, on_disk, payload, words
from carnet.storage.protocol import FILE, Folder
from carnet.storage.schemes import PathLike

if TYPE_CHECKING:
    from model_signing import manifest

GIT = {".git", ".gitattributes", ".github", ".gitignore"}  # what model_signing's own command leaves out by itself


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
def check(out: PathLike, trust: Trust, *, progress: Callback | None = None) -> Checked:
    """Compare every file of a target with its signature, and say whose that is.

    ``progress`` is called with a ``carnet.Progress``. Raises BadRequest where the target is not signed; a signature that does not hold
    is a ``Checked`` that is false.
    """
    told, folder = Told(progress, "hashing"), on_disk(out)
    if folder.kind(SIGNATURE) != FILE:
        raise BadRequest(
            f"the target is not signed: there is no {SIGNATURE}", {"where": folder}, remedy="carnet sign OUT --key KEY"
        )
    raw = read_whole(folder, SIGNATURE, TABLE_LIMIT)[0]
    with library():
        verifier, found = _verifier(trust, told), list[Finding]()
        with tempfile.NamedTemporaryFile(prefix="carnet-", suffix=".sig") as file:  # what is checked is what is read below
            file.write(raw)
            file.flush()
            try:
                verifier.verify(Path(str(folder)), file.name)
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001  every verifier has errors of its own, and what is no proof is a finding
                found += verifier.found or [Finding("the signature is not believed", SIGNATURE, SIGNATURE, words(error))]
    said = payload(raw)
    if said is None or (found and not verifier.found):
        return Checked(str(trust), (), tuple(found))
    how = said.get("predicate") or {}  # before 1.0 there was none, and a subject for each file
    names = {str(each["name"]): str(each["digest"]) for each in how.get("resources") or said["subject"]}
    left = sorted({str(each) for each in how.get("serialization", {}).get("ignore_paths", ())} - GIT - {SIGNATURE})
    found += _stale(folder, names) if not found and STATEMENT in names else []
    return Checked(str(trust), tuple(names), tuple(found), tuple(left))


def _verifier(trust: Trust, told: Told) -> Any:  # noqa: ANN401  model_signing.verifying.Config, which may not be installed
    from model_signing import verifying

    class Verifier(verifying.Config):  # type: ignore[misc]  # its types are not looked at: they come with an extra
        """Keeps what differs as findings."""

        found: list[Finding] = []  # noqa: RUF012  set anew when something differs

        def _get_manifest_diff(self, actual: "manifest.Manifest", expected: "manifest.Manifest") -> list[str]:
            self.found = _differing(digests_of(actual), digests_of(expected))
            return super()._get_manifest_diff(actual, expected)  # type: ignore[no-any-return]

    made = Verifier().set_hashing_config(hashing_of(told).set_ignored_paths(paths=[SIGNATURE]))
    if trust.public_key is not None:
        return made.use_elliptic_key_verifier(public_key=trust.public_key)
    if trust.certificate_chain:
        return made.use_certificate_verifier(certificate_chain=trust.certificate_chain)
    if trust.identity is None or trust.identity_provider is None:
        remedy = "--public-key KEY, --certificate-chain CERTIFICATES, or --identity NAME with --identity-provider URL"
        raise BadRequest("whose signature is believed?", remedy=remedy)
    config = None if trust.trust_config is None else Path(trust.trust_config)
    return made.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.identity_provider, trust_config=config)


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


def _stale(folder: Folder, names: Mapping[str, str]) -> list[Finding]:
    """Return whether a statement tells of other files than those that were signed: somebody signed it again after a change."""
    said = payload(read_whole(folder, STATEMENT, TABLE_LIMIT)[0])
    subjects = said.get("subject") if isinstance(said, Mapping) else None
    try:
        there = {each["name"]: each["digest"]["sha256"] for each in subjects or ()}
    except (KeyError, TypeError):
        there = {}
    odd = sorted(name for name in (there.keys() | names.keys()) - {STATEMENT} if there.get(name) != names.get(name))
    detail = f"it does not tell of {shown(odd[0])} as it is" if odd else ""
    return [Finding("the statement is of other files", STATEMENT, STATEMENT, detail)] if odd else []
