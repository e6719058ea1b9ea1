"""The parameters of HyperAttention's theorems on real heads: alpha, kappa, and samples asked for.

Section 4.3 of the paper, and what it leaves open. Heads come from files (`benchmarks/heads.py`,
causal: a prefix of a head is a head) or from a vision transformer (`benchmarks/vision.py`, not
causal: photographs of several sizes). For each head and length one row:

- `alpha` of the whole softmax matrix, and `alpha_rest` without its first 32 columns;
- `log10_kappa` of what a mask leaves, as defined and after subtracting the mean key (`_centred`).
  ApproxD works without a causal mask, so for causal heads this is the first rectangle of the
  recursion, the later half of the queries on the earlier half of the keys, and so is the next;
- `samples_median` and `samples_largest`, over the rows: columns `m` that bound the error of a row
  sum, uniform samples without cap or floor, by `epsilon / (2 + epsilon)` with all rows together
  failing once in a hundred (docs/theory.md, Proposition 2).

Masks: nothing, `sort_lsh` as published (blocks of 256), and the 256 largest entries of every row.

    python benchmarks/theory.py --heads heads-prose.safetensors heads-code.safetensors \
        --vision --out benchmarks/results/theory.jsonl
    python benchmarks/theory.py --read benchmarks/results/theory.jsonl
    python benchmarks/theory.py --times

`--times` says instead how long the diagnostics take: exact ones of nine heads at n = 8,192, sampled
ones (256 rows) of one head up to a million keys.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hyperframe import diagnostics
from hyperframe.benchmarking.report import append_rows
from hyperframe.detectors import create
from hyperframe.integrations.capture import load
from hyperframe.masks import HeavyMask, ListMask

SKIPPED = 32  # leading columns, as in the paper
EPSILON, FAILURE = 0.5, 0.01
MASKS = {"none": None, "sort_lsh": "sort_lsh(block_size=256)", "top_256": "oracle(budget=256)"}
SIZES = {224: 257, 392: 785, 518: 1370, 784: 3137}  # pixels of a side, and tokens


class Head(NamedTuple):
    """Queries and keys `[1, 1, n, d]` of one head, and its place."""

    source: str
    layer: int
    head: int
    query: torch.Tensor
    key: torch.Tensor
    scale: float
    is_causal: bool


def file_heads(path: Path, heads: list[int], lengths: list[int]) -> Iterator[Head]:
    """Yield some heads of each layer of a file, cut to every length."""
    for layer, found in load(path).items():
        group = found.query.shape[1] // found.key.shape[1]
        for head in heads:
            for n in lengths if found.is_causal else found.query.shape[2:3]:
                yield Head(
                    path.stem, layer, head, found.query[:1, head : head + 1, :n].float(),
                    found.key[:1, head // group : head // group + 1, :n].float(), found.scale,
                    found.is_causal,
                )  # fmt: skip


def vision_heads(heads: list[int]) -> Iterator[Head]:
    """Yield some heads of DINOv2-small looking at a photograph of several sizes."""
    from vision import heads_of, load_model

    model = load_model()
    for size in SIZES:
        for layer, (query, key, _) in heads_of(model, "china.jpg", size).items():
            for head in heads:
                pair = query[:, head : head + 1], key[:, head : head + 1]
                yield Head("vision-dinov2", layer, head, *pair, pair[0].shape[-1] ** -0.5, False)


def find(name: str, query: torch.Tensor, key: torch.Tensor, scale: float) -> HeavyMask:
    """Return one of the masks."""
    spec = MASKS[name]
    if spec is None:
        return ListMask.columns(
            torch.empty(1, 1, 0, dtype=torch.int64), num_query_heads=1,
            num_queries=query.shape[2], num_keys=key.shape[2],
        )  # fmt: skip
    source = torch.Generator().manual_seed(0)
    return create(spec).find(query, key, scale=scale, generator=source)


def samples(query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, scale: float) -> torch.Tensor:
    """Return the columns that each row asks for: `[n_q]`.

    The estimate of row i is the mean of m independent values `n P_ij` of its unmasked entries:
    Bernstein's inequality, with their variance `v` and their largest value `b`.
    """
    num_queries, num_keys, found = query.shape[2], key.shape[2], []
    error = EPSILON / (2 + EPSILON)
    log_term = math.log(2 * num_queries / FAILURE)
    for start in range(0, num_queries, 512):
        rows = slice(start, min(start + 512, num_queries))
        share = torch.softmax(scale * query[0, 0, rows] @ key[0, 0].mT, dim=-1)
        share = share.masked_fill_(mask.rows(rows.start, rows.stop)[0, 0], 0.0)
        total, largest = share.sum(dim=-1).double(), share.amax(dim=-1).double()
        variance = num_keys * share.square_().sum(dim=-1).double() - total.square()
        found.append((2 * variance / error**2 + 2 * num_keys * largest / (3 * error)) * log_term)
    return torch.cat(found).ceil()


def measure(head: Head) -> dict[str, Any]:
    """Return the row of one head."""
    query, key, scale, n = head.query, head.key, head.scale, head.key.shape[2]
    options: dict[str, Any] = {"scale": scale, "is_causal": head.is_causal}
    row: dict[str, Any] = {
        "source": head.source, "layer": head.layer, "head": head.head, "n": n,
        "is_causal": head.is_causal, "alpha": diagnostics.alpha(query, key, **options).item(),
        "alpha_rest": diagnostics.alpha(query, key, skip_first=SKIPPED, **options).item(),
    }  # fmt: skip
    if head.is_causal:
        query, key = query[:, :, n // 2 :], key[:, :, : n // 2]
    for name in MASKS:
        mask = find(name, query, key, scale)
        asked = samples(query, key, mask, scale)
        of_mask = {"samples_median": asked.median().item(), "samples_largest": asked.max().item()}
        for suffix, centred in (("", False), ("_centred", True)):
            log_kappa = diagnostics.log_kappa(query, key, mask, scale=scale, centred=centred)
            of_mask[f"log10_kappa{suffix}"] = log_kappa.item() / math.log(10)
        row[name] = of_mask
    return {**row, "epsilon": EPSILON, "failure": FAILURE, "torch": torch.__version__}


def times() -> str:
    """Return how long the diagnostics take, as a table in Markdown: the best of three."""
    lines = ["| diagnostic | heads | n | d | seconds | of all threads |", "|---|" + "---|" * 5]
    window = create("sliding_window(width=128)")

    def add(name: str, shape: tuple[int, int, int], call: Callable[[], Any]) -> None:
        wall, work = math.inf, math.inf
        for _ in range(3):
            start, of_threads = time.perf_counter(), time.process_time()
            call()
            wall = min(wall, time.perf_counter() - start)
            work = min(work, time.process_time() - of_threads)
        heads, n, dim = shape
        lines.append(f"| {name} | {heads} | {n:,} | {dim} | {wall:.2f} | {work:.2f} |")

    source = torch.Generator().manual_seed(0)
    shape = (9, 8192, 64)
    query, key = (torch.randn(1, *shape, generator=source) for _ in range(2))
    for is_causal in (False, True):
        mask, how = window.find(query, key, is_causal=is_causal), ", causal" * is_causal
        alpha = functools.partial(diagnostics.alpha, query, key, is_causal=is_causal)
        add(f"alpha{how}", shape, alpha)
        add(f"log_kappa{how}", shape, functools.partial(diagnostics.log_kappa, query, key, mask))
    for n in (1 << 16, 1 << 18, 1 << 20):
        shape = (1, n, 16)
        query, key = (torch.randn(1, *shape, generator=source) for _ in range(2))
        mask = window.find(query, key)
        options: dict[str, Any] = {"num_rows": 256, "generator": source}
        for name, arguments in (
            ("sampled_alpha", (query, key)), ("sampled_log_kappa", (query, key, mask)),
            ("sampled_entropy", (query, key)), ("sampled_mass", (query, key, mask)),
        ):  # fmt: skip
            call = functools.partial(getattr(diagnostics, name), *arguments, **options)
            add(name, shape, call)
    return "\n".join([f"{torch.get_num_threads()} threads", "", *lines])


def median(rows: list[dict[str, Any]], *path: str) -> float:
    """Return the median of what a path of names leads to."""
    values: list[Any] = rows
    for name in path:
        values = [value[name] for value in values]
    return float(statistics.median(values))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians over heads as two tables in Markdown."""
    alphas = ["| heads | n | alpha | without 32 columns | the same / n |", "|---|---|---|---|---|"]
    names = "kappa, nothing held|sort_lsh|top 256|centred|centred, top 256|m, nothing held|sort_lsh"
    names = f"heads|n|{names}|top 256|top 256, worst row"
    others = [f"| {names.replace('|', ' | ')} |", "|" + "---|" * 11]
    for source, n in dict.fromkeys((row["source"], row["n"]) for row in rows):
        chosen = [row for row in rows if (row["source"], row["n"]) == (source, n)]
        start = f"| {source}, {len(chosen)} | {n:,} | "
        rest = median(chosen, "alpha_rest")
        cells = [f"{median(chosen, 'alpha'):,.4g}", f"{rest:,.4g}", f"{rest / n:.2g}"]
        alphas.append(start + " | ".join(cells) + " |")
        cells = [f"{median(chosen, mask, 'log10_kappa'):.1f}" for mask in MASKS]
        cells += [f"{median(chosen, x, 'log10_kappa_centred'):.1f}" for x in ("none", "top_256")]
        cells += [f"{median(chosen, mask, 'samples_median'):,.0f}" for mask in MASKS]
        cells.append(f"{median(chosen, 'top_256', 'samples_largest'):,.0f}")
        others.append(start + " | ".join(cells) + " |")
    return "\n".join([*alphas, "", *others])


def main() -> None:
    """Measure, append the rows to a file, and print the table; or print that of a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--heads", type=Path, nargs="*", default=[], help="files of heads")
    parser.add_argument("--vision", action="store_true", help="also the heads of DINOv2-small")
    parser.add_argument("--head", type=int, nargs="+", default=[0, 4, 8], help="of the files")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--out", type=Path, help="append the rows to this JSON-lines file")
    parser.add_argument("--read", type=Path, help="measure nothing; take the rows of this file")
    parser.add_argument("--times", action="store_true", help="time the diagnostics instead")
    options = parser.parse_args()
    if options.times:
        print(times())
        return
    rows: list[dict[str, Any]] = []
    if options.read:
        rows = [json.loads(line) for line in options.read.read_text().splitlines()]
    for path in options.heads:
        rows += [measure(head) for head in file_heads(path, options.head, options.lengths)]
    if options.vision:
        rows += [measure(head) for head in vision_heads([0, 2, 4])]
    rows.sort(key=lambda row: (row["source"], row["n"]))
    if options.out:
        append_rows(options.out, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
