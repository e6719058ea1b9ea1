"""What an evaluation measures: tasks, lengths, and the runs beside exact attention."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attention import HyperAttention
from ..component import check_choice, check_non_negative_int, check_positive_int
from ..errors import ArgumentError, did_you_mean
from .metrics import METRICS

__all__ = ["ALL", "EXACT", "TASKS", "EvalSettings", "Run", "options_of"]

ALL = "all"
EXACT = "exact"

TASKS: dict[str, str] = {
    "perplexity": "perplexity of the texts, and the loss by position",
    "prefill": "seconds and memory of a prefill, and attention's share of it",
    "passkey": "digits hidden in filler, by length and depth",
    "induction": "a random sequence, repeated: is the repetition predicted?",
}
"""The tasks that need no file but a text."""

_LEAF = 512  # of the recursion, where nothing was given


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to compute the attention of a model.

    Attributes:
        label: "exact", the spec as it was asked for, or the name of a policy file.
        layers: how many of the last layers are replaced; None where a policy says which.
        options: of `HyperAttention`.
        policy: a `hyperframe.integrations.policy.Policy`, or None.
        digest: of the policy, the first 12 digits of SHA-256.
    """

    label: str
    layers: int | None
    options: Mapping[str, Any] = field(default_factory=dict)
    policy: Any = None
    digest: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether nothing is replaced."""
        return self.layers == 0

    @property
    def name(self) -> str:
        """What a table calls it."""
        if self.is_exact or self.layers is None:
            return self.label
        return f"{self.label}, last {self.layers}"

    def applied(self, model: nn.Module, observer: Any = None) -> AbstractContextManager[Any]:
        """Return a context in which the model attends so.

        Args:
            model: of transformers.
            observer: told of every attention call, see `hyperframe.integrations.transformers`.
        """
        from ..integrations.transformers import apply

        if self.policy is not None:
            return apply(model, policy=self.policy, observer=observer)
        if self.is_exact:
            return apply(model, "none", observer=observer)
        return apply(model, f"last:{self.layers}", observer=observer, **self.options)


def options_of(spec: str, *, seed: int = 0) -> dict[str, Any]:
    """Return the options of `HyperAttention` in a text: a detector, then options behind semicolons.

    Args:
        spec: such as `"balanced; sampler=uniform; num_samples=512"`.
        seed: where the spec names none.

    Returns:
        The options. Unless the spec says otherwise nothing is answered by exact attention for
        being short (`min_seq_len=0`); leaves of the recursion are exact up to 512.

    Raises:
        ArgumentError: an option without a name or a value.

    Example:
        >>> options_of("sort_lsh; causal=recursive; num_samples=64")["min_seq_len"]
        512
    """
    detector, *rest = (part.strip() for part in spec.split(";"))
    options: dict[str, Any] = {"detector": detector, "seed": seed}
    for entry in rest:
        name, sign, value = (part.strip() for part in entry.partition("="))
        if not (name and sign and value):
            raise ArgumentError(
                f"--spec {spec}: {entry!r} is no option; write 'balanced; num_samples=512'"
            )
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):  # a name or a spec
            options[name] = value
    options.setdefault("min_seq_len", _LEAF if options.get("causal") == "recursive" else 0)
    return options


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is measured, and how.

    Attributes:
        texts: files of text, or of JSON lines with a field "text": one document each.
        lengths: tokens; None takes 1,024, 2,048 and 4,096 as far as model and texts go.
        layers: how many of the last layers are replaced, each number a run; "all" for all of them.
            0 is exact attention, which is always measured.
        specs: see `options_of`.
        policies: policy files, each one more run.
        tasks: some of `TASKS`, and files of JSON lines with questions (`.jsonl`, see
            `hyperframe.evaluation.taskfile`).
        windows: of a text, one after the other, each of `length` tokens.
        depths: of the passkey, shares of the filler that stand before it.
        trials: keys of each length and depth, and sequences of the induction task.
        repeats: of a prefill.
        template: of the questions of task files: text with `{context}` and `{input}`; None is a
            plain one.
        metric: one of `METRICS`; None goes by the data set's name.
        max_new_tokens: of an answer; None goes by the data set's name.
        max_examples: of a task file, the first ones; None takes all.
        device: where.
        dtype: of the weights.
        seed: of all draws.
    """

    texts: Sequence[Path | str] = ()
    lengths: Sequence[int] | None = None
    layers: Sequence[int | str] = (ALL,)
    specs: Sequence[str] = ("balanced",)
    policies: Sequence[Path | str] = ()
    tasks: Sequence[str] = tuple(TASKS)
    windows: int = 1
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 4
    repeats: int = 3
    template: str | None = None
    metric: str | None = None
    max_new_tokens: int | None = None
    max_examples: int | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check numbers and names, and that every attention can be made."""
        owner = "eval"
        for length in self.lengths or ():
            check_positive_int(owner, "length", length)
            if length < 16:
                raise ArgumentError(f"--length {length}: is too short; ask for 16 tokens or more")
        for count in self.layers:
            if count != ALL:
                check_non_negative_int(owner, "layers", count)
        for name in ("windows", "trials", "repeats"):
            check_positive_int(owner, name, getattr(self, name))
        for name in ("max_new_tokens", "max_examples"):
            if getattr(self, name) is not None:
                check_positive_int(owner, name, getattr(self, name))
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ArgumentError(f"--depth {depth}: is no share; a depth lies between 0 and 1")
        if self.metric is not None:
            check_choice(owner, "metric", self.metric, tuple(METRICS))
        for name in ("specs", "tasks", "layers", "depths", "lengths", "policies"):
            values = getattr(self, name)
            if values is None or (name in ("specs", "policies") and not values):
                continue
            if not values or len(set(values)) < len(values):
                raise ArgumentError(
                    f"eval: {name}={tuple(values)!r}: name one at least, and each once"
                )
        self._check_tasks()
        for spec in self.specs:
            HyperAttention(**options_of(spec, seed=self.seed))

    def _check_tasks(self) -> None:
        files = {
            "texts": self.texts, "policies": self.policies,
            "tasks": [task for task in self.tasks if task not in TASKS],
        }  # fmt: skip
        for kind, paths in files.items():
            names = [Path(path).name for path in paths]
            if len(set(names)) < len(names):
                raise ArgumentError(
                    f"eval: the {kind} {', '.join(names)} do not differ in their names, by which "
                    "rows are told apart; rename one"
                )
        for task in self.tasks:
            if task not in TASKS and not task.endswith((".jsonl", ".json")):
                raise ArgumentError(
                    f"--tasks {task}: there is no such task; the tasks are {', '.join(TASKS)}, and "
                    f"files of questions that end in .jsonl.{did_you_mean(task, TASKS)}"
                )
        if "perplexity" in self.tasks and not self.texts:
            raise ArgumentError(
                "eval: perplexity needs a text; pass --text FILE, or leave perplexity out of "
                "--tasks"
            )

    def runs(self, depth: int) -> Iterator[Run]:
        """Yield exact attention, then what it is compared with.

        Args:
            depth: attention layers of the model.

        Raises:
            ArgumentError: more layers than there are; a policy file that cannot be read.
        """
        yield Run(label=EXACT, layers=0)
        counts: dict[int, None] = {}
        for asked in self.layers:
            count = depth if asked == ALL else int(asked)
            if count > depth:
                raise ArgumentError(
                    f"--layers {asked}: the model has {depth} attention layers; ask for 0 to "
                    f"{depth}, or all"
                )
            if count:
                counts[count] = None
        for spec in self.specs:
            options = options_of(spec, seed=self.seed)
            for count in counts:
                yield Run(label=spec.strip(), layers=count, options=options)
        for path in self.policies:
            yield policy_run(Path(path))


def policy_run(path: Path) -> Run:
    """Return the run of a policy file.

    Raises:
        ArgumentError: there is no such policy.
    """
    from ..integrations.policy import Policy

    policy = Policy.load(path)
    content = json.dumps(policy.to_dict(), sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()[:12]
    return Run(label=path.name, layers=None, policy=policy, digest=digest)
