"""Keys and certificates, and a chain of crossings from a store that Megatron wrote."""

import datetime
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import carnet

GOLDEN = Path(__file__).parents[1] / "goldens/megatron/llama_te_pp2_vpp"
PEM, PLAIN = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@dataclass(frozen=True)
class Keys:
    """Files of PEM."""

    key: Path
    public: Path
    certificate: Path
    root: Path


def private(path, key, password=None):
    cipher = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password.encode())
    path.write_bytes(key.private_bytes(PEM, PLAIN, cipher))
    return path


def certified(key, name, by, issuer, *, root):
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(not root, False, False, False, False, root, root, False, False)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(by, hashes.SHA256())
    )


@pytest.fixture(scope="session")
def make_keys(tmp_path_factory):
    def make(curve=None):
        folder = tmp_path_factory.mktemp("keys")
        key, authority = ec.generate_private_key(curve or ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        found = {
            "public": public,
            "certificate": certified(key, "signer", authority, "root", root=False).public_bytes(PEM),
            "root": certified(authority, "root", authority, "root", root=True).public_bytes(PEM),
        }
        for name, data in found.items():
            (folder / name).write_bytes(data)
        return Keys(private(folder / "key", key), *(folder / name for name in found))

    return make


@pytest.fixture(scope="session")
def keys(make_keys):
    return make_keys()


@pytest.fixture(scope="session")
def crossings(tmp_path_factory):
    """A store of training, and what crossings made of it, one after the other."""
    folder = tmp_path_factory.mktemp("crossings")
    shutil.copytree(GOLDEN, folder / "run")
    assert carnet.cross(folder / "run", folder / "hf", to="hf")
    assert carnet.cross(folder / "hf", folder / "fp8", to="hf", quantize="mxfp8")
    assert carnet.cross(folder / "hf", folder / "ranks", to="trtllm", tp=2)
    return folder


@pytest.fixture
def chain(crossings, tmp_path, monkeypatch):
    """The same, to be changed; the process stands elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Path(shutil.copytree(crossings, tmp_path / "chain"))


@pytest.fixture(scope="session")
def theirs():
    """The command of model_signing itself."""

    def run(*words):
        done = subprocess.run(
            [sys.executable, "-m", "model_signing", *map(str, words)], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run
