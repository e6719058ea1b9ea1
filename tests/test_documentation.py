"""What the documentation shows must run: docstring examples, README blocks, Makefile targets."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import hyperframe
from hyperframe import detectors, estimators, samplers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
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
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace = _small_model()
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


# a block, and what is indented right behind it: what it prints
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n((?:    [^\n]*\n)*))?", flags=re.DOTALL)
EXECUTED = (
    "concepts.md", "evaluation.md", "how-to-choose.md", "index.md", "theory.md", "transformers.md",
    "troubleshooting.md", "tuning.md", "write-a-detector.md", "write-a-sampler.md",
    "write-an-estimator.md",
)  # fmt: skip
# pages that a test of their own runs, because what they say has to be judged too
JUDGED = ("conformance.md", "sketching.md")
# what they print hangs on draws that are not fixed; or nothing is printed, and commands follow
UNSEEDED, SILENT = ("theory.md",), ("evaluation.md", "how-to-choose.md", "tuning.md")
# pages about a model and files of the reader's: the same calls, of sizes that a test can afford
AFFORDABLE = {
    "evaluation.md": (("[4096]", "[128]"), ("[10, ", "[1, "), (', "passkey"]', "]")),
    "how-to-choose.md": (),
    "tuning.md": (("length=4096", "length=128"),),
}


@pytest.mark.parametrize("name", EXECUTED)
def test_code_blocks_of_a_page_run_and_print_what_they_say(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    blocks = BLOCK.findall(page)
    assert len(blocks) == page.count("```python") > 0
    # messages of a machine without a GPU, where nobody has asked for the interpreter
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(tmp_path)
    # a module that can be found, as copies of its classes must find it
    module = types.ModuleType(f"{Path(name).stem.replace('-', '_')}_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    if name in AFFORDABLE:
        given = _small_model()
        if name == "tuning.md":
            given["tokens"] = given["tokens"].flatten()
        vars(module).update(given)
        _write_small_model(tmp_path)
        for asked, cheaper in AFFORDABLE[name]:
            assert page.count(asked) == 1
            page = page.replace(asked, cheaper)
        blocks = BLOCK.findall(page)
    registries = (detectors.registry, estimators.registry, samplers.registry)
    known = [set(registry.names()) for registry in registries]
    try:
        for number, (block, printed) in enumerate(blocks):
            exec(compile(block, f"{name}, block {number}", "exec"), vars(module))
            said = capsys.readouterr().out
            if name in UNSEEDED:
                assert said
            elif name in SILENT:
                assert not said
            else:
                assert said == re.sub("^    ", "", printed, flags=re.MULTILINE)
    finally:
        for registry, before in zip(registries, known, strict=True):
            for added in set(registry.names()) - before:
                registry.unregister(added)


def _small_model() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=4, vocab_size=50,
    )  # fmt: skip
    return {"model": LlamaForCausalLM(config).eval(), "tokens": torch.arange(1000)[None] % 50}


def _write_small_model(folder: Path) -> None:
    """A model that reads letters, a book, and a policy."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from hyperframe.integrations.policy import Policy, Rule

    letters = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)}, " "))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, vocab_size=95,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "my-llama")
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder / "my-llama")
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 8)
    Policy(rules=[Rule(layers="all", attention="exact")]).save(folder / "policy.json")


def test_every_page_with_code_is_run() -> None:
    with_code = {page.name for page in DOCS.rglob("*.md") if "```python" in page.read_text("utf-8")}
    assert with_code == {*EXECUTED, *JUDGED}


def test_code_blocks_of_the_page_on_sketching_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "sketching.md").read_text(encoding="utf-8")
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


PAGES = sorted(DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
def test_links_to_files_and_headings_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} -> {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} -> {target}"


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)


def _anchors(page: Path) -> set[str]:
    """The names that headings have as targets, on GitHub and in the site."""
    headings = re.findall(r"^#+ (.*)", _without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"```{toctree}\n(.*?)```", index, flags=re.DOTALL)
    lines = [line for tree in trees for line in tree.split("\n") if line and line[0] != ":"]
    listed = [re.sub(r".* <(.*)>", r"\1", line) for line in lines]  # an entry, or title <entry>
    pages = [page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES]
    assert sorted([*listed, "index"]) == sorted([*pages, "api/index"])


# pictures that a command of ours draws; the page that shows one says how
DRAWN_BY = {"frontier.png": "hyperframe frontier", "report-masks.png": "hyperframe report"}


@pytest.mark.parametrize(
    "image", sorted((DOCS / "images").glob("*.png")), ids=lambda path: path.name
)
def test_every_picture_is_shown_and_can_be_drawn_again(image: Path) -> None:
    shown_on = [page for page in PAGES if f"(images/{image.name})" in page.read_text("utf-8")]
    assert shown_on
    if image.name in DRAWN_BY:
        assert any(DRAWN_BY[image.name] in page.read_text("utf-8") for page in shown_on)
    else:
        assert (DOCS / "images" / f"make_{image.stem.partition('-')[0]}.py").exists()


def test_the_pictures_of_the_concepts_are_drawn(tmp_path: Path) -> None:
    script = runpy.run_path(str(DOCS / "images" / "make_concepts.py"))
    functions = [script[name] for name in script if name.startswith("draw_")]
    functions[0].__globals__["HERE"] = tmp_path
    for function in functions:
        function()
    kept = {image.name for image in (DOCS / "images").glob("concepts-*.png")}
    assert {image.name for image in tmp_path.iterdir()} == kept


def _extension(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    return importlib.import_module(name)


def test_every_public_module_is_in_the_api_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    api = _extension(monkeypatch, "modules_of")
    text = "\n".join(page.read_text("utf-8") for page in sorted((DOCS / "api").glob("*.rst")))
    listed = re.findall(r"^\.\. automodule:: (\S+)", text, flags=re.MULTILINE)
    for package, options in re.findall(
        r"^\.\. modules-of:: (\S+)\n((?:   .*\n)*)", text, flags=re.M
    ):
        given = dict(re.findall(r":(\w+): *(.*)", options))
        names = set(api.modules_of(package, given.get("only", ""), given.get("exclude", "")))
        if "registered" in given:
            names &= set(api.registered(package))
        elif "unregistered" in given:
            names -= set(api.registered(package))
        assert names, package
        listed += names
    public = {"hyperframe", *api.modules_of("hyperframe", "", "kernels.triton")}
    places = {f"hyperframe.{kind}s" for kind in ("detector", "sampler", "estimator")}
    assert len(listed) == len(set(listed))
    # the packages of the three registries have a page each, with words of its own
    assert set(listed) == public - places


def test_a_constant_that_is_a_table_is_shown_without_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sphinx import addnodes

    extension = _extension(monkeypatch, "docstrings")
    for value, is_kept in (("= 300", True), (f"= {list(range(300))}", False)):
        signature = addnodes.desc_signature("", "", addnodes.desc_name("", "TABLE"))
        signature += [addnodes.desc_annotation("", ": list"), addnodes.desc_annotation("", value)]
        content = addnodes.desc_content()
        addnodes.desc("", signature, content)
        extension._without_tables(None, "py", "data", content)
        assert signature.astext().endswith(value if is_kept else ": list")


def test_docstrings_are_made_ready_for_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = _extension(monkeypatch, "docstrings").adapted
    assert adapted(["Cost: O(n). Random. Source: a paper."]) == [
        "**Cost:** O(n). Random.", "", "**Source:** a paper."
    ]  # fmt: skip
    assert adapted(["2 * n, `a * b`, |x|, x_"]) == ["2 \\* n, `a * b`, \\|x\\|, x\\_"]
    assert adapted(["an *entry* and a * b * c"]) == ["an *entry* and a \\* b \\* c"]
    formula = ["A block", "", "    a * b", "    c", "", "and text."]
    assert adapted(formula) == ["A block", "", "::", "", "    a * b", "    c", "", "and text."]
    assert adapted(["- a", "", "    b"]) == ["- a", "", "    b"]
    untouched = ["Args:", "    x: factor.", "    **options: passed on.", "", ">>> 2 * 3", "6"]
    assert adapted(untouched) == untouched


def test_every_command_is_on_its_page_with_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _extension(monkeypatch, "commands_of").commands()
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `hyperframe (\w+)`", page, flags=re.M)) == {*found, "doctor"}
    described = sys.modules["commands_of"].described
    for name, command in found.items():
        lines = described(name, command)
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert any(re.match(rf"`(.* )?{option}\b", line) for line in lines), option
        assert any(line.strip().startswith(f"hyperframe {name} ") for line in lines)


def test_every_extra_is_explained() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE)) - {
        "dev",
        "docs",
        "sketch",
    }
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("| extra |")[2].partition("\n\n")[0]
    assert extras == set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))


def test_messages_of_the_integration_are_those_that_it_has() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("| message names |")[2].partition("\n\n")[0]
    quoted = [
        name
        for row in table.split("\n")[2:]
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    folder = ROOT / "hyperframe" / "integrations"
    code = "".join(module.read_text(encoding="utf-8") for module in sorted(folder.glob("*.py")))
    # messages are written as strings one below the other
    joined = re.sub(r'"\n\s+f?"', "", code)
    assert len(quoted) > 10
    for text in quoted:
        assert text in joined, text
