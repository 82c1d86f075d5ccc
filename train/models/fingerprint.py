"""A fingerprint of the base, made without reading all its weights."""

import hashlib
import json
from pathlib import Path

from train.config import Config
from train.models.base import model_shape, not_found

MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library


def base_fingerprint(config: Config) -> str:
    """sha256 that tells one base from another without reading all its weights.

    Over config.json and, for each weight file, its header (names, types, shapes) and the first 4 KiB of every tensor;
    for random weights the seed; for a hub model the commit that was resolved.
    """
    shape = model_shape(config.model)
    settings = {key: value for key, value in shape.to_diff_dict().items() if key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    if config.model.random_init:
        digest.update(f"random {config.train.seed}".encode())
    elif Path(config.model.name_or_path).is_dir():
        for file in sorted(Path(config.model.name_or_path).glob("*.safetensors")):
            try:
                digest.update(file.name.encode() + _sampled_bytes(file))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise not_found(config.model, f"safetensors weights in {file.name}", error) from None
    else:
        digest.update(str(getattr(shape, "_commit_hash", None)).encode())
    return digest.hexdigest()


def _sampled_bytes(file: Path) -> bytes:
    """The header of a safetensors file and the first 4 KiB of each tensor in it."""
    with file.open("rb") as stream:
        header = stream.read(min(int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES))
        samples = [header]
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                stream.seek(8 + len(header) + start)
                samples.append(stream.read(min(4096, end - start)))
    return b"".join(samples)
