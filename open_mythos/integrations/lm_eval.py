"""The harness's own command line, with this library's models registered, so that no remote code need be trusted::

python -m open_mythos.integrations.lm_eval run --model hf --model_args pretrained=FOLDER,num_loops=8 --tasks …
"""

from open_mythos.install import missing


def main() -> None:
    """Run the ``lm_eval`` command. ImportError, naming the extra, if the harness is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise missing("the harness is not installed", "eval") from error
    import open_mythos.integrations.hf  # noqa: F401  (registers with the Auto classes)

    cli_evaluate()


if __name__ == "__main__":
    main()
