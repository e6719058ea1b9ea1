"""Is what is heavy in a column of `Q K^T` what softmax attends to? And where a sketch is needed.

`--heads`: the share of the softmax mass that `count_sketch` holds on heads from files
(`benchmarks/heads.py`, cut to `--length`), beside other detectors with about as many keys a row.
`search="exact"`, so that nothing is missed: what is measured is the relation, not its decoding.

`--instances`: one large logit in every row, in a random column (after Alman and Song), all others
small. Queries also have a large part that is orthogonal to all keys: it changes no logit, but the
large one is at no small angle. Relative error of the output, with 128 uniform samples for the rest.

    python benchmarks/heavy_mass.py --heads heads-prose.safetensors heads-code.safetensors \
        --instances --out benchmarks/results/heavy-mass.jsonl
    python benchmarks/heavy_mass.py --read benchmarks/results/heavy-mass.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hyperframe import HyperAttention
from hyperframe.benchmarking.report import append_rows
from hyperframe.detectors import create
from hyperframe.diagnostics import mask_quality
from hyperframe.integrations.capture import load
from hyperframe.testing import dense_attention

SKETCHES = {
    "as defined": "count_sketch(tau={tau}, search='exact')",
    "positive": "count_sketch(tau={tau}, search='exact', positive_only=True)",
    "positive, centred": "count_sketch(tau={tau}, search='exact', positive_only=True, center=True)",
}
# of as many keys a row, k; a block or a tile of a causal call sees half of them later
OTHERS = {
    "sort_lsh": "sort_lsh(block_size={twice})",
    "refined": "refined(num_keys={k})",
    "oracle": "oracle(budget={k})",
}
FINDERS = {
    "samples alone": "sliding_window(width=1)",
    "sort_lsh": "sort_lsh(block_size=64)",
    "balanced_lsh": "balanced_lsh(block_size=64)",
    "heavy_columns": "heavy_columns(num_columns=64)",
    "refined": "refined(num_keys=64)",
    "count_sketch": "count_sketch(tau=64, search='sketch')",
    "expander_sketch": "expander_sketch(tau=64, search='sketch')",
}


def mass_rows(
    path: Path, length: int, heads: list[int], taus: list[int], seed: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each head, bound, form of the relation, and detector."""
    for layer, found in load(path).items():
        group = found.query.shape[1] // found.key.shape[1]
        for head in heads:
            query = found.query[:1, head : head + 1, :length].float()
            key = found.key[:1, head // group : head // group + 1, :length].float()
            options = {"scale": found.scale, "is_causal": found.is_causal}
            about = {
                "kind": "mass", "source": path.stem, "layer": layer, "head": head,
                "n": query.shape[2], "seed": seed,
            }  # fmt: skip

            def row(spec: str, query=query, key=key, options=options) -> dict[str, Any]:
                generator = torch.Generator().manual_seed(seed)
                mask = create(spec).find(query, key, generator=generator, **options)
                mass = mask_quality(query, key, mask, scale=options["scale"]).mass
                keys = float(mask.nnz().double().mean()) / query.shape[2]
                return {"detector": spec, "keys": keys, "mass": float(mass)}

            for tau in taus:
                for form, spec in SKETCHES.items():
                    held = row(spec.format(tau=tau))
                    case = {**about, "tau": tau, "form": form}
                    yield {**case, "name": "count_sketch", **held}
                    # the first rows see fewer keys than a budget
                    k = max(1, round(held["keys"]))
                    twice = max(2, 2 * k if found.is_causal else k)
                    for name, other in OTHERS.items():
                        yield {**case, "name": name, **row(other.format(k=k, twice=twice))}


def instance(n: int, *, size: float, dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return query, key and value; the logits (scale 1) have one of `size` in every row."""
    g = torch.Generator().manual_seed(seed)
    key = torch.nn.functional.normalize(torch.randn(1, 1, n, dim, generator=g), dim=-1)
    partner = torch.randperm(n, generator=g)
    aside = 4 * size * torch.nn.functional.normalize(torch.randn(1, 1, n, dim, generator=g), dim=-1)
    query = torch.cat([size * key[:, :, partner], aside], dim=-1)
    key = torch.cat([key, torch.zeros_like(key)], dim=-1)
    return query, key, torch.randn(1, 1, n, dim, generator=g)


def instance_rows(lengths: list[int], seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each length, seed and detector."""
    for n in lengths:
        for seed in range(seeds):
            query, key, value = instance(n, size=3 * math.log(n), dim=128, seed=seed)
            exact = dense_attention(query, key, value, scale=1.0).out
            for name, spec in FINDERS.items():
                attend = HyperAttention(
                    detector=spec, sampler="uniform", num_samples=128, min_seq_len=0, seed=seed
                )
                out = attend(query, key, value, scale=1.0)
                yield {
                    "kind": "instance", "n": n, "seed": seed, "name": name, "detector": spec,
                    "error": float((out - exact).norm() / exact.norm()),
                }  # fmt: skip


def print_mass(rows: list[dict[str, Any]]) -> None:
    """Print medians over heads, as a table."""
    names = ["count_sketch", *OTHERS]
    print(f"| heads | tau | form | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for case in dict.fromkeys((r["source"], r["tau"], r["form"]) for r in rows):
        cells = []
        for name in names:
            chosen = [
                r for r in rows if (r["source"], r["tau"], r["form"], r["name"]) == (*case, name)
            ]
            mass = statistics.median(r["mass"] for r in chosen)
            keys = statistics.median(r["keys"] for r in chosen)
            cells.append(f"{mass:.2f} ({keys:.1f})")
        source = f"{case[0]}, {len(chosen)}"
        print(f"| {source} | {case[1]} | {case[2]} | {' | '.join(cells)} |")


def print_instances(rows: list[dict[str, Any]]) -> None:
    """Print medians over seeds, as a table."""
    lengths = sorted({r["n"] for r in rows})
    print(f"| detector | {' | '.join(f'n = {n:,}' for n in lengths)} |")
    print(f"|{'---|' * (1 + len(lengths))}")
    for name in FINDERS:
        errors = [
            statistics.median(r["error"] for r in rows if (r["n"], r["name"]) == (n, name))
            for n in lengths
        ]
        print(f"| `{name}` | {' | '.join(f'{error:.3f}' for error in errors)} |")


def main() -> None:
    """Measure or read, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--heads", type=Path, nargs="+", default=[], help="of benchmarks/heads.py")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--head", type=int, nargs="+", default=[0, 4], help="heads of a layer")
    parser.add_argument("--tau", type=int, nargs="+", default=[64])
    parser.add_argument("--instances", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the rows to this JSON-lines file")
    parser.add_argument("--read", type=Path, help="measure nothing; take the rows of this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.read:
        rows = [json.loads(line) for line in options.read.read_text().splitlines()]
    for path in options.heads:
        rows += mass_rows(path, options.length, options.head, options.tau, seed=0)
    if options.instances:
        rows += instance_rows(options.lengths, options.seeds)
    for kind, show in (("mass", print_mass), ("instance", print_instances)):
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            show(chosen)
            print()
    if options.out and rows:
        append_rows(options.out, rows)


if __name__ == "__main__":
    main()
