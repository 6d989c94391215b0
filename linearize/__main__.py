"""Run the command line as `python -m linearize`."""

from linearize.cli.app import main

if __name__ == "__main__":
    main()
