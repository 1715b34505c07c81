"""``python -m open_mythos``: the ``mythos`` command."""

from open_mythos.cli import main

if __name__ == "__main__":
    main()
