"""``mythos chat``: talk to a model of text in the terminal, at any depth, and see its predictions after each loop."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from open_mythos import files
from open_mythos.cli.console import console, mythos, note, table
from open_mythos.fields import MAX_SEED
from open_mythos.install import missing

if TYPE_CHECKING:
    import torch

    from open_mythos.generation.conversation import Conversation, Messages, Template
    from open_mythos.tasks import Task

_COLUMN = 10  # characters of the terminal for each column of /trace
HELP = """\
/example [N]    clear the conversation, and ask a new problem of N steps (2), if the model was trained on problems
/again          clear the conversation, and ask the last example once more
/loops N        run N loops from now on: the same weights, deeper
/trace [N]      the likeliest token after each loop, at the last N tokens (8; or at the question mark)
/temperature T  0 takes the likeliest token
/reset          clear the conversation
/help           this
/quit           leave; so does the end of the input. Ctrl-C ends a reply"""


def chat(
    model: Annotated[str, typer.Argument(help="A run, a model's directory, or a shipped model such as text-tiny.")],
    loops: Annotated[int | None, typer.Option(min=1, help="For every token; the model's own if left out.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the likeliest token; 0.8, or 0 if it answers questions.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0: from all.")] = 50,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens of this probability.")] = None,
    exit: Annotated[
        str | None, typer.Option(help="Let tokens stop early: gate, change:0.03:2, acceleration, kl:5e-4, argmax:3.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="To get the same replies again.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Talk to a model of text, at any depth."""
    import torch

    from open_mythos.generation.conversation import Conversation
    from open_mythos.generation.sampling import Sampling
    from open_mythos.models import load_model, model_dir, tokenizer_of
    from open_mythos.nn.exits import parse
    from open_mythos.training.distributed import find_device

    at = find_device(device)
    loaded, tokenizer = load_model(model).to(at), tokenizer_of(model)
    if at.type == "cpu":
        loaded.float()  # faster than half precision on a CPU
    generator = torch.Generator(at)
    _ = generator.seed() if seed is None else generator.manual_seed(seed)
    if temperature is None:
        temperature = 0.8 if tokenizer.asks is None else 0.0
    sampling, leave = Sampling(temperature, top_k or None, top_p), None if exit is None else parse(exit)
    template = tokenizer.template or template_of(model_dir(model))
    talk = Conversation(loaded, tokenizer, loops, sampling, leave, template, generator)
    how = "chats" if talk.template else "goes on with your text; it was not taught to answer"
    if tokenizer.asks is not None:
        how = "answers questions in words: /example shows one"
    console.print(f"{model}: {talk.n_loops} loops. It {how}. /help", style="dim")
    problems = Problems(model, torch.Generator().manual_seed(generator.initial_seed()))
    for line in lines():
        if line.strip() in ("/quit", "/exit"):
            break
        if not line.lstrip().startswith("/"):
            answer(talk, line, max_tokens)
        elif command(talk, problems, line):
            answer(talk, problems.question, max_tokens)
            console.print(f"right: {problems.answer}", style="dim")
    note(f"Next: look inside, {mythos('diagnose', model)}.")


class Problems:
    """Held-out problems of the task that a model was trained on.

    Attributes:
        question, answer: of the last problem, "" before the first.
    """

    def __init__(self, model: str, generator: "torch.Generator") -> None:
        self.model, self.generator = model, generator
        self.question = self.answer = ""
        self._task: Task | None = None

    def draw(self, difficulty: int) -> None:
        """Draw a new problem.

        Raises:
            ValueError: for a model of text, or a difficulty that its task does not have.
        """
        from open_mythos.cli.diagnose import task_of
        from open_mythos.models import model_dir
        from open_mythos.tasks import UNSCORED
        from open_mythos.training.runs import training_config

        if self._task is None:
            found = task_of(model_dir(self.model))
            if found is None or not found[0].has_steps:
                trained = training_config(self.model).task.name
                raise ValueError(f"{self.model} was trained on {trained}, which has no problems to ask")
            self._task = found[0]
        batch = self._task.batch(1, difficulty, self.generator)
        asked = int((batch.targets[0] != UNSCORED).nonzero()[0])
        self.question = self._task.render(batch.ids[0, : asked + 1].tolist())
        self.answer = self._task.vocab[int(batch.targets[0, asked])].strip()


def template_of(directory: Path) -> "Template | None":
    """The chat template in a model's directory, if there is one.

    Raises:
        ImportError: naming the extra to install, if ``transformers`` is missing.
    """
    config, beside = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    if not beside.is_file() and not (config.is_file() and "chat_template" in files.read_json(files.own(config))):
        return None
    try:
        from transformers import AutoTokenizer

        import open_mythos.integrations.hf  # noqa: F401  (else transformers warns about the unknown model type)
    except ImportError as error:
        raise missing("this model's chat template needs transformers", "hf") from error
    theirs = AutoTokenizer.from_pretrained(directory)

    def tokens(messages: "Messages") -> list[int]:
        try:
            return list(theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template of {directory} refuses: {error}") from error

    return tokens


def lines() -> Iterator[str]:
    """The lines that the user types, or those of a pipe, without empty ones."""
    if sys.stdin is None:  # closed
        return
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # of bytes that are not UTF-8
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (history and editing in input(); not everywhere)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip():
            yield line


def answer(talk: "Conversation", line: str, max_tokens: int) -> None:
    """Print a reply as it comes. Ctrl-C ends the reply only, not the chat."""
    n_before, started = 0, None
    try:
        for text in talk.reply(line, max_tokens):
            if started is None:
                n_before, started = len(talk.ids), time.perf_counter()
            print(shown(text), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except ValueError as error:
        console.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        return
    if talk.tokenizer.asks is not None and started is None:
        console.print("noted; ask a question, which ends in ?", style="dim")
        return
    print(flush=True)
    if started is not None and (new := len(talk.ids) - n_before) > 1 and sys.stdout.isatty():
        speed = new / (time.perf_counter() - started)
        console.print(f"{talk.n_loops} loops, {speed:.0f} tokens/s", style="dim")


def shown(text: str) -> str:
    """Text that is safe to print in a terminal: control characters are replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def command(talk: "Conversation", problems: Problems, line: str) -> bool:
    """Run a command line that begins with a slash; return whether to ask the last of the problems."""
    name, *values = line.split()
    try:
        match name, values:
            case "/loops", [] | [_]:
                if values:
                    talk.n_loops = int(values[0])
                console.print(f"{talk.n_loops} loops", style="dim")
            case "/temperature", [temperature]:
                talk.sampling = dataclasses.replace(talk.sampling, temperature=float(temperature))
                console.print(f"temperature {talk.sampling.temperature:g}", style="dim")
            case "/reset", []:
                talk.reset()
                console.print("conversation cleared", style="dim")
            case "/trace", [] | [_]:
                show_trace(talk, int(values[0]) if values else None)
            case "/example", [] | [_]:
                problems.draw(int(values[0]) if values else 2)
                talk.reset()
                console.print(Text(problems.question), soft_wrap=True)
                return True
            case "/again", []:
                if not problems.question:
                    raise ValueError("there is nothing to ask again yet; begin with /example")
                talk.reset()
                return True
            case "/help", []:
                console.print(HELP)
            case "/loops" | "/temperature" | "/reset" | "/trace" | "/example" | "/again" | "/help", _:
                raise ValueError("invalid arguments")
            case _:
                console.print(f"unknown command {name}", style="red")
                console.print(HELP, style="dim")
    except ValueError as error:
        reason = "invalid arguments" if "literal" in str(error) else error
        console.print(Text(f"{line}: {reason}; see /help", style="red"), soft_wrap=True)
    return False


def show_trace(talk: "Conversation", n: int | None) -> None:
    """Show a row for each loop, a column for each of the last tokens; bold once a token no longer changes."""
    room = max(8, console.width // _COLUMN)
    said, loops = talk.trace(n if n is None else min(n, room))

    def word(token: int) -> str:
        known = token < len(talk.tokenizer.pieces)
        if token == talk.tokenizer.eos:
            return "<eos>"
        piece = talk.tokenizer.pieces[token].decode("utf-8", "replace") if known else f"<{token}>"
        return repr(piece)[1:-1].replace(" ", "␣")

    def stays(loop: int, i: int) -> bool:
        return all(later[i][0] == loops[loop][i][0] for later in loops[loop:])

    console.print("the likeliest token after each loop, and its probability", style="bold")
    grid, n_rows = table("", "loop", *map(word, said)), len(loops)
    first_still = next(loop for loop in range(n_rows) if all(stays(loop, i) for i in range(len(said))))
    left_out = max(0, n_rows - first_still - 2)  # unchanged loops between the first unchanged one and the last
    left_out = left_out if left_out > 1 else 0
    for loop in (*range(n_rows - 1 - left_out), n_rows - 1):
        cells = (
            Text(f"{word(token)} {probability:.2f}".replace("0.", "."), "bold" if stays(loop, i) else "")
            for i, (token, probability) in enumerate(loops[loop])
        )
        grid.add_row(str(loop + 1), *cells)
    console.print(grid)
    more = f" {left_out} loops without a change are not shown." if left_out else ""
    more += f" The terminal has room for the last {room} tokens." if n is not None and n > room == len(said) else ""
    console.print(
        f"bold: final, unchanged by later loops.{more} Columns are headed by the token of the reply.", style="dim"
    )
