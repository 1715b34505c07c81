"""The ``mythos`` script and ``python -m open_mythos``."""

import signal


def main() -> None:
    """Run a command. Ctrl-C while commands are still imported ends the process without a traceback."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, as nohup does
    if is_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from open_mythos import cli

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
