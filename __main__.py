"""`python -m multisa`: the command line."""

from multisa.runtime.cli.main import main

if __name__ == "__main__":
    main()
