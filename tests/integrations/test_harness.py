"""The lm-evaluation-harness on the tasks in harness_tasks: scores by loops, from Python, mythos eval and lm_eval."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_model
from typer.testing import CliRunner

from open_mythos import plots
from open_mythos.checkpoint import SHIPPED
from open_mythos.cli import app
from open_mythos.integrations.harness import _load, harness
from open_mythos.tasks.tokenizer import tokenizer

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
TASKS = Path(__file__).parent / "harness_tasks"
# The harness looks for its own tasks beside this module: reading those thousands takes a dozen seconds.
MANAGER = sys.modules[lm_eval_tasks.TaskManager.__module__]
# The harness leaves files open, and emits warnings of many kinds.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    """The shipped model of the parity task, with a tokenizer for bits."""
    directory = tmp_path_factory.mktemp("models") / "parity"
    shutil.copytree(SHIPPED / "parity-tiny", directory)
    bits = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "0": 1, "1": 2}, unk_token="<pad>"))
    bits.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bits.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>", "pad_token": "<pad>"}))
    return directory


def run_eval(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def run_export(*args):
    return CliRunner().invoke(app, ["export", *map(str, args)])


def test_scores_rise_with_loops(parity):
    begun = []
    curves = harness(parity, ["parity_choice", "parity_said"], [1, 16], TASKS, limit=16, begin=begun.append)
    choice, said = sorted(curves, key=lambda curve: curve.task)
    assert begun == ["1 loops", "16 loops"]
    assert (choice.task, choice.metric, choice.loops, choice.n) == ("parity_choice", "acc", [1, 16], 16)
    assert (said.task, said.metric, said.higher_is_better) == ("parity_said", "exact_match", True)
    assert choice.values[1] == said.values[1] == 1.0
    assert choice.values[0] < 0.9 and said.values[0] < 0.9
    assert choice.errors[1] == 0.0 < choice.errors[0]


def test_eval_writes_a_table_a_plot_and_json(parity, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_eval(
        parity, "--harness", "parity_choice", "--include-path", TASKS, "--loops", "1,16", "--examples", 8,
        "--out", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (curve,) = json.loads((tmp_path / "harness.json").read_text())
    assert curve["loops"] == [1, 16] and curve["n"] == 8 and curve["values"][1] == 1.0
    assert (tmp_path / "harness.png").read_bytes().startswith(b"\x89PNG")
    assert "parity_choice" in done.output and "1.0000 ±0.0000" in done.output
    assert "fatal" not in capfd.readouterr().err and "requests" not in done.output, "no git messages, no progress bars"
    assert f"Results: {tmp_path}/harness.json" in done.output and "--loops 32" in done.output


def test_an_interrupted_evaluation_keeps_the_loop_counts_that_are_done(parity, tmp_path, monkeypatch):
    import lm_eval

    evaluate, calls = lm_eval.simple_evaluate, []

    def interrupted(**options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(**options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", interrupted)
    done = run_eval(
        parity, "--harness", "parity_choice", "--include-path", TASKS, "--loops", "16,1", "--examples", 8,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code != 0 and "stopped; the scores of 16 loops are in" in done.output
    (curve,) = json.loads((tmp_path / "out" / "harness.json").read_text())
    assert curve["loops"] == [16] and curve["values"] == [1.0]


LM_EVAL = """
import json, runpy, sys
from lm_eval.tasks import TaskManager
sys.modules[TaskManager.__module__].__file__ = "nowhere/manager.py"
for words in json.loads(sys.argv[1]):
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
"""


def test_lm_eval_takes_num_loops_as_a_model_argument(parity, tmp_path):
    """As in docs/lm_eval.md, on an exported folder, by both commands: first lm_eval, which does not know the model."""
    folder = tmp_path / "folder"
    exported = run_export(parity, folder)
    assert exported.exit_code == 0 and f"Written: {folder} (weights, tokenizer and source)" in exported.output
    commands = [
        [
            command, "run", "--model", "hf", "--model_args", f"pretrained={folder},{trust}num_loops=16",
            "--tasks", "parity_choice,parity_said", "--include_path", str(TASKS), "--limit", "8",
            "--output_path", str(tmp_path / command), "--device", "cpu",
        ]
        for command, trust in (("lm_eval", "trust_remote_code=True,"), ("open_mythos.integrations.lm_eval", ""))
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LM_EVAL, json.dumps(commands)],
        capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for command, *_ in commands:
        (written,) = (tmp_path / command).rglob("results_*.json")
        results = json.loads(written.read_text())["results"]
        assert results["parity_choice"]["acc,none"] == results["parity_said"]["exact_match,none"] == 1.0


def test_bits_per_byte_of_text_fall_with_loops(tmp_path):
    (curve,) = (
        c for c in harness(SHIPPED / "text-tiny", ["source_bits"], [1, 8], TASKS) if c.metric == "bits_per_byte"
    )
    assert curve.higher_is_better is False and curve.values[1] < curve.values[0] - 0.002


def test_export_refuses_a_folder_in_use_and_a_missing_model(parity, tmp_path):
    for arguments, message in (
        ((parity, parity), "exists and is not empty"),
        (("nowhere", tmp_path / "x"), "neither a directory nor a shipped model"),
    ):
        done = run_export(*arguments)
        assert done.exit_code == 2 and message in " ".join(done.output.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--harness", "parity_choise", "--include-path", TASKS], "task 'parity_choise'; did you mean parity_choice"),
        (["--harness", "parity_choise"], "task 'parity_choise'; did you mean parity_choice"),
        (["--harness", "parity_choice", "--include-path", "nowhere"], "include='nowhere' is not a directory"),
        (["--harness", "parity_choice", "--loops", "1,x"], "--loops '1,x' should be whole numbers"),
        (["--harness", "parity_choice", "--loops", "0", "--include-path", TASKS], "loops=[0]; use whole numbers of at"),
        (["--harness", "parity_choice", "--task", "parity"], "--task cannot be used with --harness"),
        (["--include-path", TASKS], "give the tasks to run with --harness"),
    ],
)
def test_invalid_eval_arguments_are_refused(parity, monkeypatch, arguments, message):
    monkeypatch.setattr(MANAGER, "__file__", str(TASKS / "manager.py"))  # these tasks in place of its own
    done = run_eval(parity, *arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


@pytest.mark.parametrize("change, message", [
    (("max_gen_toks: 1,", "max_tokens: 4097,"), "parity_said asks for 4097 new tokens, but prompt and answer have"),
    (("metric: exact_match", "metric: precise_match"), "cannot run parity_said:"),
    (("{{bits}}", "{{bits"), "cannot run parity_said:"),
    (("{{parity}}", "{{answer.text}}"), "cannot run parity_said: UndefinedError: 'answer' is undefined"),
    (("!function files.parity", "!function files.nothing"), "cannot run parity_said: AttributeError"),
    (("metric_list:", "metric_list: ["), "parity_said.yaml cannot be read as YAML: while parsing"),
])  # fmt: skip
def test_an_invalid_task_is_a_one_line_error(parity, tmp_path, change, message):
    """Whatever the harness raises becomes one line."""
    tasks = shutil.copytree(TASKS, tmp_path / "tasks")
    (tasks / "parity_said.yaml").write_text((tasks / "parity_said.yaml").read_text().replace(*change))
    done = run_eval(parity, "--harness", "parity_said", "--include-path", tasks, "--loops", "1", "--examples", 4)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_a_prompt_of_max_seq_len_tokens_can_be_answered(parity, tmp_path):
    """The last generated token is never processed: with a max_seq_len of the longest prompt, no bit is cut off."""
    problems = [json.loads(line)["bits"].split() for line in (TASKS / "parity.jsonl").read_text().splitlines()]
    longest = max(map(len, problems))
    small, tasks = shutil.copytree(parity, tmp_path / "small"), shutil.copytree(TASKS, tmp_path / "tasks")
    config, task = json.loads((small / "config.json").read_text()), (tasks / "parity_said.yaml").read_text()
    (small / "config.json").write_text(json.dumps(config | {"max_seq_len": longest}))
    said, choice = (harness(small, [name], [16], tasks)[0].values for name in ("parity_said", "parity_choice"))
    assert said == choice == [1.0]
    for n, fits in ((longest, True), (longest + 1, False)):
        (tasks / "parity_said.yaml").write_text(task.replace("max_gen_toks: 1,", f"max_gen_toks: {n},"))
        done = run_eval(small, "--harness", "parity_said", "--include-path", tasks, "--loops", "1", "--examples", 4)
        assert (done.exit_code == 0) is fits, done.output
    assert f"have room for {longest + 1}; " in " ".join(done.output.split())


def test_an_exported_model_has_its_end_of_text_token(parity, tmp_path):
    assert run_export(parity, tmp_path / "folder").exit_code == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "folder" / name).read_text())["eos_token_id"] == 0


@pytest.mark.parametrize("kind", ["bytes", "bpe:300"])
@pytest.mark.parametrize("ends", [True, False])
def test_an_exported_tokenizer_encodes_names_of_special_tokens_as_text(tmp_path, kind, ends):
    """Like the tokenizer that it was exported from."""
    texts = ["a <pad> and an <eos>", "<eos>", "<pad>" * 3]
    made = tokenizer(kind, texts * 9, ends)
    tiny_model(vocab_size=len(made.pieces)).save_pretrained(tmp_path / "model")
    made.save(tmp_path / "model")
    assert run_export(tmp_path / "model", tmp_path / "folder").exit_code == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in texts:
        ids = made.encode([text]).tolist()
        assert theirs(text).input_ids == theirs.encode(text) == ids and 0 not in ids
        assert theirs.decode([*ids, 0], skip_special_tokens=True) == text
    theirs.save_pretrained(tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again")(texts[0]).input_ids == theirs.encode(texts[0])
    _, lm = _load(tmp_path / "model", 1)
    assert lm.tok_encode(texts[0]) == theirs.encode(texts[0])


@pytest.mark.parametrize("damage, message", [
    (lambda found: found["model"].pop("vocab"), "has no tokenizer (tokenizer.json) that transformers can read"),
    (lambda found: found["model"]["vocab"].update({"2": 3}), "has 4 tokens and the model 3; they do not belong"),
])  # fmt: skip
def test_an_invalid_tokenizer_is_not_exported(parity, tmp_path, damage, message):
    other = shutil.copytree(parity, tmp_path / "other")
    found = json.loads((other / "tokenizer.json").read_text())
    damage(found)
    (other / "tokenizer.json").write_text(json.dumps(found))
    done = run_export(other, tmp_path / "folder")
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert not (tmp_path / "folder").exists()


def test_eval_refuses_a_model_of_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").touch()
    done = run_eval(tmp_path, "--harness", "parity_choice", "--include-path", TASKS)
    assert done.exit_code == 2 and "model_type='llama' is another kind of model" in " ".join(done.output.split())


def test_eval_refuses_a_missing_or_mismatched_tokenizer(parity, tmp_path):
    bare = shutil.copytree(SHIPPED / "parity-tiny", tmp_path / "bare")
    done = run_eval(bare, "--harness", "parity_choice", "--include-path", TASKS)
    assert done.exit_code == 2 and "has no tokenizer (tokenizer.json)" in " ".join(done.output.split())
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(9)}, unk_token="0"))
    words.save(str(bare / "tokenizer.json"))
    done = run_eval(bare, "--harness", "parity_choice", "--include-path", TASKS)
    assert done.exit_code == 2 and "has 9 tokens and the model 3" in " ".join(done.output.split())


def test_scores_of_several_metrics_are_plotted(tmp_path):
    curve = {1: (0.5, 0.1), 4: (0.7, None)}
    plots.scores_by_loops({"acc": {"a": curve, "b": curve}, "bits": {"c": curve}}, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
