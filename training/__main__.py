"""`python -m multisa.training train ..` is `multisa train ..`, for launchers that start a module, such as torchrun."""

from multisa.runtime.cli.main import main

if __name__ == "__main__":
    main()
