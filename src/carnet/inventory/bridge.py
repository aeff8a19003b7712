"""The run_config.yaml beside a store for Megatron-Bridge: what its provider makes of it must be the model, or nothing is written."""

from collections.abc import Mapping

from yaml import YAMLError

from carnet.architectures.known import recognise
from carnet.dialects.kinds import KINDS
from carnet.dialects.megatron.providers import MODELS, SKIPPED, UNSAID, lacked, provider_for
from carnet.errors import CarnetError, NotSupported
from carnet.formats.adapters import BRIDGE as PEFT
from carnet.formats.files import digest_of, read_whole
from carnet.formats.run_config import CUT, adapters_alone, run_config
from carnet.formats.stored import Checkpoint
from carnet.formats.wrapped import RUN_CONFIG, YAML_LIMIT, arguments_of, parse_yaml
from carnet.model.fields import FIELDS, Config
from carnet.model.model import matters, value
from carnet.storage.protocol import FILE

NO_PROVIDER = "carnet knows no provider of Megatron-Bridge's that makes this model"
REMEDY = "--read-by megatron-bridge without --spelling bridge writes the store alone"


def checked(said: Mapping[str, object], config: Config, cut: Mapping[str, int]) -> bytes:
    """Return the file for a model, for so many ranks; raise NotSupported where no provider is known that makes it."""
    text = run_config_of(said, cut)
    different = _different(text, config)
    if different:
        raise NotSupported(NO_PROVIDER, {"it would differ in": ", ".join(different)}, remedy=REMEDY)
    return text


def of_adapters(said: Mapping[str, object], config: Config, cut: Mapping[str, int]) -> bytes:
    """Return the file for adapters: what is said of those alone, where no provider is known that makes their model."""
    try:
        return checked(said, config, cut)
    except NotSupported:
        return adapters_alone(said[PEFT]).encode()


def run_config_of(said: Mapping[str, object], cut: Mapping[str, int]) -> bytes:
    """Return the file for arguments, for so many ranks; raise NotSupported where no provider brings what they lack."""
    lacking, row = lacked(said), provider_for(said)
    if lacking and row is None:
        raise NotSupported(NO_PROVIDER, {"beyond arguments": ", ".join(lacking)}, remedy=REMEDY)
    names, words = ("", ""), dict[str, object]()
    if row is not None:
        top = f"{MODELS}{row.module}."
        names = (f"{top}{row.name}" if row.name else "", f"{top}{row.spec}" if row.spec else "")
        words = {
            **({} if row.windows is None else {SKIPPED: None}),
            **row.says,
            **{key: lacking[name] for key, name in row.keys.items() if name in lacking},
        }
    plain = {key: each for key, each in said.items() if key not in (UNSAID, PEFT)}
    return run_config(plain, cut, *names, words, said.get(PEFT)).encode()


def vouched(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the file that a store of carnet's has for Megatron-Bridge: its path -> the digest that its arguments make of it."""
    root, read = checkpoint.root, {each.file for each in checkpoint.stamps}
    if not KINDS[checkpoint.dialect].arguments or root.kind(RUN_CONFIG) != FILE or RUN_CONFIG in read:
        return {}
    try:
        model = parse_yaml(read_whole(root, RUN_CONFIG, YAML_LIMIT)[0], RUN_CONFIG, root).get("model")
        cut = {key: model.get(word) if isinstance(model, dict) else 1 for key, word in CUT.items()}
        text = run_config_of(
            checkpoint.config, {key: count if type(count) is int and count > 0 else 1 for key, count in cut.items()}
        )
    except (CarnetError, YAMLError, RecursionError):  # of arguments that anyone may have written
        return {}
    return {f"{root.name}/{RUN_CONFIG}": digest_of(text)}


def _different(text: bytes, config: Config) -> list[str]:
    """Return the fields of a model that are others where the file is read again."""
    try:
        arguments = arguments_of(parse_yaml(text, RUN_CONFIG, "what would be written"), RUN_CONFIG)
        made = recognise("megatron", arguments, RUN_CONFIG, {})[1]
    except CarnetError as error:
        return [str(error).split("\n", 1)[0]]
    kept = [field for field in FIELDS if not field.soft and not field.storage]
    return [
        field.name for field in kept if matters(config, field.name) and value(made, field.name) != value(config, field.name)
    ]
