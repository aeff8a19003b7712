"""A key that a token keeps (PKCS #11) signs: SoftHSM is one in software, and OpenSC's tool makes keys in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from carnet import signing
from carnet.signing import Trust
from tests.signing.conftest import PEM, certified

MODULES = [Path("/usr/lib/softhsm/libsofthsm2.so"), Path("/usr/lib64/pkcs11/libsofthsm2.so")]
MODULE = next(filter(Path.exists, MODULES), None)
PIN = "271828"


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """A token with a key on P-256: its environment, and the public key as PEM."""
    lacking = [name for name in ("softhsm2-util", "pkcs11-tool") if shutil.which(name) is None]
    if MODULE is None or lacking:
        pytest.skip(f"{', '.join(lacking) or 'libsofthsm2.so'} is not installed: apt-get install softhsm2 opensc")
    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    (folder / "conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n")
    environment = {**os.environ, "SOFTHSM2_CONF": str(folder / "conf")}

    def tool(*words):
        subprocess.run([*map(str, words)], env=environment, check=True, capture_output=True)

    tool("softhsm2-util", "--init-token", "--free", "--label", "models", "--pin", PIN, "--so-pin", PIN)
    of = ("pkcs11-tool", "--module", MODULE, "--token-label", "models", "--login", "--pin", PIN)
    tool(*of, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "release", "--id", "01", "--usage-sign")
    tool(*of, "--read-object", "--type", "pubkey", "--label", "release", "--output-file", folder / "public.der")
    key = serialization.load_der_public_key((folder / "public.der").read_bytes())
    (folder / "public").write_bytes(key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return environment, folder / "public"


def uri(label="release", pin=PIN, module=MODULE):
    return f"pkcs11:token=models;object={label}?module-path={module}&pin-value={pin}"


def sign(out, environment, *words, code=0):
    """Sign in a process of its own: a token is opened once in each."""
    command = [sys.executable, "-m", "carnet", "sign", out, *map(str, words)]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_a_key_in_a_token_signs_and_their_command_believes_it(chain, token, theirs):
    environment, public = token
    assert "by model.sig" in sign(chain / "hf", environment, "--pkcs11", uri()).stdout
    assert signing.check(chain / "hf", Trust(public_key=public))
    code, words = theirs("verify", "key", chain / "hf", "--signature", chain / "hf/model.sig", "--public_key", public)
    assert code == 0, words


def test_a_certificate_of_a_key_in_a_token_is_believed_by_its_root(chain, token, tmp_path):
    environment, public = token
    authority = ec.generate_private_key(ec.SECP256R1())

    class Of:
        """What a certificate is made of: the key itself never leaves its token."""

        public_key = staticmethod(lambda: serialization.load_pem_public_key(public.read_bytes()))

    made = {"certificate": certified(Of, "signer", authority, "root", root=False)}
    made["root"] = certified(authority, "root", authority, "root", root=True)
    for name, each in made.items():
        (tmp_path / name).write_bytes(each.public_bytes(PEM))
    (tmp_path / "pin").write_text(PIN)
    named = uri().replace(f"pin-value={PIN}", f"pin-source={tmp_path / 'pin'}")
    sign(chain / "hf", environment, "--pkcs11", named, "--certificate", tmp_path / "certificate")
    assert signing.check(chain / "hf", Trust(certificate_chain=[tmp_path / "root"]))


WRONG = {
    "pin": {"pin": "314159"},
    "label": {"label": "other"},
    "module": {"module": "/usr/lib/nowhere.so"},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_token_that_does_not_sign_is_one_refusal_and_nothing_is_written(chain, token, wrong):
    before = sorted(path.name for path in (chain / "hf").iterdir())
    refused = sign(chain / "hf", token[0], "--pkcs11", uri(**WRONG[wrong]), code=1)
    assert refused.stderr.startswith("carnet: ")
    assert "Traceback" not in refused.stderr
    assert "314159" not in refused.stderr
    assert PIN not in refused.stderr
    assert sorted(path.name for path in (chain / "hf").iterdir()) == before
