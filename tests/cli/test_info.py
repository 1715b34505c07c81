"""``mythos`` and ``mythos info``."""

import subprocess
import sys

import pytest
from helpers import tiny_config, tiny_model
from typer.testing import CliRunner

from open_mythos import VARIANTS, __version__
from open_mythos.cli import COMMANDS, app
from open_mythos.cli.console import si
from open_mythos.cli.info import loop_counts
from open_mythos.diagnostics import cache_bytes_per_token, parameters
from open_mythos.training.recipes import configured


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_and_usage_errors_import_no_heavy_library():
    """One process for all commands: a library that one of them imports stays visible in the checks after it."""
    code = (
        "import sys; from typer.testing import CliRunner; from open_mythos.cli import COMMANDS, app\n"
        "def output(exit_code, *arguments):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == exit_code, (arguments, result.output)\n"
        "    heavy = {'torch', 'matplotlib', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'mythos {arguments} imports {heavy}'\n"
        "    return ' '.join(result.output.split())\n"
        "listed = output(0, '--help')\n"
        "for command, line in COMMANDS.items():\n"
        "    assert command in listed\n"
        "    assert f'{command} [OPTIONS]' in output(0, command, '--help')\n"
        "    assert 'No such option' in output(2, command, '--nonsense')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_option():
    assert run("--version").output.strip() == __version__


@pytest.mark.parametrize("command", ["info", "diagnose"])
def test_each_command_shows_its_own_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert COMMANDS[command] in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["1b", "mythos_nano", "1t"])
def test_info_shows_parameters_and_cache_size_of_a_variant(name):
    cfg = VARIANTS[name if name.startswith("mythos") else f"mythos_{name}"]()
    result = run("info", name)
    assert result.exit_code == 0, result.output
    count = parameters(cfg)
    assert f"{count.total:,}" in result.output and f"{count.active:,}" in result.output
    for loops in (1, cfg.max_loop_iters, 2 * cfg.max_loop_iters):
        assert si(cache_bytes_per_token(cfg, loops), "B") in result.output
    assert "Next:" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_info_reads_a_config_file_or_a_model_directory(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    total = f"{parameters(tiny_config()).total:,}"
    for path in (tmp_path, tmp_path / "config.json"):
        result = run("info", path)
        assert result.exit_code == 0 and total in result.output


def test_info_shows_the_adapter_if_there_is_one(tmp_path):  # named without the word that is looked for
    for width in (0, 24):
        tiny_config(bridge_dim=width).save(tmp_path / "config.json")
        result = run("info", tmp_path / "config.json")
        assert ("bridge" in result.output, "of width 24" in result.output) == (width > 0, width > 0)


def test_info_reads_the_config_of_an_unfinished_run(tmp_path):
    cfg = configured("debug")
    cfg.save(tmp_path / "config.json")
    for path in (tmp_path, tmp_path / "config.json"):
        result = run("info", path)
        assert result.exit_code == 0 and f"{parameters(cfg.model).total:,}" in result.output
        assert "Next: mythos demo" in result.output, "there is no model to diagnose yet"


def test_loop_counts():
    assert loop_counts(tiny_config(max_loop_iters=6)) == [1, 2, 4, 6, 8, 12]
    assert loop_counts(tiny_config(max_loop_iters=1)) == [1, 2]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("2b", "unknown variant '2b'; did you mean 'mythos_"),
        ("no/such/place", "no/such/place does not exist; give a config file"),
        ("config.json", "config.json does not exist"),
    ],
)
def test_an_invalid_argument_is_one_line_on_stderr(argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_failure(run("info", argument), message)


def test_an_invalid_config_is_one_line_on_stderr(tmp_path):
    check_failure(run("info", tmp_path), "config.json is missing")
    (tmp_path / "config.json").write_text('{"dimm": 3}')
    check_failure(run("info", tmp_path), "unknown config field 'dimm'; did you mean 'dim'?")


def check_failure(result, message):
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (7, "7 B"), (999, "999 B"), (12_345, "12.3 kB"), (999_600, "1 MB"), (2e21, "2e+03 EB")],
)
def test_si_formats_numbers_with_prefixes(number, text):
    assert si(number, "B") == text
