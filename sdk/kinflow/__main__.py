"""`python -m kinflow` is the command `kinflow`."""

from kinflow.cli import main

if __name__ == "__main__":
    main()
