"""``python -m benchmarks``: see ``--help``."""

from .environment import fix_policy

if __name__ == "__main__":
    fix_policy()  # before torch is imported

    from .runner import main

    main()
