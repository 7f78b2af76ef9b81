"""`python -m fastedit` is the `fastedit` command."""

from fastedit.cli.main import main

if __name__ == "__main__":
    main()
