"""What an evaluation was made from, by hash: model, adapter, cases, and a narrative that must not be written down."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from grpo.types import Case

MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def folder_sha256(folder: Path, patterns: Sequence[str]) -> str:
    """Of the names and contents of the files that match, whatever else lies beside them."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return _sha256([[file.name, _file_sha256(file)] for file in files])


def cases_sha256(cases: Sequence[Case]) -> str:
    """Of ids, texts, levels and tags, in their order.

    >>> cases_sha256([Case("a", "Cough.", 4)]) == cases_sha256([Case("a", "Cough.", 5)])
    False
    """
    return _sha256([[case.id, case.text, case.esi, list(case.tags)] for case in cases])


def text_sha256(text: str) -> str:
    """What stands for a narrative where the narrative must not stand: of its UTF-8.

    >>> text_sha256("Cough.")[:8]
    'f4cc7957'
    """
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name  # the hub's cache names large files by their sha256: 18 GB need not be read again
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
