"""What the documentation shows must run: docstring examples, README blocks, Makefile targets."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest

import hyperframe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ["hyperframe"] + [
    module.name for module in pkgutil.walk_packages(hyperframe.__path__, "hyperframe.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_print_what_they_say(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    module = importlib.import_module(name)
    # examples use torch and the names of their own module
    globals_ = {**vars(module), "torch": importlib.import_module("torch")}
    failed, _ = doctest.testmod(module, optionflags=flags, extraglobs=globals_)
    assert failed == 0


def test_code_blocks_of_the_readme_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from hyperframe import detectors

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, vocab_size=50,
    )  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace = {"model": LlamaForCausalLM(config).eval()}
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    finally:
        detectors.registry.unregister("largest_keys")
    printed = capsys.readouterr().out
    errors = [float(error) for error in re.findall(r"relative error ([\d.]+)", printed)]
    # what the text around the block says: columns are found, angles find nothing
    assert len(errors) == 2
    assert errors[0] < 0.3 < 0.8 < errors[1]


def test_code_blocks_of_write_a_detector_run_and_print_what_they_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperframe import detectors

    page = (ROOT / "docs" / "write-a-detector.md").read_text(encoding="utf-8")
    # a block, and what is indented right behind it: what it prints
    blocks = re.findall(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)*)", page, flags=re.DOTALL)
    assert len(blocks) == page.count("```python") > 4
    # a module that can be found, as copies of its classes must find it
    module = types.ModuleType("write_a_detector")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        for number, (block, printed) in enumerate(blocks):
            exec(compile(block, f"write-a-detector.md, block {number}", "exec"), vars(module))
            assert capsys.readouterr().out == re.sub("^    ", "", printed, flags=re.MULTILINE)
    finally:
        if "peaks" in detectors.names():
            detectors.registry.unregister("peaks")


def test_code_blocks_of_the_page_on_sketching_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "sketching.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "sketching.md", "exec"), {})
    # the sketch finds what it is said to find: the draw is fixed
    assert float(capsys.readouterr().out.split()[0]) >= 0.97


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = set(re.findall(r"`?\bmake ([a-z]+)\b", README)) - {"are"}
    assert {"demo", "test"} <= asked
    for target in asked:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"])
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
