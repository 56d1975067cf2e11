"""The old name of `experiments.machine`, for one release."""

from experiments.machine import main

if __name__ == "__main__":
    main()
