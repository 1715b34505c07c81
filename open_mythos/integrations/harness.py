"""Tasks of the lm-evaluation-harness at several loop counts of one model. Needs the ``eval`` extra."""

from __future__ import annotations

import difflib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from open_mythos.fields import must
from open_mythos.install import missing

_NEW_TOKENS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"  # the first one given is used


@dataclass(frozen=True)
class Curve:
    """One metric of one task by number of loops.

    Attributes:
        task, metric: as the harness names them, the filter, if any, after the metric's name.
        higher_is_better: None where the harness does not say.
        loops: loop counts that were run.
        values: one for each loop count.
        errors: standard errors; None where the harness has none.
        n: number of documents scored.
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
    device: torch.device | str = "cpu",
) -> list[Curve]:
    """Run tasks once for each loop count. The model is loaded once.

    Args:
        directory: a model with its tokenizer, as ``AutoModelForCausalLM`` and ``AutoTokenizer`` load them.
        tasks: names of tasks or groups that the harness knows or finds in ``include``.
        loops: loop counts, at least 1 each.
        include: directory with tasks of your own, a YAML file each.
        limit: use only this many first documents of each task; all if None.
        batch_size: rows of a batch.
        begin: called with a short message as each loop count begins.
        device: where the model runs.

    Raises:
        ImportError: naming the extra, if the harness is not installed.
        ValueError: for a task that does not exist or cannot be run, or asks for more new tokens than the model holds,
            an invalid loop count, a directory without a tokenizer, a tokenizer that does not fit the model, or data on
            a hub that cannot be reached.
    """
    return list(scores(directory, tasks, loops, include, limit, batch_size, begin, device))[-1]


def scores(
    directory: str | Path,
    tasks: Sequence[str],
    loops: Sequence[int],
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    begin: Callable[[str], None] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[list[Curve]]:
    """As :func:`harness`, yielding the curves so far after each loop count, which may take hours."""
    loops, names = list(loops), list(tasks)
    must(len(loops) > 0, "loops is empty; give at least one loop count")
    whole = all(isinstance(count, int) and count >= 1 for count in loops)
    must(whole, f"loops={loops}; use whole numbers of at least 1")
    try:
        import lm_eval
        import transformers  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing("the harness is not installed", "eval") from error
    with _quiet():
        manager = _manager(TaskManager, names, include)
        model, lm = _load(directory, batch_size, device)
    found = []
    for n, count in enumerate(loops, start=1):
        with _quiet(), _blaming(names):
            if begin is not None:
                begin(f"{count} loops")
            model.config.num_loops = count
            options = dict(limit=limit, log_samples=False, bootstrap_iters=1000)
            found.append(lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, **options))
        yield _curves(found, loops[:n])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's messages but errors, and, unless stderr is a terminal, its progress bars."""
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    before = logger.level, evaluator.get_git_commit_hash, evaluator.add_env_info
    logger.setLevel(logging.ERROR)
    # git complains where there is no repository, and listing the environment takes seconds; neither is used
    evaluator.get_git_commit_hash, evaluator.add_env_info = str, bool
    watched = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with watched:
            yield
    finally:
        level, evaluator.get_git_commit_hash, evaluator.add_env_info = before
        logger.setLevel(level)


def _manager(new: Callable[..., Any], names: Sequence[str], include: str | Path | None) -> Any:
    """The task manager that knows the tasks ``names``; ValueError for an unknown one."""
    import yaml  # type: ignore[import-untyped]

    where = None if include is None else str(include)
    if where is not None:
        must(Path(where).is_dir(), f"include={where!r} is not a directory; give one with a YAML file for each task")
        own = new(include_path=where, include_defaults=False)  # reading the harness's thousands of tasks takes seconds
        if set(names) <= set(own.all_tasks):
            return own
        for path in sorted(Path(where).rglob("*.yaml")):
            try:
                list(yaml.parse(path.read_text()))
            except yaml.YAMLError as error:  # the harness silently skips such files
                raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    manager = new(include_path=where)
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is None:
        return manager
    near = difflib.get_close_matches(unknown, manager.all_tasks, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
    raise ValueError(
        f"the harness has no task {unknown!r}; {hint} Your own tasks are looked for in the directory `include`"
    )


def _load(directory: str | Path, batch_size: int, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The model, and the harness's wrapper of it."""
    from lm_eval.models.huggingface import HFLM

    from open_mythos.integrations.hf import OpenMythosConfig, OpenMythosForCausalLM
    from open_mythos.integrations.hf.export import load_tokenizer

    must(Path(directory).is_dir(), f"{directory} is not a directory; give one that holds a model and its tokenizer")
    tokenizer = load_tokenizer(directory, OpenMythosConfig.from_pretrained(directory).vocab_size)
    model = OpenMythosForCausalLM.from_pretrained(directory).eval().to(device)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    class Checked(HFLM):
        """The harness's wrapper, with a clear error where it would fail an assertion."""

        def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[str]:
            most, room = model.core.cfg.max_seq_len, model.core.cfg.max_text_len
            for request in requests:
                wanted = [n for name in _NEW_TOKENS if (n := request.args[1].get(name)) is not None]
                n = (*wanted, self.max_gen_toks)[0]
                must(
                    n <= most,
                    f"{request.task_name} asks for {n} new tokens, but prompt and answer have room for {room}; "
                    f"write generation_kwargs: {{max_gen_toks: N}} into its YAML file, with N at most {most}, or "
                    f"raise max_seq_len in {directory}/config.json",
                )
            self._max_length = room
            answers = super().generate_until(requests, *args, **kwargs)
            self._max_length = most
            return answers

    return model, Checked(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
        max_length=model.config.max_seq_len, prefix_token_id=prefix,
    )  # fmt: skip


@contextmanager
def _blaming(tasks: list[str]) -> Iterator[None]:
    """Turn all that the harness, a task or its data may raise into a ValueError that names the tasks."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ValueError(
            f"the data of {', '.join(tasks)} could not be downloaded ({error}); the harness's own tasks need the "
            f"Hugging Face Hub: go online once, or use tasks of your own on local files"
        ) from error
    except Exception as error:  # they have no common base class
        said = f"{type(error).__name__}: {error}; see the task's YAML file, and the data that it names"
        said = str(error) if isinstance(error, ValueError) else said
        raise ValueError(f"cannot run {', '.join(tasks)}: {said}") from error


def _curves(found: list[dict[str, Any]], loops: list[int]) -> list[Curve]:
    curves = []
    for task, first in found[0]["results"].items():
        for key in first:
            name, _, chosen = key.partition(",")
            values = [result["results"][task][key] for result in found]
            is_metric = chosen and not name.endswith("_stderr")
            if not is_metric or not all(isinstance(value, int | float) for value in values):
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
