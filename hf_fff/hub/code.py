"""Remote code beside what is published, where the folder itself was made without it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from ..remote import save_remote_code
from .contents import Contents


def with_remote_code(contents: Contents, place: Path) -> Contents:
    """The same model with the file that opens it where hf_fff is not installed (``hf_fff.remote``), and with a config that names it.
    Both are written to ``place``, an empty folder that is needed until all is sent; the model's folder stays as it is.

    Raises:
        ValueError: there is no remote code for the model, or it is a delta.
    """
    if "fff_delta" in contents.config:
        raise ValueError("a delta needs hf_fff to be opened, which remote code is to do without")
    transformer = contents.folder.transformer
    shutil.copy(transformer / "config.json", place)
    save_remote_code(AutoConfig.from_pretrained(transformer), place)
    inner = transformer.relative_to(contents.folder.root)
    files = contents.files | {(inner / path.name).as_posix(): path for path in place.iterdir()}
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    return replace(contents, config=config, files=dict(sorted(files.items())))
