"""`python -m prerope.server.cli`, as `prerope` where that is installed."""

from prerope.server.cli.app import main

if __name__ == "__main__":
    main()
