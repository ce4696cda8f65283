"""Hashes of what a run or an evaluation was made from: model, adapter, cases, and texts that must not be written."""

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
    """Return the sha256 of the names and contents of the files in a folder that match one of the patterns."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return text_sha256(json.dumps([[file.name, _file_sha256(file)] for file in files]))


def cases_sha256(cases: Sequence[Case]) -> str:
    """Return the sha256 of the ids, texts, levels and tags of the cases, in order.

    >>> cases_sha256([Case("a", "Cough.", 4)]) == cases_sha256([Case("a", "Cough.", 5)])
    False
    """
    return text_sha256(json.dumps([[case.id, case.text, case.gold_level, list(case.tags)] for case in cases]))


def text_sha256(text: str) -> str:
    """Return the sha256 of a text in UTF-8, which identifies a narrative without containing it.

    >>> text_sha256("Cough.")[:8]
    'f4cc7957'
    """
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _file_sha256(file: Path) -> str:
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name  # the hub's cache names large files by their sha256: 18 GB need not be read again
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
