"""Tasks of the lm-evaluation-harness at several loop counts of one model. Needs the ``eval`` extra."""

from __future__ import annotations

import difflib
import io
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_mythos.fields import must
from open_mythos.install import missing

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Curve:
    """One metric of one task by loops.

    Attributes:
        task, metric: as the harness names them, with the filter behind the metric where there is one.
        higher_is_better: None where the harness does not say.
        loops: those that were run.
        values: one for each.
        errors: standard errors; None where the harness has none.
        n: documents that were scored.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    loops: list[int]
    values: list[float]
    errors: list[float | None]
    n: int


def harness(
    directory: str | Path,
    tasks: Sequence[str],
    loops: Sequence[int],
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    begin: Callable[[str], None] | None = None,
) -> list[Curve]:
    """Run tasks once for each loop count. The model is loaded once.

    Args:
        directory: a model with its tokenizer, as ``AutoModelForCausalLM`` and ``AutoTokenizer`` load them.
        tasks: names of tasks or groups that the harness knows or finds in ``include``.
        loops: counts, at least 1 each.
        include: directory with tasks of your own, a YAML file each.
        limit: documents of each task, the first ones; all if None.
        batch_size: rows of a batch.
        begin: called as each loop count begins, with a few words.

    Raises:
        ImportError: naming the extra, if the harness is not installed.
        ValueError: for a task that does not exist, a count that is none, a directory without a tokenizer, a tokenizer
            that does not fit the model, or data that would have to come from a hub that cannot be reached.
    """
    for count in loops:
        must(isinstance(count, int) and count >= 1, f"loops={list(loops)}; use whole numbers of at least 1")
    loops = list(loops)
    lm_eval = _require()
    with _quiet():
        manager = _manager(lm_eval.tasks.TaskManager, tasks, include)
        model, lm = _load(directory, batch_size)
        found = []
        for count in loops:
            if begin is not None:
                begin(f"{count} loops")
            model.config.num_loops = count
            found.append(_run(lm_eval, lm, list(tasks), manager, limit))
    return _curves(found, loops)


def _require() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing("the harness is not installed", "eval") from error
    return lm_eval


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness says of itself, and its bars if nobody watches; its errors stay."""
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    before = logger.level, evaluator.get_git_commit_hash, evaluator.add_env_info
    logger.setLevel(logging.ERROR)
    # git complains where there is no repository, and to list what is installed takes seconds; nobody reads either
    evaluator.get_git_commit_hash, evaluator.add_env_info = str, bool
    watched = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with watched:
            yield
    finally:
        level, evaluator.get_git_commit_hash, evaluator.add_env_info = before
        logger.setLevel(level)


def _manager(new: Callable[..., Any], names: Sequence[str], include: str | Path | None) -> Any:
    """What knows the tasks ``names``. ValueError if there is no such thing."""
    if include is not None:
        if not Path(include).is_dir():
            raise ValueError(f"include={str(include)!r} is no directory; give one that holds tasks, a YAML file each")
        own = new(include_path=str(include), include_defaults=False)  # reading the harness's thousands takes seconds
        if set(names) <= set(own.all_tasks):
            return own
    manager = new(include_path=None if include is None else str(include))
    known = manager.all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise ValueError(f"the harness has no task {name!r}; {hint} Your own are found in the directory `include`")
    return manager


def _load(directory: str | Path, batch_size: int) -> tuple[Any, Any]:
    """The model, and the harness's view of it."""
    from lm_eval.models.huggingface import HFLM

    from open_mythos.integrations.hf import OpenMythosConfig, OpenMythosForCausalLM
    from open_mythos.integrations.hf.export import load_tokenizer

    if not Path(directory).is_dir():
        raise ValueError(f"{directory} is not a directory; give one that holds a model and its tokenizer")
    tokenizer = load_tokenizer(directory, OpenMythosConfig.from_pretrained(directory).vocab_size)
    model = OpenMythosForCausalLM.from_pretrained(directory).eval()
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    lm = HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
        max_length=model.config.max_seq_len, prefix_token_id=prefix,
    )  # fmt: skip
    return model, lm


def _run(lm_eval: Any, lm: Any, tasks: list[str], manager: Any, limit: int | None) -> dict[str, Any]:
    from datasets.exceptions import DatasetNotFoundError

    try:
        return lm_eval.simple_evaluate(
            model=lm, tasks=tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ValueError(
            f"the data of {', '.join(tasks)} could not be fetched ({error}); tasks that the harness ships need the "
            f"Hugging Face hub, so connect once, or use tasks of your own on local files"
        ) from error


def _curves(found: list[dict[str, Any]], loops: list[int]) -> list[Curve]:
    curves = []
    for task, first in found[0]["results"].items():
        for key in first:
            name, _, chosen = key.partition(",")
            if not chosen or name.endswith("_stderr"):
                continue
            values = [result["results"][task][key] for result in found]
            if not all(isinstance(value, int | float) for value in values):
                continue
            errors = [result["results"][task].get(f"{name}_stderr,{chosen}") for result in found]
            curves.append(
                Curve(
                    task=task,
                    metric=name if chosen == "none" else f"{name}, {chosen}",
                    higher_is_better=found[0].get("higher_is_better", {}).get(task, {}).get(name),
                    loops=loops,
                    values=[float(value) for value in values],
                    errors=[error if isinstance(error, float) else None for error in errors],
                    n=found[0].get("n-samples", {}).get(task, {}).get("effective", 0),
                )
            )
    return curves
