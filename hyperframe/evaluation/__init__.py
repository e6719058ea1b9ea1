"""What a faster attention costs a language model: perplexity, seconds, long-range probes, tasks.

`hyperframe eval` is the command line of this package. In Python:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    >>> letters = Tokenizer(models.WordLevel({chr(i): i - 32 for i in range(32, 127)}, " "))
    >>> letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
    ...                      num_key_value_heads=2, num_hidden_layers=2, vocab_size=95)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     LlamaForCausalLM(config).save_pretrained(folder)
    ...     _ = PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    ...     text = Path(folder, "text.txt")
    ...     _ = text.write_text("the quick brown fox jumps over the lazy dog. " * 3)
    ...     made = evaluate(folder, out=Path(folder, "eval"), texts=[text], lengths=[64],
    ...                     specs=["heavy_columns(num_columns=64)"], tasks=["perplexity"])
    ...     [file.name for file in made.files]
    ['index.html', 'positions.png', 'rows.jsonl']
    >>> exact, approximate = made.rows
    >>> approximate["layers"], abs(approximate["change"]) < 1e-3  # all 64 columns are held
    (2, True)

Every number is relative to exact attention of the same run; figures and tables are drawn from the
rows (`EVAL_KEYS`) alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .metrics import METRICS
from .model import DEMO, LanguageModel, find_model, load_language_model, of_parts
from .rows import EVAL_KEYS, KEY_FIELDS, known_rows
from .run import Progress, run
from .settings import ALL, EXACT, TASKS, EvalSettings, Run, options_of
from .write import ROWS, Evaluation, check_plotting, print_tables, write

__all__ = [
    "ALL",
    "DEMO",
    "EVAL_KEYS",
    "EXACT",
    "KEY_FIELDS",
    "METRICS",
    "ROWS",
    "TASKS",
    "EvalSettings",
    "Evaluation",
    "LanguageModel",
    "Progress",
    "Run",
    "check_plotting",
    "evaluate",
    "find_model",
    "known_rows",
    "load_language_model",
    "of_parts",
    "options_of",
    "print_tables",
    "run",
    "write",
]


def evaluate(
    model: str | LanguageModel, *, out: Path | str, gguf: str | None = None, form: str = "png",
    progress: Progress | None = None, **options: Any,
) -> Evaluation:  # fmt: skip
    """Measure what approximate attention costs a model, and write rows, pictures and a page.

    Args:
        model: a folder, a GGUF file, a name on the hub, or what `load_language_model` returns.
        out: the folder to write to; made if it is not there. Rows that are in its `rows.jsonl` are
            not measured again.
        gguf: name of a GGUF file in the folder.
        form: of the pictures, "png" or "svg".
        progress: told of every row.
        **options: of `EvalSettings`, such as `texts=["book.txt"]`.

    Raises:
        ArgumentError: a model, text, file or number that cannot work, before anything is measured.
        MissingDependencyError: matplotlib is not installed, or the package of a metric.

    What cannot be measured is a row with its `failure`. Cost: forwards for each length, times
    1 + specs x layers runs: `windows` x texts for perplexity, `depths` x `trials` for the passkey,
    `trials` for induction, 2 x `repeats` for prefill. Deterministic, but for seconds and memory.
    """
    settings = EvalSettings(**options)
    check_plotting()
    if not isinstance(model, LanguageModel):
        model = load_language_model(model, gguf=gguf, device=settings.device, dtype=settings.dtype)
    rows = list(run(model, settings, out=Path(out) / ROWS, progress=progress))
    return write(model, settings, rows, out=Path(out), form=form)
