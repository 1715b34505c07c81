"""``mythos chat``, with input through a pipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_model
from typer.testing import CliRunner, Result

from open_mythos.cli import app
from open_mythos.cli.chat import show_trace, shown, template_of
from open_mythos.generation.conversation import Conversation
from open_mythos.tasks.english import VOCABULARY
from open_mythos.tasks.tokenizer import Tokenizer
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import fit
from open_mythos.training.recipes import configured


def chat(said: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=said)


def test_a_conversation_with_two_loop_counts_and_a_trace() -> None:
    done = chat("hello\n/loops 2\nimport\n/trace 3\n/quit\nnever read\n", "text-tiny", "--max-tokens", 8, "--seed", 0)
    assert done.exit_code == 0, done.output
    assert "text-tiny: 4 loops. It goes on with your text" in " ".join(done.output.split())
    rows = re.findall(r"^│ (\d+) +│(.*)│$", done.output, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2"] and all(row[1].count("│") == 2 for row in rows)
    assert "2 loops\n" in done.output and "Next:" in done.output
    again = chat("hello\n", "text-tiny", "--max-tokens", 8, "--seed", 0)
    assert again.output.splitlines()[-2] in done.output, "the seed fixes the reply, and the end of input ends the chat"


def test_unknown_commands_and_invalid_arguments_are_reported() -> None:
    commands = "/foo\n/loops x\n/loops 0\n/trace\n/temperature\n  /temperature 0.5\n/reset\n/help\n"
    done = chat(commands, "text-tiny")
    text = " ".join(done.output.split())
    assert (
        done.exit_code == 0
        and "unknown command /foo" in text
        and "conversation cleared" in text
        and "temperature 0.5" in text
    )
    assert (
        "/loops x: invalid arguments; see /help" in text and "/loops 0: n_loops=0; use an integer of at least 1" in text
    )
    assert (
        "/trace: there is nothing to trace yet; say something first" in text
        and "/temperature: invalid arguments" in text
    )


def test_ctrl_c_stops_the_reply_but_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    reply, n = Conversation.reply, [0]

    def interrupted(self: Conversation, *arguments: object):  # type: ignore[no-untyped-def]
        for text in reply(self, *arguments):  # type: ignore[arg-type]
            n[0] += 1
            if n[0] == 3:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(Conversation, "reply", interrupted)
    done = chat("hello\n/loops\nworld\n", "text-tiny", "--max-tokens", 5)
    assert done.exit_code == 0 and " [stopped]\n4 loops" in done.output and n[0] > 3


def test_unusable_models_and_options_are_refused(tmp_path: Path) -> None:
    small, other = tmp_path / "small", tmp_path / "damaged"
    for directory in (small, other):
        tiny_model().save_pretrained(directory)
    Tokenizer().save(small)
    (other / "tokenizer.json").write_text("{}")
    for arguments, message in (
        (("parity-tiny",), "has no tokenizer.json, so parity-tiny is not a text model; use text-tiny"),
        ((small,), "the tokenizer has 257 tokens and the model 23"),
        ((other,), "tokenizer.json cannot be used"),
        (("text-tniy",), "did you mean 'text-tiny'"),
        (("text-tiny", "--exit", "soon"), "there is no exit 'soon'"),
    ):
        done = chat("", *arguments)
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert shown("a\x1b[31mb\n\tc\r\x07é") == "a�[31mb\n\tc��é"


def test_the_chat_template_of_the_model_is_used(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert template_of(tmp_path) is None
    Tokenizer(ends=True).save(tmp_path)
    form = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": form}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = template_of(tmp_path)
    assert template is not None
    ids = template([{"role": "user", "content": "hi"}])
    assert Tokenizer().decode(ids) == "[user] hi\n[assistant] "


def test_a_word_task_model_answers_and_reports_unknown_words(tmp_path: Path) -> None:
    run = fit(in_words(), tmp_path / "run")
    facts, others = "Ana has what Ben has.\nBen keeps a key. What does Ana have?\n", "Ben rides.\nwhat has\n"
    done = chat(f"{facts}/trace\n/loops 2\n/trace 3\n{others}", run)
    text = " ".join(done.output.split())
    assert done.exit_code == 0 and "It answers questions in words" in text, done.output
    assert text.count("noted; ask a question") == 1 and "I am not sure: " in text
    rows = re.findall(r"^│ (\d+) +│(.*)│$", done.output, re.MULTILINE)
    assert rows[0][0] == "1" and [row[0] for row in rows][-3:] == ["4", "1", "2"], "the first and last loops"
    assert [row[1].count("│") for row in rows][-3:] == [0, 2, 2], "/trace alone shows only the position of the question"
    assert "there is no word 'rides' here; the nearest is 'writes'" in text and "end each sentence with . or ?" in text


def test_example_asks_a_problem_of_the_task_and_again_repeats_it(tmp_path: Path) -> None:
    run = fit(in_words(), tmp_path / "run")
    said = "/again\n/example 3\n/loops 1\n/again\n/trace\n/example x\n/example 99\n/example\n"
    done = chat(said, run, "--seed", 0)
    text = " ".join(done.output.split())
    assert done.exit_code == 0 and "/again: there is nothing to ask again yet" in text, done.output
    questions = [line for line in done.output.splitlines() if line.endswith(" ?")]
    right = re.findall(r"^right: (\w+)$", done.output, re.MULTILINE)
    assert len(questions) == 2 and questions[0] != questions[1] and len(right) == 3 and right[0] == right[1]
    assert all(word in VOCABULARY for word in (*" ".join(questions).split(), *right))
    assert len(re.findall(r"^│ \d+ +│", done.output, re.MULTILINE)) == 1, "the trace of the repeated question"
    assert (
        "/example x: invalid arguments" in text and "the difficulty of words is its number of steps, from 1 to" in text
    )
    refused = " ".join(chat("/example\n", "text-tiny").output.split())
    assert "/example: text-tiny was trained on text, which has no problems to ask; see /help" in refused


def in_words() -> TrainConfig:
    changes = "steps=2", "batch_size=4", "model.dim=16", "gate.steps=0", "model.max_loop_iters=4", "loops.maximum=4"
    evaluated = "evaluation.examples=4", "evaluation.difficulties=1,2", "evaluation.loops=1,2"
    return configured("words", [*changes, *evaluated])


def test_a_trace_shows_loops_until_the_prediction_is_stable_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    talk = SimpleNamespace(tokenizer=Tokenizer(), trace=lambda n: ([1], [[(2 + min(i, 2), 0.5)] for i in range(9)]))
    show_trace(talk, None)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert re.findall(r"^│ (\d+) +│", said, re.MULTILINE) == ["1", "2", "3", "9"]
    assert "5 loops without a change are not shown." in said


def test_a_trace_shows_as_many_tokens_as_fit_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    talk = SimpleNamespace(tokenizer=Tokenizer(), trace=lambda n: ([1] * n, [[(2, 0.5)] * n]))
    show_trace(talk, 500)  # type: ignore[arg-type]
    assert "The terminal has room for the last 8 tokens." in " ".join(capsys.readouterr().out.split())
