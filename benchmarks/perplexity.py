"""What attention costs a real model in perplexity: all layers of SmolLM2-135M-Instruct replaced.

Each `--run` is a detector with options of `HyperAttention` behind it, separated by semicolons.
One row for each run and text: perplexity (base e), its change against exact attention on the same
device and tokens, and seconds.

    python benchmarks/perplexity.py --text prose code --run balanced --run accurate \
        --out benchmarks/results/perplexity-smollm2.jsonl
    python benchmarks/perplexity.py --text novel.txt --device cuda \
        --run 'balanced; sampler=uniform' --run 'fast; num_samples=512'
    python benchmarks/perplexity.py \
        --run 'heavy_columns(num_columns=192); causal=recursive; min_seq_len=512'
"""

from __future__ import annotations

import argparse
import ast
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from demo import load_model, mean_loss, read_text

from hyperframe.benchmarking.report import append_rows
from hyperframe.integrations.transformers import apply


def options_of(run: str) -> dict[str, Any]:
    """Return the options of a run: `"balanced; sampler=uniform; num_samples=512"`.

    Example:
        >>> options_of("fast; num_samples=512; causal=recursive")["num_samples"]
        512
    """
    detector, *rest = (part.strip() for part in run.split(";"))
    options: dict[str, Any] = {"detector": detector, "min_seq_len": 0}
    for entry in rest:
        name, _, value = entry.partition("=")
        try:
            options[name.strip()] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):  # a name or a spec
            options[name.strip()] = value.strip()
    return options


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", nargs="+", default=["prose"], help="prose, code, or files")
    parser.add_argument("--length", type=int, default=8192, help="tokens (model limit 8192)")
    parser.add_argument("--run", action="append", required=True, help="detector; option=value; ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    warnings.filterwarnings("ignore", module="gguf")
    model, tokenizer = load_model()
    model = model.to(options.device)
    device = options.device
    if torch.device(device).type == "cuda":
        device = torch.cuda.get_device_name()
    for text in options.text:
        tokens = tokenizer(read_text(text), return_tensors="pt").input_ids
        if tokens.shape[1] < options.length:
            parser.error(f"{text} has {tokens.shape[1]} tokens, fewer than {options.length}")
        tokens = tokens[:, : options.length].to(options.device)
        exact = mean_loss(model, tokens)
        print(f"{Path(text).name}: exact attention, perplexity {math.exp(exact):.3f}", flush=True)
        for run in options.run:
            started = time.perf_counter()
            with apply(model, "all", seed=options.seed, **options_of(run)) as applied:
                loss = mean_loss(model, tokens)
            row = {
                "text": Path(text).name, "tokens": options.length, "run": run,
                "attention": repr(applied.attention), "layers": len(applied.layers),
                "seed": options.seed, "exact_perplexity": math.exp(exact),
                "perplexity": math.exp(loss), "change_percent": 100 * math.expm1(loss - exact),
                "seconds": time.perf_counter() - started, "device": device, "dtype": "float32",
                "torch": torch.__version__,
            }  # fmt: skip
            print(
                f"  {run}: perplexity {row['perplexity']:.3f}, {row['change_percent']:+.2f} %, "
                f"{row['seconds']:.0f} s", flush=True,
            )  # fmt: skip
            if options.out:
                append_rows(options.out, [row])


if __name__ == "__main__":
    main()
