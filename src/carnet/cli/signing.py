"""The commands `carnet sign` and `carnet lineage`, and the options that `carnet verify` shares with them."""

from typing import TYPE_CHECKING, Any

import click

from carnet.cli.commands import Verb, main
from carnet.cli.options import Grouped, existing_file, existing_folder, json_option, said, together
from carnet.cli.progress import progress_bar
from carnet.cli.telling import print_lines, width

if TYPE_CHECKING:
    from carnet.signing import Trust

OTHERS, TRUST = "Other keys", "Signature"


def place(value: str | tuple[str, str]) -> tuple[str, str]:
    """Read where a source lies, as a person writes it."""
    name, tied, folder = value.partition("=") if isinstance(value, str) else (value[0], "=", value[1])
    if not (name and tied and folder):
        raise click.BadParameter(f"{value!r} is no place; write iter_0000001=runs/llama/iter_0000001")
    return name, folder


search_options = together(
    click.option(
        "--at",
        type=place,
        multiple=True,
        metavar="NAME=FOLDER",
        help="Where the source of this name lies now. May be repeated.",
    ),
    click.option(
        "--beside",
        type=existing_folder,
        multiple=True,
        metavar="FOLDER",
        help="Look for sources in here, three folders deep.  [default: the folder that OUT lies in, and this one]",
    ),
)


def _trust(name: str, text: str, **given: Any) -> Any:  # noqa: ANN401  as click's own
    return click.option(name, cls=Grouped, group=TRUST, help=text, **given)


trust_options = together(
    _trust("--public-key", "Believe the signature of this key, PEM.", type=existing_file, metavar="FILE"),
    _trust(
        "--certificate-chain",
        "Believe signatures of certificates that these lead to, PEM. May be repeated.",
        type=existing_file,
        multiple=True,
        metavar="FILE",
    ),
    _trust("--identity", "Believe the signature of this identity (Sigstore).", metavar="NAME"),
    _trust("--identity-provider", "Who says so: https://accounts.google.com.", metavar="URL"),
    _trust("--trust-config", "Of another instance of Sigstore.", type=existing_file, metavar="FILE"),
)
NAMES = ("public_key", "certificate_chain", "identity", "identity_provider", "trust_config")


def trusted(options: Any, ctx: click.Context, *, asked: bool = False) -> "Trust | None":  # noqa: ANN401  options of any command
    """Take out of a command's options whose signature is believed; None where nothing was said of it."""
    from carnet.signing import Trust

    given = said({name: options.pop(name, None) for name in NAMES})
    if not given and not asked:
        return None
    if not given.keys() & {"public_key", "certificate_chain"} and not {"identity", "identity_provider"} <= given.keys():
        needs = "--public-key KEY, --certificate-chain CERTIFICATES, or --identity NAME with --identity-provider URL"
        raise click.UsageError(f"whose signature is believed? {needs}", ctx)
    return Trust(**given)


@main.command(
    cls=Verb,
    epilog="carnet sign out/llama --key key.pem\n"
    "carnet sign out/llama --key key.pem --certificate signer.pem --chain ca.pem\n"
    "carnet sign out/llama --pkcs11 'pkcs11:token=models;object=release?module-path=/usr/lib/libsofthsm2.so'\n"
    "carnet sign out/llama --sigstore",
)
@click.argument("out", type=existing_folder)
@click.option("--key", type=existing_file, metavar="FILE", help="Private key, PEM, on the curve P-256, P-384 or P-521.")
@click.option("--password-file", type=existing_file, metavar="FILE", help="What the key is encrypted with: the first line.")
@click.option(
    "--certificate", type=existing_file, metavar="FILE", help="The key's certificate, PEM: the signature says whose it is."
)
@click.option(
    "--chain", type=existing_file, multiple=True, metavar="FILE", help="Certificates up to a root, PEM. May be repeated."
)
@click.option(
    "--pkcs11", metavar="URI", cls=Grouped, group=OTHERS, help="A key that a token or an HSM keeps (pip install PyKCS11)."
)
@click.option("--sigstore", is_flag=True, help="Sign as who you are: in a browser, or as the CI job that this runs in.")
@click.option("--identity-token", metavar="TOKEN", cls=Grouped, group=OTHERS, help="Who you are, for --sigstore.")
@click.option(
    "--trust-config", type=existing_file, metavar="FILE", cls=Grouped, group=OTHERS, help="Of another instance of Sigstore."
)
@search_options
@json_option
@click.pass_context
def sign(
    ctx: click.Context,
    /,
    out: str,
    password_file: str | None,
    at: tuple[tuple[str, str], ...],
    beside: tuple[str, ...],
    as_json: bool,
    **options: Any,  # noqa: ANN401  those of a key, as they are
) -> None:
    """Sign every file of OUT as OpenSSF's model_signing does (model.sig), with a statement of where it came from.

    The statement, carnet.intoto.jsonl, is in-toto's with SLSA's provenance: the digests of OUT's files and of its source's tensors, the
    request, the versions. It needs `pip install 'carnet[sign]'`; `model_signing verify` reads what this writes.
    """
    from carnet import signing
    from carnet.formats.files import read_whole
    from carnet.report.data import dump
    from carnet.report.tables import facts_in_lines
    from carnet.storage.schemes import file_at

    ways = [name for name in ("key", "pkcs11", "sigstore") if options.get(name)]
    if len(ways) != 1:
        raise click.UsageError("sign with what? one of --key FILE, --pkcs11 URI and --sigstore", ctx)
    password = None if password_file is None else read_whole(*file_at(password_file))[0].decode().partition("\n")[0]
    key = signing.Key(password=password, **said(options))
    with progress_bar() as progress:
        done = signing.sign(out, key, at=dict(at), beside=beside, progress=progress)
    if as_json:
        click.echo(dump({"target": done.target, "files": done.files, "sources": dict(done.sources)}))
        return
    found = [f"{name} ({folder})" if folder else f"{name}, whose folder is not here" for name, folder in done.sources.items()]
    facts = {"signed": f"{out}: {len(done.files)} files, by model.sig", "source": ", ".join(found)}
    print_lines(facts_in_lines({label: line for label, line in facts.items() if line}, width()))


@main.command(
    cls=Verb,
    epilog="carnet lineage out/llama-trtllm\ncarnet lineage out/llama-trtllm --public-key key.pub --beside /archive\n"
    "carnet lineage out/llama-trtllm --at iter_0000100=/archive/llama/iter_0000100 --read",
)
@click.argument("out", type=existing_folder)
@search_options
@click.option("--read", is_flag=True, help="Read the first source, too, and compare the digest of its every tensor.")
@trust_options
@json_option
@click.pass_context
def lineage(
    ctx: click.Context,
    /,
    out: str,
    at: tuple[tuple[str, str], ...],
    beside: tuple[str, ...],
    read: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401  those of whose signature is believed
) -> None:
    """Follow OUT back to where it came from, folder by folder, and check each step.

    The digests that OUT's carnet.json has of its source must be those that the source's carnet.json has of itself, and so on. Exit code
    3 where that is not so, or a folder is not found. With --public-key and the like the signature of each folder is checked.
    """
    from dataclasses import asdict

    from carnet import lineage as following
    from carnet.report.ancestry import lineage_lines
    from carnet.report.data import dump

    trust = trusted(options, ctx)
    found = following.follow(out, at=dict(at), beside=beside, read=read, signature=_signature(trust))
    if as_json:
        click.echo(dump({"whole": bool(found), **asdict(found)}))
    else:
        print_lines(lineage_lines(found, width()))
    ctx.exit(0 if found else 3)


def _signature(trust: "Trust | None") -> Any:  # noqa: ANN401  lineage.Signature
    """Return what says how a folder is signed; what is signed has its bytes read where it is said who is believed."""
    from carnet.formats.side_files import SIGNATURE
    from carnet.storage.schemes import folder_at

    def tell(path: str) -> tuple[str, str]:
        from carnet import signing

        if not folder_at(path).kind(SIGNATURE):
            return "none", ""
        if trust is None:
            return "not checked", ""
        found = signing.check(path, trust)
        wrong = found.findings[0] if found.findings else None
        return str(found), f"{wrong.what}: {wrong.where}: {wrong.detail}" if wrong is not None else ""

    return tell
