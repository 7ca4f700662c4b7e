"""An adapter as others find it on a hub: its files, and the code by which transformers' `generate` decodes with it.

    model.generate(**inputs, custom_generate="owner/name", trust_remote_code=True)

adapter directory ── write_repository ──► folder ── ptp.model.hub.upload ──► owner/name ── from_pretrained, generate
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ptp.errors import AdapterError
from ptp.files import appearing
from ptp.model.adapter import FILES, PEFT_CONFIG, read_settings, write_code, write_settings
from ptp.model.card import model_card
from ptp.model.hub import is_hub_id


def write_repository(adapter: Path, folder: Path, repo_id: str, base_model: str | None = None) -> None:
    """Write what is pushed: the adapter's files, never the base model's or a training's, and a model card.

    folder: must not exist yet. base_model: hub id, needed where the adapter knows its base model by a path alone.
    Raises `AdapterError` for a base model that nobody else could load.
    """
    if not is_hub_id(repo_id):
        raise AdapterError(f"a repository on the hub is called owner/name; got '{repo_id}'")
    settings = read_settings(adapter)
    name = base_model or settings.base_model
    if base_model is None and ((adapter / name).is_dir() or name.startswith(("/", ".")) or not name):
        raise AdapterError(
            f"the base model is known here as '{name}', which means nothing elsewhere: give its hub id as base_model "
            "(--base-model)"
        )
    if folder.exists():
        raise AdapterError(f"{folder} is there already; choose another folder, or remove it")
    missing = [file for file in FILES if not (adapter / file).is_file()]
    if missing:
        raise AdapterError(f"{adapter} is no whole adapter: {missing[0]} is missing")
    with appearing(folder) as temporary:
        copy_adapter(adapter, temporary, name)
        (temporary / "README.md").write_text(model_card(adapter, repo_id, name), encoding="utf-8")


def copy_adapter(adapter: Path, folder: Path, base_model: str) -> None:
    """An adapter's files and no others, in a new folder, where the base model is known by another name."""
    folder.mkdir()
    for file in FILES:
        shutil.copyfile(adapter / file, folder / file)
    write_settings(folder, read_settings(adapter).model_copy(update={"base_model": base_model}))
    peft = json.loads((adapter / PEFT_CONFIG).read_text(encoding="utf-8")) | {"base_model_name_or_path": base_model}
    (folder / PEFT_CONFIG).write_text(json.dumps(peft, indent=2, sort_keys=True), encoding="utf-8")
    write_code(folder)
