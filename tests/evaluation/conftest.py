"""The tiny model of `tiny_model`, in memory and in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
from hyperframe.evaluation import LanguageModel, of_parts
from tests.evaluation.tiny_model import letters, llama, prose


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return of_parts(llama(), letters(), name="tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in a folder, beside a text and a file of questions."""
    found = tmp_path_factory.mktemp("model")
    llama().save_pretrained(found / "llama")
    letters().save_pretrained(found / "llama")
    (found / "text.txt").write_text(prose(700), encoding="utf-8")
    return found
